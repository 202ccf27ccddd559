//! [`SpaceLog`]: the dirty pages that an address space logs for all of its devices, and those that are unmapped
//! meanwhile.

use std::sync::{Mutex, MutexGuard, PoisonError};

use limosa_client::dirty::{DirtySource, check};
use limosa_client::{Device, DirtyBits, Result};
use limosa_protocol::bitmap::{Grid, regranulate, runs, set_range, words_for};
use limosa_protocol::feature::DmaLoggingRange;

use super::container::Limits;
use super::intervals::Intervals;
use super::iommufd::PAGE_SIZE;
use super::{AddressSpace, Inner, Kind, State, usage};

/// So many pages are asked of iommufd at once; it knows no limit of its own.
const CHUNK_PAGES: u64 = 1 << 22;
/// Mappings that are farther apart are asked for one by one.
const GAP_BYTES_MAX: u64 = 64 << 20;

/// What a space keeps while it logs.
#[derive(Debug)]
pub(super) struct Log {
    /// Pages that were dirty when they were unmapped, or when a report of their neighbours cleared them.
    pub collected: Intervals,
    /// Of the container's bitmaps; those of iommufd have [`PAGE_SIZE`].
    limits: Limits,
}

/// The dirty pages of an address space, as far as the kernel logs them: what devices write through page tables with
/// dirty tracking (iommufd), or in pages that they have pinned, and everything for devices that can write everything
/// (type1 container). A device that logs itself tells more exactly.
///
/// Of a page that a mediated device keeps pinned a container never knows that it is clean.
///
/// Memory is best unmapped through its [`AddressSpace`]: what was written there comes out of the next report. With
/// iommufd, whatever a device writes *while* its memory is being unmapped may be missed: the kernel has no way to
/// unmap and read at once.
#[derive(Debug)]
pub struct SpaceLog {
    space: AddressSpace,
    is_on: Mutex<bool>,
}

impl AddressSpace {
    /// The log of this space, off. A space has one that is on at a time.
    ///
    /// ```no_run
    /// use limosa_client::DirtySource;
    /// use limosa_vfio_kernel::{KernelDevice, Options};
    ///
    /// let device = KernelDevice::open("0000:65:00.1", &Options::default())?;
    /// let log = device.address_space().expect("one of its own").dirty_log();
    /// let (iova, bytes) = (0, 1 << 30);
    /// log.start(4096, &[])?;
    /// // ... the device writes ...
    /// let mut words = vec![0; bytes / 4096 / 64];
    /// if let Err(error) = log.report(iova, bytes as u64, 4096, &mut words) {
    ///     eprintln!("{error}: all is dirty");
    ///     words.fill(!0);
    /// }
    /// log.stop()?;
    /// # Ok::<(), limosa_client::Error>(())
    /// ```
    pub fn dirty_log(&self) -> SpaceLog {
        SpaceLog { space: self.clone(), is_on: Mutex::new(false) }
    }
}

impl SpaceLog {
    fn is_on(&self) -> MutexGuard<'_, bool> {
        self.is_on.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop_now(&self) -> Result<()> {
        let mut is_on = self.is_on();
        if !std::mem::take(&mut *is_on) {
            return Ok(());
        }
        let inner = &self.space.inner;
        // Held, so that nobody starts before this is over.
        let mut state = inner.state();
        state.log = None;
        match &inner.kind {
            Kind::Iommufd(iommufd) => iommufd.set_tracking(self.name(), false),
            Kind::Container(container) => container.stop_dirty(self.name()),
        }
    }
}

impl DirtySource for SpaceLog {
    fn name(&self) -> &str {
        match self.space.inner.kind {
            Kind::Iommufd(_) => "iommufd",
            Kind::Container(_) => "container",
        }
    }

    fn sees(&self, device: &dyn Device) -> bool {
        let state = self.space.inner.state();
        device.identity().is_some_and(|device| state.devices.get(&device) == Some(&true))
    }

