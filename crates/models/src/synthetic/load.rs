//! A loading session: blocks received in place into staging memory, everything checked, nothing of
//! the device touched before all of it was found whole.

use limosa_device::pci::Function;
use limosa_device::saved::Refusal;
use limosa_protocol::Errno;
use prost::Message;
use zerocopy::IntoBytes;

use super::blocks::{Blocks, checksum, generation, received};
use super::dma::{Pattern, Registers};
use super::records::{Identity, KIND, RECORD_BYTES, Record, Rest, SECTION_BYTES_MAX, VERSION};

/// Why a state is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// It is the state of another kind of device.
    #[error("this is the state of a device of kind `{0}`, not of a synthetic one")]
    Foreign(String),
    /// It was saved by a newer program.
    #[error("this state has version {0}, the newest that is known here is 1")]
    Newer(u32),
    /// It is the state of a synthetic device of another size.
    #[error("this is a state of {there}, but the device has {here}")]
    Geometry {
        /// What was sent.
        there: String,
        /// What would be right.
        here: String,
    },
    /// It holds a record of a kind that is not known.
    #[error("this state holds a record of unknown kind {0}")]
    Unknown(u32),
    /// Something comes where it must not.
    #[error("this state holds {0} where none belongs")]
    Order(&'static str),
    /// Its PCI function is another one.
    #[error(transparent)]
    Function(#[from] Refusal),
    /// It was altered on its way.
    #[error("this state is damaged: {0}")]
    Damaged(String),
    /// It is not all there.
    #[error("this state is cut off: {0}")]
    Truncated(String),
}

impl LoadError {
    /// The errno for the client: EBADMSG for a damaged or truncated state, EINVAL for one that is
    /// not of this device, ENOTSUP for a newer one.
    pub fn errno(&self) -> Errno {
        match self {
            LoadError::Foreign(_) | LoadError::Geometry { .. } => Errno::EINVAL,
            LoadError::Function(refusal) => refusal.errno(),
            LoadError::Newer(_) | LoadError::Unknown(_) => Errno::ENOTSUP,
            LoadError::Order(_) | LoadError::Damaged(_) | LoadError::Truncated(_) => Errno::EBADMSG,
        }
    }
}

/// What is received next.
enum Expect {
    Record,
    Identity {
        crc: u32,
    },
    Rest {
        crc: u32,
    },
    /// Bytes of the state.
    Blocks(std::ops::Range<usize>),
    Nothing,
}

pub(super) struct Loader {
    staging: Vec<u64>,
    block_bytes: usize,
    verify: bool,
    expect: Expect,
    /// A record or section that is being received.
    small: Vec<u8>,
    small_at: usize,
    seed: Option<u64>,
    /// Of the blocks that were received, by index.
    generations: Vec<Option<u64>>,
    rest: Option<Rest>,
}

/// A state that was found whole.
pub(super) struct Loaded {
    pub(super) blocks: Blocks,
    pub(super) dma: Registers,
    pub(super) dirty_rate: u64,
    pub(super) scratch: Vec<u8>,
    pub(super) function: Function,
}

impl Loader {
    /// A session for a device with `count` blocks. `staging` is memory of that size, if there is
    /// some at hand.
    pub(super) fn new(count: usize, block_bytes: usize, verify: bool, staging: Option<Vec<u64>>) -> Loader {
        let staging = staging.unwrap_or_else(|| {
            // Touched here, once, so that receiving never waits for pages.
            let mut words = vec![0; count * block_bytes / 8];
            words.iter_mut().step_by(512).for_each(|word| *word = 1);
            words
        });
        Loader {
            staging,
            block_bytes,
            verify,
            expect: Expect::Record,
            small: vec![0; RECORD_BYTES],
            small_at: 0,
            seed: None,
            generations: vec![None; count],
            rest: None,
        }
    }

    /// The memory, for a later session.
    pub(super) fn into_staging(self) -> Vec<u64> {
        self.staging
    }

    /// Where the next bytes belong.
    pub(super) fn space(&mut self, bytes_max: usize) -> Option<&mut [u8]> {
        match &self.expect {
            Expect::Nothing => None,
            Expect::Blocks(range) => {
                let end = range.end.min(range.start.saturating_add(bytes_max));
                Some(&mut self.staging.as_mut_bytes()[range.start..end])
            }
            Expect::Record | Expect::Identity { .. } | Expect::Rest { .. } => {
                let end = self.small.len().min(self.small_at.saturating_add(bytes_max));
                Some(&mut self.small[self.small_at..end])
            }
        }
    }

    /// `bytes` bytes of [`Loader::space`] were received.
    pub(super) fn filled(&mut self, bytes: usize) -> Result<(), LoadError> {
        match &mut self.expect {
            Expect::Nothing => Err(LoadError::Order("bytes after its end")),
            Expect::Blocks(range) => {
                let from = range.start;
                range.start += bytes;
                let (done, over) = (range.start, range.start == range.end);
                if over {
                    self.expect(Expect::Record, RECORD_BYTES);
                }
                self.blocks_done(from / self.block_bytes..done / self.block_bytes)
            }
            Expect::Record | Expect::Identity { .. } | Expect::Rest { .. } => {
                self.small_at += bytes;
                if self.small_at == self.small.len() { self.small_done() } else { Ok(()) }
            }
        }
    }

    fn expect(&mut self, expect: Expect, small_bytes: usize) {
        self.expect = expect;
        self.small_at = 0;
        self.small.resize(small_bytes, 0);
    }

    fn blocks_done(&mut self, indexes: std::ops::Range<usize>) -> Result<(), LoadError> {
        let seed = self.seed.ok_or(LoadError::Order("blocks before its identity"))?;
        for index in indexes {
            let block = &self.staging.as_bytes()[index * self.block_bytes..(index + 1) * self.block_bytes];
            self.generations[index] = Some(if self.verify {
                received(block, seed, index).map_err(LoadError::Damaged)?
            } else {
                generation(block)
            });
        }
        Ok(())
    }

    fn small_done(&mut self) -> Result<(), LoadError> {
        let whole = |crc| crc32c::crc32c(&self.small) == crc;
        match self.expect {
            Expect::Identity { crc } if whole(crc) => {
                self.identity()?;
                self.expect(Expect::Record, RECORD_BYTES);
            }
            Expect::Rest { crc } if whole(crc) => {
                let rest = Rest::decode(&self.small[..]);
                self.rest = Some(rest.map_err(|error| LoadError::Damaged(error.to_string()))?);
                self.expect(Expect::Nothing, 0);
            }
            Expect::Identity { .. } => return Err(LoadError::Damaged("its identity".into())),
            Expect::Rest { .. } => return Err(LoadError::Damaged("its registers".into())),
            Expect::Record | Expect::Blocks(_) | Expect::Nothing => {
                let record = <&[u8; RECORD_BYTES]>::try_from(&self.small[..]);
                self.record(Record::decode(record.map_err(|_| LoadError::Order("half a record"))?)?)?;
            }
        }
        Ok(())
    }

    fn record(&mut self, record: Record) -> Result<(), LoadError> {
        let section = |bytes: u32| match bytes as usize {
            0 => Err(LoadError::Damaged("an empty section".into())),
            bytes if bytes > SECTION_BYTES_MAX => Err(LoadError::Damaged(format!(
                "a section of {bytes} bytes, the most is {SECTION_BYTES_MAX}"
            ))),
            bytes => Ok(bytes),
        };
        match (record, self.seed) {
            (Record::Identity { bytes, crc }, None) => {
                self.expect(Expect::Identity { crc }, section(bytes)?);
            }
            (Record::Identity { .. }, Some(_)) => return Err(LoadError::Order("a second identity")),
            (_, None) => return Err(LoadError::Order("records before its identity")),
            (Record::Rest { bytes, crc }, Some(_)) => self.expect(Expect::Rest { crc }, section(bytes)?),
            (Record::Blocks { first, count }, Some(_)) => {
                let (first, count) = (first as usize, count as usize);
                let end = first.saturating_add(count);
                if count == 0 || end > self.generations.len() {
                    return Err(LoadError::Damaged(format!("blocks {first} to {end} do not exist")));
                }
                self.expect = Expect::Blocks(first * self.block_bytes..end * self.block_bytes);
            }
        }
        Ok(())
    }

    fn identity(&mut self) -> Result<(), LoadError> {
        let identity =
            Identity::decode(&self.small[..]).map_err(|error| LoadError::Damaged(error.to_string()))?;
        if identity.kind != KIND {
            return Err(LoadError::Foreign(identity.kind.chars().take(64).collect()));
        }
        if identity.version > VERSION {
            return Err(LoadError::Newer(identity.version));
        }
        let here = (self.staging.len() as u64 * 8, self.block_bytes as u32);
        let there = (identity.state_bytes, identity.block_bytes);
        if here != there {
            let name = |(state, block)| format!("{state} bytes in blocks of {block}");
            return Err(LoadError::Geometry { there: name(there), here: name(here) });
        }
        self.seed = Some(identity.seed);
        Ok(())
    }

    /// The state, once all of it arrived and belongs together, for a device with this function. When
    /// not, the session is as it was.
    pub(super) fn finish(&mut self, function: &Function) -> Result<Loaded, LoadError> {
        let Some((rest, seed)) = self.rest.as_ref().zip(self.seed) else {
            return Err(LoadError::Truncated("its last record is missing".into()));
        };
        if let Some(missing) = self.generations.iter().position(Option::is_none) {
            return Err(LoadError::Truncated(format!("block {missing} is missing")));
        }
        let generations: Vec<u64> = self.generations.iter().flatten().copied().collect();
        if checksum(seed, &generations) != rest.checksum {
            let what = "a block is not of the generation that the source stopped with";
            return Err(LoadError::Damaged(what.into()));
        }
        let Some(pattern) = Pattern::from_raw(rest.dma_pattern) else {
            return Err(LoadError::Damaged(format!("DMA pattern {} does not exist", rest.dma_pattern)));
        };
        if rest.cursor >= generations.len() as u64 || rest.scratch.len() != super::SCRATCH_BYTES {
            return Err(LoadError::Damaged("its registers do not fit the device".into()));
        }
        let dma = Registers {
            base: rest.dma_base,
            pages: rest.dma_pages,
            pattern,
            rate: rest.dma_rate,
            limit: rest.dma_limit,
            sequence: rest.dma_sequence,
            enabled: rest.dma_enabled && rest.dma_pages > 0,
            failed: rest.dma_failed,
        };
        let state = rest.function.as_ref();
        let state = state.ok_or_else(|| LoadError::Damaged("it has no PCI function".into()))?;
        let function = function.loaded("function", state)?;
        let words = std::mem::take(&mut self.staging);
        let (dirtied, cursor) = (rest.dirtied, rest.cursor as usize);
        Ok(Loaded {
            blocks: Blocks::from_parts(words, self.block_bytes, seed, generations, dirtied, cursor),
            dma,
            dirty_rate: rest.dirty_rate,
            scratch: rest.scratch.clone(),
            function,
        })
    }
}

#[cfg(test)]
mod tests;
