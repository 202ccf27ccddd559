//! The old server's side.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use limosa_host::{Group, SocketAccess};
use limosa_switch_over::{Giver, Item, Refusal};

use super::offer::offer_of;
use super::outgoing::Outgoing;
use super::record::{self, Offer, copy, encode, kind};
use super::signals;
use super::workers::Workers;
use super::{ANSWER_LIMIT, DEVICES_MAX, STOP_LIMIT};
use crate::server::{Door, Server};

/// The servers of a process, which are handed over to another process together. Each has to be created with
/// [`Options::interruptible`](crate::server::Options::interruptible); one that was not is refused by that name.
pub struct SwitchOver<'a> {
    servers: &'a [Server],
    state: Mutex<State>,
}

impl std::fmt::Debug for SwitchOver<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SwitchOver").field("servers", &self.servers).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct State {
    devices: Vec<Outgoing>,
    workers: Workers,
    /// The devices have been stopped, and their state read, by then.
    until: Option<Instant>,
}

impl<'a> SwitchOver<'a> {
    /// For these servers.
    pub fn new(servers: &'a [Server]) -> SwitchOver<'a> {
        SwitchOver { servers, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A refusal that names its device by its socket.
    fn named(&self, refusal: Refusal) -> Refusal {
        let server = refusal.device.and_then(|device| self.servers.get(device as usize));
        match server.and_then(Server::socket) {
            Some(socket) => super::named(&socket, refusal),
            None => refusal,
        }
    }

    fn numbered(&self) -> impl Iterator<Item = (u16, &Server)> {
        (0..).zip(self.servers)
    }
}

impl Giver for SwitchOver<'_> {
    fn offer(&self) -> Result<Vec<Item>, Refusal> {
        self.offered().map_err(|refusal| self.named(refusal))
    }

    fn prepare(&self) -> Result<Vec<Item>, Refusal> {
        self.prepared().map_err(|refusal| self.named(refusal))
    }

    fn prepare_more(&self) -> Result<Option<Vec<Item>>, Refusal> {
        self.prepared_more().map_err(|refusal| self.named(refusal))
    }

    fn freeze(&self, until: Instant) -> Result<(), Refusal> {
        self.frozen(until).map_err(|refusal| self.named(refusal))
    }

    fn rest(&self) -> Result<Vec<Item>, Refusal> {
        self.left().map_err(|refusal| self.named(refusal))
    }

    fn thaw(&self) {
        let State { devices, .. } = std::mem::take(&mut *self.lock());
        for outgoing in devices {
            let doors = Arc::clone(&outgoing.doors);
            outgoing.thaw();
            doors.go_on();
        }
        // Late devices continue when their work is done. Their clients wait for that as for every call on a device.
        self.servers.iter().for_each(|server| server.doors.go_on());
    }

    fn given(&self) {
        // Its threads end.
        self.lock().workers = Workers::default();
        for server in self.servers {
            let control = server.control.as_ref();
            for door in std::iter::once(&server.door).chain(control) {
                if let Some(path) = door.path.lock().unwrap_or_else(PoisonError::into_inner).take() {
                    path.leave();
                }
            }
            server.doors.give();
            // Its thread that accepts looks at who serves.
            server.shutdown.shut_down();
        }
    }
}

impl SwitchOver<'_> {
    fn offered(&self) -> Result<Vec<Item>, Refusal> {
        if self.servers.len() > DEVICES_MAX {
            let count = self.servers.len();
            return Err(Refusal::new(format!("it has {count} devices; expected {DEVICES_MAX} at most")));
        }
        self.numbered()
            .map(|(device, server)| {
                check_next(device, server)?;
                check_interruptible(device, server)?;
                let description = server.machine.description();
                let flags = server.machine.migration_flags().ok_or_else(|| {
                    let what = "it has no migration, by which its state would go to the new server";
                    Refusal::of_device(device, what)
                })?;
                let has_client = !server.doors.to_be_given().is_empty();
                let (socket, model) = (server.socket(), server.options.model.clone());
                let offer = Offer { socket, has_client, model, ..offer_of(description, flags) };
                encode(kind::OFFER, device, &offer)
            })
            .collect()
    }

    fn prepared(&self) -> Result<Vec<Item>, Refusal> {
        let mut state = self.lock();
        let share = self.servers.len();
        state.workers = Workers::of_old(share);
        state.devices =
            self.numbered().map(|(device, server)| Outgoing::new(device, server, share)).collect();
        let mut items = Vec::new();
        for ((device, server), outgoing) in self.numbered().zip(&mut state.devices) {
            items.extend(outgoing.files.mappings(device, &server.machine.mappings().export())?);
            let SocketAccess { mode, group } = server.options.socket;
            let access = Some((mode, group.map(|Group(group)| group)));
            items.push(listener(device, false, &server.door, access)?);
            if let Some(door) = &server.control {
                items.push(listener(device, true, door, None)?);
            }
            items.extend(outgoing.sockets.more(device, &server.doors)?);
            items.extend(outgoing.regions.more(device, &server.machine)?);
            items.extend(outgoing.wires.more(device, server.machine.wiring())?);
            items.extend(signals::given(device, &server.machine)?);
            items.extend(outgoing.copy.begin(device, &server.machine)?);
        }
        Ok(items)
    }

    fn prepared_more(&self) -> Result<Option<Vec<Item>>, Refusal> {
        let mut state = self.lock();
        let mut items = Vec::new();
        for ((device, server), outgoing) in self.numbered().zip(&mut state.devices) {
            items.extend(outgoing.sockets.more(device, &server.doors)?);
            items.extend(outgoing.regions.more(device, &server.machine)?);
            items.extend(outgoing.wires.more(device, server.machine.wiring())?);
            items.extend(outgoing.copy.more(device, &server.machine)?);
        }
        if items.is_empty() {
            for ((device, server), outgoing) in self.numbered().zip(&mut state.devices) {
                outgoing.copy.make_room(device, &server.machine)?;
            }
            return Ok(None);
        }
        Ok(Some(items))
    }

    fn frozen(&self, until: Instant) -> Result<(), Refusal> {
        for server in self.servers {
            server.doors.begin_pause();
        }
        for (device, server) in self.numbered() {
            let busy = "a request is in progress that takes too long; try again when it is done";
            server.doors.await_pause(until).map_err(|_| Refusal::of_device(device, busy))?;
        }
        // From here on no client can connect or be named.
        self.numbered().try_for_each(|(device, server)| check_next(device, server))?;
        let stops_until = until.min(Instant::now() + STOP_LIMIT);
        let mut state = self.lock();
        state.until = Some(until);
        // Leave devices time to report after their limit.
        let waits_until = stops_until + ANSWER_LIMIT;
        let late = format!("it does not stop within {STOP_LIMIT:?}, and runs again once it has");
        state.work(waits_until, &late, move |outgoing| {
            let (device, machine) = (outgoing.device, &outgoing.machine);
            outgoing.frozen = Some(outgoing.copy.freeze(device, machine, stops_until)?);
            Ok(())
        })
    }

    fn left(&self) -> Result<Vec<Item>, Refusal> {
        let mut state = self.lock();
        let until = state.until.unwrap_or_else(Instant::now);
        let late = "its state cannot be read within the limit of a freeze";
        state.work(until, late, move |outgoing| {
            outgoing.items = outgoing.left(until)?;
            Ok(())
        })?;
        Ok(state.devices.iter_mut().flat_map(|outgoing| std::mem::take(&mut outgoing.items)).collect())
    }
}

impl State {
    /// Works on all devices in parallel, until then. The first refusal counts; a late device is refused as late,
    /// and removed from the list.
    fn work(
        &mut self,
        until: Instant,
        late: &str,
        work: impl Fn(&mut Outgoing) -> Result<(), Refusal> + Send + Sync + 'static,
    ) -> Result<(), Refusal> {
        let devices = std::mem::take(&mut self.devices);
        let work = move |outgoing: &mut Outgoing| {
            // A device that panicked has no other refusal.
            outgoing.outcome = Err(Refusal::of_device(outgoing.device, "the old server panicked"));
            outgoing.outcome = work(outgoing);
        };
        let done = self.workers.work(devices, until, work, Outgoing::thaw);
        let outcome = (0..).zip(&done).find_map(|(device, outgoing)| match outgoing {
            None => Some(Refusal::of_device(device, late)),
            Some(outgoing) => outgoing.outcome.clone().err(),
        });
        self.devices = done.into_iter().flatten().collect();
        outcome.map_or(Ok(()), Err)
    }
}

/// Refuses while a next VMM is named: its preparations cannot be handed over.
fn check_next(device: u16, server: &Server) -> Result<(), Refusal> {
    if !server.doors.expects_next() {
        return Ok(());
    }
    let (pid, _) = server.doors.named();
    let what = format!(
        "process {pid} is named as its next VMM; try again once that has the device, or take the name back (`limosa state \
         SOCKET next --nobody`)"
    );
    Err(Refusal::of_device(device, what))
}

/// Refuses a server whose connections cannot be stopped between two requests.
fn check_interruptible(device: u16, server: &Server) -> Result<(), Refusal> {
    if server.options.interruptible {
        return Ok(());
    }
    let what = "its server was made without `Options::interruptible`, and a connection that waits for a request could not be \
                handed over; make the server with `interruptible: true`";
    Err(Refusal::of_device(device, what))
}

fn listener(
    device: u16,
    control: bool,
    door: &Door,
    access: Option<(u32, Option<u32>)>,
) -> Result<Item, Refusal> {
    let path = door.path.lock().unwrap_or_else(PoisonError::into_inner);
    let path = path.as_ref().map(|path| (path.path().to_owned(), path.identity()));
    let item = encode(kind::LISTENER, device, &record::Listener { control, path, access })?;
    Ok(item.with_fds([copy(&*door.listener)?]))
}