    /// Logs the whole space.
    fn start(&self, _: u64, _: &[DmaLoggingRange]) -> Result<u64> {
        let mut is_on = self.is_on();
        let inner = &self.space.inner;
        let mut state = inner.state();
        if state.log.is_some() {
            return Err(usage(self.name(), "its dirty pages are being logged for somebody else"));
        }
        let limits = match &inner.kind {
            Kind::Iommufd(iommufd) => {
                iommufd.set_tracking(self.name(), true)?;
                Limits { page_size: PAGE_SIZE, pages_max: CHUNK_PAGES }
            }
            Kind::Container(container) => container.start_dirty(self.name())?,
        };
        state.log = Some(Log { collected: Intervals::default(), limits });
        *is_on = true;
        Ok(limits.page_size)
    }

    fn report(&self, iova: u64, length: u64, page_size: u64, words: &mut [u64]) -> Result<()> {
        check(self.name(), iova, length, page_size, words)?;
        if !*self.is_on() {
            return Err(usage(self.name(), "its dirty pages are not being logged"));
        }
        let mut bits = DirtyBits { page_size, words };
        self.space.inner.report(self.name(), iova, length, &mut bits)
    }

    fn stop(&self) -> Result<()> {
        self.stop_now()
    }
}

impl Drop for SpaceLog {
    fn drop(&mut self) {
        if let Err(error) = self.stop_now() {
            tracing::warn!("dirty tracking goes on: {error}");
        }
    }
}

