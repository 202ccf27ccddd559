//! [`SpaceLog`]: the log of dirty pages of an address space, as its user sees it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use limosa_client::dirty::{DirtySource, check};
use limosa_client::{Device, DirtyBits, Result};
use limosa_protocol::feature::DmaLoggingRange;

use super::intervals::Span;
use super::log::Log;
use super::{AddressSpace, Kind, State, usage};

/// The dirty pages of an address space, as far as the kernel logs them: what devices write through page tables with
/// dirty tracking (iommufd), or in pages that they have pinned, and everything for devices that can write everything
/// (type1 container). A device's own log is more exact.
///
/// A container never learns that a page is clean which a mediated device keeps pinned.
///
/// A report may cover any range. The kernel is asked for every mapping that the range touches, and dirty pages outside
/// the range are kept for the next report of them. So a report of whole mappings costs least.
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
    /// The log of this space, not started. A space can have one started log at a time.
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
        // Held, so that nobody starts before this is over.
        let mut state = self.space.inner.state();
        state.log.take().map_or(Ok(()), |log| log.stop(self.name()))
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
            return Err(usage(self.name(), "its dirty pages are already being logged for another caller"));
        }
        let log = Log::start(self.name(), inner.kind.log())?;
        let page_size = log.page_size();
        state.log = Some(log);
        *is_on = true;
        Ok(page_size)
    }

    fn report(&self, iova: u64, length: u64, page_size: u64, words: &mut [u64]) -> Result<()> {
        check(self.name(), iova, length, page_size, words)?;
        let is_on = self.is_on();
        let mut state = self.space.inner.state();
        match (&mut *state, Span::of(iova, length)) {
            (State { mappings, log: Some(log), .. }, Some(range)) if *is_on => {
                log.report(self.name(), mappings, range, &mut DirtyBits { page_size, words })
            }
            _ => Err(usage(self.name(), "its dirty pages are not being logged")),
        }
    }

    fn stop(&self) -> Result<()> {
        self.stop_now()
    }
}

impl Drop for SpaceLog {
    fn drop(&mut self) {
        if let Err(error) = self.stop_now() {
            tracing::warn!("dirty tracking stays on: {error}");
        }
    }
}
