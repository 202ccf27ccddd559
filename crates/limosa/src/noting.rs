//! [`Noting`]: the notes that a move or a save leaves on its source, so that `limosa resolve` finds everything that is
//! stopped, however this process ends.

use std::fs::File;
use std::sync::{Mutex, MutexGuard, PoisonError};

use limosa_client::DeviceExt;
use limosa_migrate::{CommitNote, PrivateFolder};
use limosa_stream::MigrationId;
use serde::Serialize;

use crate::endpoint::Endpoint;
use crate::exit::Code;
use crate::loaded::Load;
use crate::moved::Moved;
use crate::moves::{DOUBT, Doubt, Halted, Known, Moves, STOP, Stop, failed, hint};
use crate::open;
use crate::process::{Stopped, boot_id};

/// Where a move or a save goes.
#[derive(Clone, Debug)]
pub enum Target {
    /// A destination at this address.
    Address { address: String, tls: bool },
    /// The place of a snapshot.
    Snapshot(String),
    /// Devices on this machine, whose destination is in this process. Nothing depends on `load`.
    Here { to: String, load: Option<Box<Load>> },
}

/// The devices of an endpoint, as they are noted.
pub fn devices_of(endpoint: &Endpoint) -> anyhow::Result<Halted> {
    // The engine refuses a device that does not return its state.
    let known = endpoint.devices().iter();
    let known = known.map(|device| Known::new(open::identity(device.given()), device.state().ok()));
    let known = known.collect();
    let devices = endpoint.devices().iter().map(|device| open::lasting_name(device.given()));
    let devices = devices.collect::<std::io::Result<_>>()?;
    Ok(Halted::of(devices, known, Some(boot_id()?)))
}

impl Doubt {
    /// The note of this move when it is done.
    pub fn moved(&self) -> Moved {
        let halted = Halted { stopped: Vec::new(), on_stop: None, ..self.halted.clone() };
        Moved { id: self.id.clone(), halted, to: self.to.clone(), saved: self.saved }
    }
}

/// The most bytes of a note that are about one stopped process.
const PROCESS_BYTES: usize = 256;
/// The most bytes of the other parts of a note: ids, a secret, a fingerprint and times.
const MORE_BYTES: usize = 2048;

/// The notes of one move or save.
pub struct Noting {
    moves: Moves,
    folder: PrivateFolder,
    halted: Halted,
    target: Target,
    /// The id of the note of the stop.
    stop: String,
    /// The existing notes, locked by this process.
    written: Mutex<Written>,
}

#[derive(Default)]
struct Written {
    stop: Option<File>,
    doubt: Option<(Doubt, File)>,
}

impl Noting {
    /// Opens the folder, and examines the devices. Nothing is noted yet.
    pub fn new(moves: &Moves, endpoint: &Endpoint, target: Target) -> anyhow::Result<Noting> {
        let (folder, halted) = (moves.open()?, devices_of(endpoint)?);
        let (stop, written) = (MigrationId::random()?.to_string(), Mutex::default());
        Ok(Noting { moves: moves.clone(), folder, halted, target, stop, written })
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks that there is room for the notes of this move, before anything is stopped: for that of the stop, and that of the
    /// commit, which replaces it.
    pub fn check_room(&self, processes: usize, on_stop: Option<&str>) -> anyhow::Result<()> {
        let (target, load) = match &self.target {
            Target::Address { address: to, .. } | Target::Snapshot(to) => (to, None),
            Target::Here { to, load } => (to, load.as_ref()),
        };
        let text = serde_json::to_vec(&(&self.halted, target, load, on_stop))?;
        let bytes = text.len() + processes * PROCESS_BYTES + MORE_BYTES;
        self.folder.check_room(2, bytes).map_err(|error| failed(Code::Unreachable, &error))
    }

    /// Notes what is about to be stopped.
    pub fn stopping(&self, stopped: Vec<Stopped>, on_stop: Option<&str>) -> Result<(), String> {
        let note = Stop { id: self.stop.clone(), halted: self.halted(stopped, on_stop) };
        let file = self.write(&format!("{}{STOP}", self.stop), &note)?;
        self.written().stop = Some(file);
        Ok(())
    }

    /// Notes a move that is about to be committed.
    pub fn committing(
        &self,
        commit: &CommitNote,
        stopped: Vec<Stopped>,
        on_stop: Option<&str>,
    ) -> Result<(), String> {
        let mut written = self.written();
        let (saved, here) =
            (matches!(self.target, Target::Snapshot(_)), matches!(self.target, Target::Here { .. }));
        let (to, tls, load) = match &self.target {
            Target::Address { address, tls } => (address.clone(), *tls, None),
            Target::Snapshot(location) => (location.clone(), false, None),
            Target::Here { to, load } => (to.clone(), false, load.clone()),
        };
        let stop = written.stop.is_some().then(|| self.stop.clone());
        let halted = self.halted(stopped, on_stop);
        let (id, secret, peer) = (commit.id.to_string(), commit.secret.clone(), commit.peer);
        let name = format!("{id}{DOUBT}");
        let note = Doubt { id, secret, peer, halted, to, saved, here, tls, stop, load };
        let file = self.write(&name, &note)?;
        written.doubt = Some((note, file));
        // This note replaces the other one, also if that cannot be removed.
        self.forget_stop(&mut written);
        Ok(())
    }

    /// Everything that was stopped before the commit has been resumed.
    pub fn goes_on(&self) {
        self.forget_stop(&mut self.written());
    }

    /// The outcome of the move is known, and everything that should run has been resumed. Notes a move that is done.
    pub fn settled(&self, is_moved: bool) {
        let mut written = self.written();
        self.forget_stop(&mut written);
        if let Some((note, _locked)) = written.doubt.take() {
            if is_moved {
                self.moves.remember(&note.moved());
            }
            self.remove(&format!("{}{DOUBT}", note.id));
        }
    }

    fn forget_stop(&self, written: &mut Written) {
        if written.stop.take().is_some() {
            self.remove(&format!("{}{STOP}", self.stop));
        }
    }

    fn remove(&self, name: &str) {
        if let Err(error) = self.folder.remove(name) {
            tracing::warn!("the note of something that is settled is left: {error}");
        }
    }

    fn halted(&self, stopped: Vec<Stopped>, on_stop: Option<&str>) -> Halted {
        Halted { stopped, on_stop: on_stop.map(str::to_owned), ..self.halted.clone() }.now()
    }

    fn write(&self, name: &str, note: &impl Serialize) -> Result<File, String> {
        let bytes = serde_json::to_vec(note).map_err(|error| error.to_string())?;
        let written = self.folder.write(name, &bytes);
        written.map_err(|error| format!("it cannot be noted: {error}; {}", hint(&error)))
    }
}
