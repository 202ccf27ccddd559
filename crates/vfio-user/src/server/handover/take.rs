//! The new server's side: the assignment of its devices to those of the old server.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use limosa_device::Machine;
use limosa_host::SocketPath;
use limosa_switch_over::{Commit, Committed, Item, Refusal, Taker, Withdrawn};

use super::DEVICES_MAX;
use super::listener::CameListener;
use super::loading::{self, Stage, Task};
use super::new::New;
use super::offer::Offered;
use super::record::{self, broken, decode, kind};
use super::workers::Workers;
use crate::server::{Options, Server};

/// A device of a new server, and how to serve it.
pub struct NewDevice {
    /// The device, which has not been used yet.
    pub machine: Arc<Machine>,
    /// How to serve it.
    pub options: Options,
    /// The path to listen at. The device replaces the old server's device with this path; if there is none, it is
    /// served for the first time. Without a path it replaces the device with the same position in the old server.
    pub socket: Option<PathBuf>,
    /// The path to listen at for control clients, if it has a `socket`. A device that replaces another uses that
    /// one's control socket.
    pub control: Option<PathBuf>,
}

impl From<(Arc<Machine>, Options)> for NewDevice {
    fn from((machine, options): (Arc<Machine>, Options)) -> NewDevice {
        NewDevice { machine, options, socket: None, control: None }
    }
}

/// How long the new devices may take for a round, by default.
const ROUND_LIMIT: Duration = Duration::from_secs(60);

/// Devices that replace those of another process, all of them together.
///
/// A device is identified by its socket's path. A device of the old server without a counterpart here is dropped,
/// unless a client uses it: then the old server keeps serving all of its devices.
pub struct Replacing {
    devices: Vec<New>,
    /// What happens to the old server's devices, by their numbers.
    places: Vec<Place>,
    /// Threads that prepare and load devices in parallel, from the first round on.
    workers: Option<Workers>,
    round_limit: Duration,
}

/// The servers, ready to [serve](Server::serve) the clients that the other process has served, in the order of the new devices.
pub type Replaced = Vec<Server>;

/// What happens to a device of the old server.
enum Place {
    /// The new device with this position replaces it.
    Taken(usize),
    /// No device does.
    Dropped(Dropped),
}

/// A device that the new server does not have.
#[derive(Default)]
struct Dropped {
    name: String,
    listeners: Vec<CameListener>,
}

impl Replacing {
    /// These devices.
    pub fn new<D: Into<NewDevice>>(devices: impl IntoIterator<Item = D>) -> Replacing {
        let devices = devices.into_iter().map(|device| New::of(device.into())).collect();
        Replacing { devices, places: Vec::new(), workers: None, round_limit: ROUND_LIMIT }
    }

    /// How long the new devices may take for each round of the transfer while the old devices run: to map memory, and to load
    /// state. A device that takes longer is refused by name. Default 60 s. The limit of the old server for all rounds
    /// ([`GiveLimits::prepare`](limosa_switch_over::GiveLimits::prepare)) should be longer.
    pub fn with_round_limit(self, limit: Duration) -> Replacing {
        Replacing { round_limit: limit, ..self }
    }

    fn place(&mut self, item: &Item) -> Result<&mut Place, Refusal> {
        let missing = || broken(item.kind, item.device, &"it is for a device that does not exist");
        self.places.get_mut(item.device as usize).ok_or_else(missing)
    }

    /// The items of each new device, in the order of the new devices. Items of a dropped device are consumed here.
    fn sort(&mut self, items: Vec<Item>) -> Result<Vec<Vec<Item>>, Refusal> {
        let mut sorted: Vec<Vec<Item>> = self.devices.iter().map(|_| Vec::new()).collect();
        for item in items {
            match self.place(&item)? {
                Place::Dropped(dropped) => dropped.take(item)?,
                Place::Taken(at) => sorted[*at].push(item),
            }
        }
        Ok(sorted)
    }

    /// All devices, each with its items.
    fn tasks(&mut self, items: Vec<Item>) -> Result<Vec<Task>, Refusal> {
        let sorted = self.sort(items)?;
        let numbers: Vec<_> = (0..self.devices.len()).map(|at| self.number(at)).collect();
        let devices = std::mem::take(&mut self.devices).into_iter().zip(numbers).zip(sorted);
        Ok(devices.map(|((new, number), items)| Task::new(new, number, items)).collect())
    }

    /// Each device that replaces another, with that one's number.
    fn taken(&mut self) -> impl Iterator<Item = (u16, &mut New)> {
        let numbers: Vec<_> = (0..self.devices.len()).map(|at| self.number(at)).collect();
        numbers.into_iter().zip(&mut self.devices).filter_map(|(number, new)| Some((number?, new)))
    }

    fn number(&self, at: usize) -> Option<u16> {
        let is_it = |place: &Place| matches!(place, Place::Taken(taken) if *taken == at);
        self.places.iter().position(is_it).and_then(|number| u16::try_from(number).ok())
    }

