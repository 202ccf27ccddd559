//! Pages of guest memory on their way to the links: threads take chunks of what is dirty from one row, copy them,
//! and send what is not zero.

use limosa_clockwork::{Monitor, now};
use limosa_protocol::bitmap::DirtyBitmap;

use crate::Result;
use crate::memory::{MemoryRegion, PAGE_BYTES, is_zero};
use crate::report::Recorder;
use crate::transfer::sending::Sending;
use limosa_stream::buffer::Buffer;
use limosa_stream::{DATA_BYTES_MAX, Kind};

/// What is copied and sent at once: a whole frame. Larger ones are not allowed, and each costs the receiver a wake-up or
/// two, which weighs more than that this much no longer stays in the nearest cache.
const CHUNK_BYTES: u64 = DATA_BYTES_MAX as u64;

/// A run of dirty pages of one region.
#[derive(Clone, Copy)]
pub(crate) struct Chunk<'m> {
    region: &'m MemoryRegion<'m>,
    at: u64,
    bytes: u64,
}

/// The chunks that are still to be sent.
pub(crate) struct Chunks<I> {
    left: Option<I>,
}

impl<'m, I: Iterator<Item = Chunk<'m>>> Chunks<I> {
    fn next(&mut self) -> Option<Chunk<'m>> {
        let next = self.left.as_mut()?.next();
        if next.is_none() {
            self.left = None;
        }
        next
    }
}

/// No more are to be sent: one of the links has failed, and the others need not go on.
pub(crate) fn end<I>(chunks: &Monitor<Chunks<I>>) {
    chunks.lock().left = None;
    chunks.notify_all();
}

/// All that is dirty, in chunks.
pub(crate) fn chunks<'m>(
    regions: &'m [MemoryRegion<'m>],
    dirty: &'m [DirtyBitmap],
) -> Chunks<impl Iterator<Item = Chunk<'m>> + Send> {
    let all = regions.iter().zip(dirty).flat_map(|(region, dirty)| {
        dirty.runs().flat_map(move |(first, pages)| {
            let (begin, end) = (first * PAGE_BYTES, (first + pages) * PAGE_BYTES);
            let starts = (begin..end).step_by(CHUNK_BYTES as usize);
            starts.map(move |at| Chunk { region, at, bytes: CHUNK_BYTES.min(end - at) })
        })
    });
    Chunks { left: Some(all) }
}

/// Sends chunks over one link until none is left.
pub(crate) fn send<'m>(
    link: usize,
    chunks: &Monitor<Chunks<impl Iterator<Item = Chunk<'m>>>>,
    sending: &Sending<'_, '_>,
    recorder: &Recorder<'_>,
) -> Result<()> {
    let mut buffer = Buffer::new(recorder.buffers());
    let mut zeroes = Zeroes { link, sending, recorder, run: None };
    loop {
        let chunk = {
            let mut chunks_left = chunks.lock();
            // A link that is not worth its while waits until it is, or until all is taken.
            while chunks_left.left.is_some() && link >= sending.link_count.lock().used() {
                (chunks_left, _) = chunks.wait(chunks_left, None);
            }
            chunks_left.next()
        };
        if link == 0 && sending.link_count.lock().sent(recorder.totals().memory_bytes, now())
            || chunk.is_none()
        {
            // Whoever is about to wait does so first.
            drop(chunks.lock());
            chunks.notify_all();
        }
        let Some(Chunk { region, at, bytes }) = chunk else { break };
        let end = at + bytes;
        let mut from = at;
        // What is known for zeroes is not read, so that memory that was never touched stays so.
        while let Some(data) = region.data(from..end)? {
            zeroes.add(region.id, from, data.start - from)?;
            buffer.grow(CHUNK_BYTES as usize);
            let piece = &mut buffer[..(data.end - data.start) as usize];
            region.pages.read(data.start, piece).map_err(|error| region.failed(data.start, error))?;
            let mut offset = data.start;
            for run in (Runs { bytes: piece }) {
                if run.zero {
                    zeroes.add(region.id, offset, run.bytes.len() as u64)?;
                } else {
                    sending.send(link, Kind::MEMORY_DATA, region.id, offset, run.bytes)?;
                    recorder.memory_data(run.bytes.len() as u64);
                }
                offset += run.bytes.len() as u64;
            }
            from = data.end;
        }
        zeroes.add(region.id, from, end - from)?;
    }
    zeroes.flush()
}

/// Pages in a row that are zero, or are not.
struct Run<'b> {
    bytes: &'b [u8],
    zero: bool,
}

/// Splits pages into runs.
struct Runs<'b> {
    bytes: &'b [u8],
}

impl<'b> Iterator for Runs<'b> {
    type Item = Run<'b>;

    fn next(&mut self) -> Option<Run<'b>> {
        let mut pages = self.bytes.chunks(PAGE_BYTES as usize);
        let zero = is_zero(pages.next()?);
        let more = pages.take_while(|page| is_zero(page) == zero).count();
        let (bytes, rest) = self.bytes.split_at(((more + 1) * PAGE_BYTES as usize).min(self.bytes.len()));
        self.bytes = rest;
        Some(Run { bytes, zero })
    }
}

/// A run of zeroes that may go on.
struct Zeroes<'s, 'w, 'a> {
    link: usize,
    sending: &'s Sending<'w, 'a>,
    recorder: &'s Recorder<'a>,
    /// Region, offset and bytes.
    run: Option<(u32, u64, u64)>,
}

impl Zeroes<'_, '_, '_> {
    fn add(&mut self, region: u32, at: u64, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        if let Some((same, begin, length)) = &mut self.run
            && *same == region
            && *begin + *length == at
        {
            *length += bytes;
            return Ok(());
        }
        self.flush()?;
        self.run = Some((region, at, bytes));
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if let Some((region, at, bytes)) = self.run.take() {
            self.sending.send(self.link, Kind::MEMORY_ZERO, region, at, &bytes.to_le_bytes())?;
            self.recorder.memory_zero(bytes);
        }
        Ok(())
    }
}
