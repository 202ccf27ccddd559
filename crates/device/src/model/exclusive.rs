//! [`Exclusive`]: a [`SimpleModel`] as a [`Model`], by a mutex.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::{Errno, MigrationFlags};

use super::{Description, Fault, Migration, Model, Save, SimpleMigration, SimpleModel};
use crate::Bus;

/// A simple model, which gets one call at a time. After a panic, all calls except the reset are refused with EIO.
#[derive(Debug)]
pub struct Exclusive<M> {
    model: Mutex<M>,
    has_migration: bool,
}

impl<M: SimpleModel> Exclusive<M> {
    /// The model.
    pub fn new(mut model: M) -> Exclusive<M> {
        let has_migration = model.migration().is_some();
        Exclusive { model: Mutex::new(model), has_migration }
    }

    /// EIO for a poisoned mutex: a panic has left its model inconsistent.
    fn lock(&self) -> Result<MutexGuard<'_, M>, Errno> {
        self.model.lock().map_err(|_| Errno::EIO)
    }

    fn migrate<R>(&self, call: impl FnOnce(&mut dyn SimpleMigration) -> R) -> Result<R, Errno> {
        let mut model = self.lock()?;
        model.migration().map(call).ok_or_else(|| {
            tracing::error!("the model had a migration and no longer has one");
            Errno::EIO
        })
    }

    fn arc(&self, call: impl FnOnce(&mut dyn SimpleMigration) -> Result<(), Fault>) -> Result<(), Fault> {
        self.migrate(call).map_err(Fault::Broken)?
    }
}

impl<M: SimpleModel> Model for Exclusive<M> {
    fn description(&self) -> Description {
        self.model.lock().unwrap_or_else(PoisonError::into_inner).description()
    }

    fn attach(&self, bus: Bus) {
        self.model.lock().unwrap_or_else(PoisonError::into_inner).attach(bus);
    }

    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.lock()?.region_read(region, offset, data)
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.lock()?.region_write(region, offset, data)
    }

    fn reset(&self) -> Result<(), Errno> {
        self.model.clear_poison();
        self.lock()?.reset()
    }

    fn rewired(&self, index: u32) {
        if let Ok(mut model) = self.lock() {
            model.rewired(index);
        }
    }

    fn client_gone(&self) {
        if let Ok(mut model) = self.lock() {
            model.client_gone();
        }
    }

    fn region_file(&self, region: u32) -> Option<Arc<OwnedFd>> {
        self.lock().ok()?.region_file(region)
    }

    fn adopts_region_files(&self) -> bool {
        self.lock().is_ok_and(|model| model.adopts_region_files())
    }

    fn adopt_region_file(&self, region: u32, file: Arc<OwnedFd>) -> Result<(), Errno> {
        self.lock()?.adopt_region_file(region, file)
    }

    fn adopts_ioeventfds(&self) -> bool {
        self.lock().is_ok_and(|model| model.adopts_ioeventfds())
    }

    fn adopt_ioeventfds(&self, region: u32, fds: Vec<Arc<OwnedFd>>) -> Result<(), Errno> {
        self.lock()?.adopt_ioeventfds(region, fds)
    }

    fn migration(&self) -> Option<&dyn Migration> {
        self.has_migration.then_some(self)
    }
}

impl<M: SimpleModel> Migration for Exclusive<M> {
    fn flags(&self) -> MigrationFlags {
        self.migrate(|migration| migration.flags()).unwrap_or(MigrationFlags::empty())
    }

    fn quiesce_p2p(&self) -> Result<(), Fault> {
        self.arc(|migration| migration.quiesce_p2p())
    }

    fn resume_p2p(&self) -> Result<(), Fault> {
        self.arc(|migration| migration.resume_p2p())
    }

    fn stop(&self, until: Instant) -> Result<(), Fault> {
        self.arc(|migration| migration.stop_until(until))
    }

    fn start(&self) -> Result<(), Fault> {
        self.arc(|migration| migration.start())
    }

    fn save_begin(&self) -> Result<(), Fault> {
        self.arc(|migration| migration.save_begin())
    }

    fn save(&self, bytes_max: usize, stopped: bool, take: &mut dyn FnMut(Save<'_>)) -> Result<(), Errno> {
        self.migrate(|migration| migration.save(bytes_max, stopped).map(take))?
    }

    fn save_final(&self) -> Result<(), Fault> {
        self.arc(|migration| migration.save_final())
    }

    fn save_end(&self) {
        // The next call to a model that panicked is its reset.
        let _ = self.migrate(|migration| migration.save_end());
    }

    fn has_precopy_reinit(&self) -> bool {
        self.migrate(|migration| migration.has_precopy_reinit()).unwrap_or(false)
    }

    fn precopy_info(&self, reinit: bool) -> PrecopyInfo {
        self.migrate(|migration| migration.precopy_info(reinit)).unwrap_or_default()
    }

    fn data_size(&self) -> u64 {
        self.migrate(|migration| migration.data_size()).unwrap_or(0)
    }

    fn load_begin(&self) -> Result<(), Fault> {
        self.arc(|migration| migration.load_begin())
    }

    fn load(&self, chunk: &[u8]) -> Result<(), Errno> {
        self.migrate(|migration| migration.load(chunk))?
    }

    fn load_into(
        &self,
        bytes_max: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> usize,
    ) -> Option<Result<(), Errno>> {
        let filled = self.migrate(|migration| {
            let space = migration.load_space(bytes_max).filter(|space| !space.is_empty())?;
            let bytes = space.len().min(bytes_max);
            match fill(&mut space[..bytes]) {
                0 => Some(Ok(())),
                filled => Some(migration.load_filled(filled)),
            }
        });
        filled.unwrap_or_else(|errno| Some(Err(errno)))
    }

    fn load_finish(&self) -> Result<(), Fault> {
        self.arc(|migration| migration.load_finish())
    }

    fn load_abort(&self) {
        let _ = self.migrate(|migration| migration.load_abort());
    }
}