    /// Assigns new devices to old ones.
    fn find_places(&mut self, offers: &[Offered]) -> Result<(), Refusal> {
        let by_position = self.devices.iter().all(|new| new.socket.is_none())
            || offers.iter().all(|offered| offered.socket.is_none());
        if by_position && offers.len() != self.devices.len() {
            let (theirs, ours) = (offers.len(), self.devices.len());
            let what =
                format!("it has {theirs} devices, and the new server {ours}: start it with the same devices");
            return Err(Refusal::new(what));
        }
        for (number, offered) in offers.iter().enumerate() {
            let at = match by_position {
                true => Some(number),
                false => self.devices.iter().position(|new| offered.is_at(new.socket.as_deref())),
            };
            let is_twice = |at: usize| {
                self.places.iter().any(|place| matches!(place, Place::Taken(taken) if *taken == at))
            };
            self.places.push(match at {
                Some(at) if is_twice(at) => {
                    return Err(broken(kind::OFFER, number as u16, &"two devices at one socket"));
                }
                Some(at) => Place::Taken(at),
                None => Place::Dropped(Dropped { name: offered.name(number), ..Dropped::default() }),
            });
        }
        Ok(())
    }

    /// Refuses if a device would be dropped while a client uses it, or if the servers have no device in common.
    fn check_dropped(&self, offers: &[Offered]) -> Result<(), Refusal> {
        let is_dropped = |place: &Place| matches!(place, Place::Dropped(_));
        if self.places.iter().all(is_dropped) {
            let (theirs, ours): (Vec<_>, Vec<_>) = (
                offers.iter().enumerate().map(|(number, offered)| offered.name(number)).collect(),
                self.devices.iter().map(New::name).collect(),
            );
            let what = format!(
                "it has devices at {}, and the new server at {}: none is the same; start the new server with the same sockets",
                theirs.join(", "),
                ours.join(", ")
            );
            return Err(Refusal::new(what));
        }
        for (place, offered) in self.places.iter().zip(offers) {
            if let Place::Dropped(dropped) = place
                && offered.offer.has_client
            {
                return Err(dropped.in_use());
            }
        }
        Ok(())
    }
}

impl Dropped {
    fn in_use(&self) -> Refusal {
        let what = "a client uses it, and the new server does not have it; keep it, or end its client first";
        Refusal::new(format!("device {}: {what}", self.name))
    }

    /// For a dropped device only its sockets matter, and whether it may be dropped.
    fn take(&mut self, item: Item) -> Result<(), Refusal> {
        match item.kind {
            kind::CONNECTION => Err(self.in_use()),
            kind::LISTENER => {
                self.listeners.push(CameListener::of(item)?);
                Ok(())
            }
            kind::MACHINE if decode::<record::Machine>(&item)?.stays.is_some() => {
                let what = "it was given away with a move that is not decided, and the new server does not have it; settle the \
                            move first (`limosa resolve`)";
                Err(Refusal::new(format!("device {}: {what}", self.name)))
            }
            _ => Ok(()),
        }
    }

    /// Its sockets are removed.
    fn end(self) {
        for CameListener { record, socket } in self.listeners {
            let Some((path, identity)) = record.path else { continue };
            if let Err(error) = SocketPath::adopt(&path, identity, &socket) {
                tracing::warn!(device = self.name, %error, "the socket of a device that is dropped stays");
            }
        }
        tracing::warn!(device = self.name, "the device is dropped, as this server does not have it");
    }
}

impl Taker for Replacing {
    type Server = Replaced;

    fn check(&mut self, offer: Vec<Item>) -> Result<(), Refusal> {
        if offer.len() > DEVICES_MAX {
            let count = offer.len();
            return Err(Refusal::new(format!("it has {count} devices; expected {DEVICES_MAX} at most")));
        }
        let offers = (0..).zip(offer).map(|(number, item)| Offered::of(number, item));
        let offers = offers.collect::<Result<Vec<_>, _>>()?;
        self.find_places(&offers)?;
        for (number, new) in self.taken() {
            new.check(number, &offers[number as usize].offer).map_err(|refusal| new.named(refusal))?;
        }
        self.check_dropped(&offers)?;
        // Devices without a predecessor: everything that can fail comes before anything stops.
        let fresh = (0..self.devices.len()).filter(|at| self.number(*at).is_none()).collect::<Vec<_>>();
        for at in fresh {
            let new = &mut self.devices[at];
            new.begin_fresh().map_err(|refusal| new.named(refusal))?;
        }
        Ok(())
    }

    fn prepare(&mut self, items: Vec<Item>) -> Result<(), Refusal> {
        let tasks = self.tasks(items)?;
        // Threads are started while the old devices run.
        let workers = self.workers.get_or_insert_with(|| Workers::start(tasks.len()));
        let (stage, until) = (Stage::Prepare(self.round_limit), Instant::now() + self.round_limit);
        self.devices = loading::work(workers, tasks, stage, until)?;
        Ok(())
    }

    fn load(&mut self, items: Vec<Item>) -> Result<(), Refusal> {
        let until = loading::until(&items)?;
        let tasks = self.tasks(items)?;
        let workers = self.workers.take().unwrap_or_default();
        self.devices = loading::work(&workers, tasks, Stage::Load, until)?;
        Ok(())
    }

    fn run(self, commit: Commit<'_>) -> Result<(Committed, Replaced), Withdrawn> {
        // Memory is reserved before: nothing fails from here on.
        let mut servers = Vec::with_capacity(self.devices.len());
        let committed = commit.commit()?;
        for new in self.devices {
            servers.extend(new.serve());
        }
        for place in self.places {
            if let Place::Dropped(dropped) = place {
                dropped.end();
            }
        }
        Ok((committed, servers))
    }
}