impl Inner {
    fn report(&self, name: &str, iova: u64, length: u64, into: &mut DirtyBits<'_>) -> Result<()> {
        let mut state = self.state();
        let State { mappings, log, .. } = &mut *state;
        let Some(log) = log else { return Ok(()) };
        let last = iova + (length - 1);
        for (from, to) in log.collected.take(iova, last) {
            set(into, iova, from, to);
        }
        let known = mappings.touching(iova, length).map(|mapping| (mapping.iova, mapping.size));
        match &self.kind {
            Kind::Iommufd(iommufd) => {
                let parts = if iommufd.is_ours() {
                    parts(known, (iova, last))
                } else {
                    iommufd.mapped(name, iova, length)?
                };
                for (part, bytes) in chunks(&parts) {
                    let mut found = vec![0; words_for(bytes.div_ceil(PAGE_SIZE))];
                    iommufd.read_dirty(name, part, bytes, false, &mut found)?;
                    let (from, to) = grids(part, PAGE_SIZE, iova, into);
                    regranulate(&found, from, into.words, to, part, bytes);
                }
            }
            Kind::Container(container) => {
                let limits = log.limits;
                let pieces = if container.is_ours() {
                    pieces(known, limits)
                } else {
                    // Whoever has mapped this knows where a range may end.
                    vec![(iova, length)]
                };
                for (piece, bytes) in pieces {
                    let found = container.read_dirty(name, piece, bytes, limits)?;
                    let first = piece.max(iova);
                    let (from, to) = grids(piece, limits.page_size, iova, into);
                    let inside = (piece + (bytes - 1)).min(last) - first + 1;
                    regranulate(&found, from, into.words, to, first, inside);
                    // What lies beside the range is clean for the kernel now, and for nobody else.
                    for (from, to) in addresses(&found, piece, bytes, limits.page_size) {
                        if from < iova {
                            log.collected.add(from, to.min(iova - 1));
                        }
                        if to > last {
                            log.collected.add(from.max(last + 1), to);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Unmaps memory while the log is on, and keeps what was written there for the next report. What cannot be
    /// told is dirty.
    pub(super) fn unmap_logged(
        &self,
        name: &str,
        (iova, size): (u64, u64),
        state: &mut State,
        dirty: Option<DirtyBits<'_>>,
    ) -> Result<()> {
        let State { mappings, log: Some(log), .. } = state else { return Ok(()) };
        let known: Vec<_> =
            mappings.touching(iova, size).map(|mapping| (mapping.iova, mapping.size)).collect();
        let last = iova + (size - 1);
        let mut found = Intervals::default();
        match &self.kind {
            Kind::Iommufd(iommufd) => {
                let parts = if iommufd.is_ours() {
                    Ok(parts(known.into_iter(), (iova, last)))
                } else {
                    iommufd.mapped(name, iova, size)
                };
                let read = parts.and_then(|parts| {
                    for (part, bytes) in chunks(&parts) {
                        let mut words = vec![0; words_for(bytes.div_ceil(PAGE_SIZE))];
                        iommufd.read_dirty(name, part, bytes, true, &mut words)?;
                        for (from, to) in addresses(&words, part, bytes, PAGE_SIZE) {
                            found.add(from, to);
                        }
                    }
                    Ok(())
                });
                if let Err(error) = read {
                    tracing::warn!("{name}: the dirty log of unmapped memory is lost, all is dirty: {error}");
                    found.add(iova, last);
                }
                iommufd.unmap(name, iova, size)?;
                mappings.remove(iova, size);
            }
            // It has lost its last device, and with it its IOMMU and the log.
            Kind::Container(container) if !container.is_set() => {
                mappings.check_whole(name, iova, size)?;
                found.add(iova, last);
                mappings.remove(iova, size);
            }
            Kind::Container(container) => {
                let limits = log.limits;
                let pieces = match container.is_ours() {
                    true => pieces(known.into_iter(), limits),
                    false => vec![(iova, size)],
                };
                let unmapped = pieces.into_iter().try_for_each(|(piece, bytes)| {
                    match container.unmap_dirty(name, piece, bytes, limits) {
                        Ok(words) => {
                            for (from, to) in addresses(&words, piece, bytes, limits.page_size) {
                                found.add(from, to);
                            }
                        }
                        Err(error) => {
                            container.unmap(name, piece, bytes)?;
                            tracing::warn!("{name}: all of what is unmapped is taken as dirty: {error}");
                            found.add(piece, piece + (bytes - 1));
                        }
                    }
                    mappings.remove(piece, bytes);
                    Ok(())
                });
                if let Err(error) = unmapped {
                    for (from, to) in found.take(0, u64::MAX) {
                        log.collected.add(from, to);
                    }
                    return Err(error);
                }
            }
        }
        let found = found.take(iova, last);
        found.iter().for_each(|(from, to)| log.collected.add(*from, *to));
        if let Some(mut dirty) = dirty {
            found.iter().for_each(|(from, to)| set(&mut dirty, iova, *from, *to));
        }
        Ok(())
    }
}

/// Sets the pages of a report from `iova` on that have a byte in `from..=to`.
fn set(bits: &mut DirtyBits<'_>, iova: u64, from: u64, to: u64) {
    let (first, last) = ((from - iova) / bits.page_size, (to - iova) / bits.page_size);
    set_range(bits.words, first, last - first + 1);
}

/// The grids of what was read and of a report.
fn grids(read: u64, read_page_size: u64, iova: u64, into: &DirtyBits<'_>) -> (Grid, Grid) {
    (Grid { iova: read, page_size: read_page_size }, Grid { iova, page_size: into.page_size })
}

/// The addresses, as (first, last), of the pages that are set in a bitmap of a range.
fn addresses(words: &[u64], iova: u64, bytes: u64, page_size: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
    let last = iova + (bytes - 1);
    // The kernel may have set bits beyond the range.
    let within = runs(words).map(move |(page, pages)| (page * page_size, pages * page_size));
    within
        .take_while(move |(offset, _)| *offset < bytes)
        .map(move |(offset, length)| (iova + offset, (iova + offset).saturating_add(length - 1).min(last)))
}

/// The parts of a range that are mapped, those that touch as one. `range` is (first, last).
fn parts(mapped: impl Iterator<Item = (u64, u64)>, range: (u64, u64)) -> Vec<(u64, u64)> {
    let mut parts: Vec<(u64, u64)> = Vec::new();
    for (iova, size) in mapped {
        let (first, last) = (iova.max(range.0), (iova + (size - 1)).min(range.1));
        match parts.last_mut() {
            Some(part) if part.0 + part.1 == first => part.1 += last - first + 1,
            _ => parts.push((first, last - first + 1)),
        }
    }
    parts
}

/// Parts of which none has more than [`CHUNK_PAGES`] pages.
fn chunks(parts: &[(u64, u64)]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let chunk = CHUNK_PAGES * PAGE_SIZE;
    parts.iter().flat_map(move |&(iova, size)| {
        (0..size.div_ceil(chunk)).map(move |at| (iova + at * chunk, (size - at * chunk).min(chunk)))
    })
}

/// Pieces that have every mapping whole, as (first address, bytes): neighbours together, as many as fit into one
/// bitmap.
fn pieces(mapped: impl Iterator<Item = (u64, u64)>, limits: Limits) -> Vec<(u64, u64)> {
    let mut pieces: Vec<(u64, u64)> = Vec::new();
    for (iova, size) in mapped {
        let last = iova + (size - 1);
        if let Some(piece) = pieces.last_mut() {
            let gap = iova - (piece.0 + (piece.1 - 1));
            let bytes = (last - piece.0).saturating_add(1);
            if gap <= GAP_BYTES_MAX && bytes.div_ceil(limits.page_size) <= limits.pages_max {
                piece.1 = bytes;
                continue;
            }
        }
        pieces.push((iova, size));
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn pieces_of(mapped: &[(u64, u64)], pages_max: u64) -> Vec<(u64, u64)> {
        pieces(mapped.iter().copied(), Limits { page_size: PAGE, pages_max })
    }

    #[test]
    fn bitmaps_end_where_mappings_do_and_have_no_more_pages_than_the_kernel_takes() {
        let four = [(0, 4 * PAGE), (4 * PAGE, 4 * PAGE), (10 * PAGE, 2 * PAGE), (12 * PAGE, PAGE)];
        assert_eq!(pieces_of(&four, 13), [(0, 13 * PAGE)]);
        assert_eq!(pieces_of(&four, 12), [(0, 12 * PAGE), (12 * PAGE, PAGE)]);
        assert_eq!(pieces_of(&four, 8), [(0, 8 * PAGE), (10 * PAGE, 3 * PAGE)]);
        assert_eq!(pieces_of(&four, 4), [(0, 4 * PAGE), (4 * PAGE, 4 * PAGE), (10 * PAGE, 3 * PAGE)]);
        assert_eq!(pieces_of(&[], 4), []);
    }

    #[test]
    fn mappings_far_apart_are_asked_for_one_by_one() {
        let far = [(0, PAGE), (1 << 40, PAGE), (u64::MAX - PAGE + 1, PAGE)];
        assert_eq!(pieces_of(&far, u64::MAX), far);
    }

    #[test]
    fn parts_are_what_is_mapped_of_a_range() {
        let mapped = [(0, 4 * PAGE), (4 * PAGE, 4 * PAGE), (10 * PAGE, 2 * PAGE)];
        let parts = |first, last| parts(mapped.into_iter(), (first, last));
        assert_eq!(parts(0, u64::MAX), [(0, 8 * PAGE), (10 * PAGE, 2 * PAGE)]);
        assert_eq!(parts(2 * PAGE, 11 * PAGE - 1), [(2 * PAGE, 6 * PAGE), (10 * PAGE, PAGE)]);
    }

    #[test]
    fn chunks_cover_their_parts() {
        let chunk = CHUNK_PAGES * PAGE;
        let parts = [(0, chunk), (1 << 50, 2 * chunk + PAGE)];
        let chunks: Vec<_> = chunks(&parts).collect();
        assert_eq!(
            chunks,
            [(0, chunk), (1 << 50, chunk), ((1 << 50) + chunk, chunk), ((1 << 50) + 2 * chunk, PAGE)]
        );
    }

    #[test]
    fn addresses_of_pages_end_with_the_range() {
        let found: Vec<_> = addresses(&[0b1011_0110], 0x1000, 6 * PAGE, PAGE).collect();
        assert_eq!(found, [(0x2000, 0x3fff), (0x5000, 0x6fff)]);
        let found: Vec<_> = addresses(&[!0], u64::MAX - PAGE + 1, PAGE, PAGE).collect();
        assert_eq!(found, [(u64::MAX - PAGE + 1, u64::MAX)]);
    }
}
