//! Where snapshots of the simulation lie: a disk on which one appears under its name when it is published, and not
//! before; which is full, fails, alters what it keeps, or loses the answer to a publication.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use limosa_clockwork::{simulation, sleep};
use limosa_migrate::link::{LinkError, Wait};
use limosa_migrate::{
    Durability, MigrationId, Publication, SnapshotReader, SnapshotSource, SnapshotTarget, SnapshotWriter,
};

use crate::panics::panic_at;
use crate::plan::Mutation;

#[derive(Default)]
pub struct Disk {
    state: Arc<Mutex<State>>,
    mutation: Option<Mutation>,
}

#[derive(Default)]
struct State {
    published: Option<Vec<u8>>,
    /// What is written and has no name yet; what a saver that died left.
    partial: Vec<u8>,
    full: bool,
    /// The next request fails.
    fails: bool,
    /// The next request panics.
    panics: bool,
    /// The next publication fails, in one way or another.
    publication_fails: bool,
    /// A bit was altered in what it kept.
    altered: bool,
    /// What was written will never have a name.
    withdrawn: bool,
}

impl Disk {
    pub fn new(mutation: Option<Mutation>) -> Disk {
        Disk { state: Arc::default(), mutation }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Nothing more can be written.
    pub fn fill(&self) {
        self.state().full = true;
    }

    /// What is asked for next fails.
    pub fn fail(&self) {
        self.state().fails = true;
    }

    /// The next publication is refused, is not durable, or has no answer.
    pub fn fail_publication(&self) {
        self.state().publication_fails = true;
    }

    /// A bit of what it keeps flips.
    pub fn flip(&self, bit: u8) {
        let mut state = self.state();
        let State { published, partial, .. } = &mut *state;
        let bytes = published.as_mut().unwrap_or(partial);
        if !bytes.is_empty() {
            let at = simulation::random(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << bit;
            state.altered = true;
        }
    }

    /// There is room, and nothing fails.
    pub fn heal(&self) {
        let mut state = self.state();
        (state.full, state.fails, state.panics, state.publication_fails) = (false, false, false, false);
    }

    /// The next request panics.
    pub fn panic(&self) {
        self.state().panics = true;
    }

    pub fn has_published(&self) -> bool {
        self.state().published.is_some()
    }

    pub fn is_altered(&self) -> bool {
        self.state().altered
    }

    /// What a saver left without a name is given the snapshot's name, by somebody who knows no better; whether it is
    /// less than a whole one.
    pub fn name_what_is_left(&self) -> bool {
        let mut state = self.state();
        let partial = std::mem::take(&mut state.partial);
        // The last frame is a SEAL: its kind, and its payload of 40 bytes.
        let is_whole = partial.len() >= 72 && partial[partial.len() - 72..][..2] == 30_u16.to_le_bytes();
        state.published = Some(partial);
        !is_whole
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// It takes a while, in which much can happen.
fn turn(wait: Wait<'_>) -> Result<(), LinkError> {
    if simulation::random(2) == 0 {
        sleep(Duration::from_micros(1 + simulation::random(2_000)));
    }
    if simulation::crashing() {
        return Err(LinkError::Closed);
    }
    wait.left().map(drop)
}

fn fails(state: &mut State) -> Result<(), LinkError> {
    if std::mem::take(&mut state.panics) {
        panic_at("the disk");
    }
    match std::mem::take(&mut state.fails) {
        true => Err(io::Error::other("the disk does not answer").into()),
        false => Ok(()),
    }
}

struct Writer {
    state: Arc<Mutex<State>>,
    mutation: Option<Mutation>,
    published: bool,
    /// What has no name stays, as when the saver does not know whether it has one.
    keeps_partial: bool,
}

impl SnapshotTarget for Disk {
    fn name(&self) -> String {
        "the disk".into()
    }

    fn create(&self, wait: Wait<'_>) -> Result<Box<dyn SnapshotWriter>, LinkError> {
        turn(wait)?;
        let mut state = self.state();
        fails(&mut state)?;
        state.partial.clear();
        let (state, mutation) = (self.state.clone(), self.mutation);
        Ok(Box::new(Writer { state, mutation, published: false, keeps_partial: false }))
    }
}

impl SnapshotWriter for Writer {
    fn write(&mut self, bytes: &[u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        turn(wait)?;
        let mut state = lock(&self.state);
        fails(&mut state)?;
        if state.full {
            return Err(io::Error::from(io::ErrorKind::StorageFull).into());
        }
        let taken = 1 + simulation::random(bytes.len() as u64) as usize;
        state.partial.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn publish(mut self: Box<Self>, wait: Wait<'_>) -> Publication {
        if let Err(why) = turn(wait) {
            return Publication::NotPublished(why);
        }
        let mut state = lock(&self.state);
        if std::mem::take(&mut state.publication_fails) {
            state.fails = true;
        }
        let fate = match fails(&mut state) {
            Ok(()) => Fate::Answered,
            Err(why) => match simulation::random(4) {
                0 => return Publication::NotPublished(why),
                1 => Fate::SyncFails(why),
                2 => Fate::AnswerLost(why),
                _ => {
                    // The request is lost, so what was written stays without a name.
                    self.keeps_partial = true;
                    return Publication::Unknown(why);
                }
            },
        };
        state.published = Some(std::mem::take(&mut state.partial));
        drop(state);
        self.published = true;
        // It is there, and the saver does not know yet.
        if simulation::random(2) == 0 {
            sleep(Duration::from_micros(1));
        }
        match fate {
            Fate::Answered => Publication::Published { durability: Durability::Durable },
            Fate::SyncFails(why) => {
                Publication::Published { durability: Durability::Unknown(io::Error::other(why)) }
            }
            Fate::AnswerLost(why) => Publication::Unknown(why),
        }
    }
}

/// What becomes of a publication that is carried out.
enum Fate {
    Answered,
    /// The folder could not be synchronized.
    SyncFails(LinkError),
    AnswerLost(LinkError),
}

impl Drop for Writer {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        if self.mutation == Some(Mutation::PublishesPartial) && !self.published {
            state.published = Some(std::mem::take(&mut state.partial));
        }
        // What a process or a thread leaves that died stays.
        if !simulation::crashing() && !std::thread::panicking() && !self.keeps_partial {
            state.partial.clear();
        }
    }
}

struct Reader {
    state: Arc<Mutex<State>>,
    at: usize,
}

impl SnapshotSource for Disk {
    fn name(&self) -> String {
        "the disk".into()
    }

    fn open(&self, wait: Wait<'_>) -> Result<Box<dyn SnapshotReader>, LinkError> {
        turn(wait)?;
        let mut state = self.state();
        fails(&mut state)?;
        match &state.published {
            Some(_) => Ok(Box::new(Reader { state: self.state.clone(), at: 0 })),
            None => Err(io::Error::from(io::ErrorKind::NotFound).into()),
        }
    }

    fn withdraw(&self, _: MigrationId, wait: Wait<'_>) -> Result<bool, LinkError> {
        turn(wait)?;
        let mut state = self.state();
        fails(&mut state)?;
        // What has no name will never get one.
        state.withdrawn |= !std::mem::take(&mut state.partial).is_empty();
        Ok(state.withdrawn)
    }
}

impl SnapshotReader for Reader {
    fn read(&mut self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        turn(wait)?;
        let mut state = lock(&self.state);
        fails(&mut state)?;
        let Some(published) = &state.published else { return Err(LinkError::Closed) };
        let rest = &published[self.at..];
        let most = rest.len().min(into.len());
        let bytes = most.min(1 + simulation::random(2 * most as u64) as usize);
        into[..bytes].copy_from_slice(&rest[..bytes]);
        self.at += bytes;
        Ok(bytes)
    }

    fn rewind(&mut self, wait: Wait<'_>) -> Result<(), LinkError> {
        turn(wait)?;
        fails(&mut lock(&self.state))?;
        self.at = 0;
        Ok(())
    }
}
