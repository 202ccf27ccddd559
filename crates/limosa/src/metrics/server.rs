//! The metrics of `limosa serve`: its devices, their clients, and how it was replaced.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use limosa_protocol::State;
use limosa_vfio_user::server::{Server, Statistics};

use super::{Exposition, Family, In, Kind, Listener, Sample, Source, Value, number, sample, yes};

const fn of_device(name: &'static str, kind: Kind, unit: In, help: &'static str) -> Family {
    Family { name, kind, unit, help, labels: &["device"] }
}

const STATE: Family = Family {
    labels: &["device", "state"],
    ..of_device(
        "device_state",
        Kind::Gauge,
        In::Number,
        "1 for the device's migration state, 0 for the others",
    )
};
const CLIENTS: Family = Family {
    labels: &["device", "role"],
    ..of_device("device_clients", Kind::Gauge, In::Number, "Connected clients")
};
const CONNECTIONS: Family = of_device("device_connections", Kind::Counter, In::Number, "Connections served");
const REQUESTS: Family = Family {
    labels: &["device", "command"],
    ..of_device("device_requests", Kind::Counter, In::Number, "Requests of clients, by message name")
};
const REFUSED: Family =
    of_device("device_refused_requests", Kind::Counter, In::Number, "Requests answered with an error");
const MAPPINGS: Family =
    of_device("device_dma_mappings", Kind::Gauge, In::Number, "Pieces of guest memory mapped for DMA");
const DIRTY_LOG: Family = of_device(
    "device_dirty_log",
    Kind::Gauge,
    In::Number,
    "1 while the device's writes to guest memory are logged",
);
const HELD: Family = of_device(
    "device_held",
    Kind::Gauge,
    In::Number,
    "1 while the VMM's accesses wait because another client moves the device",
);
const GIVEN_AWAY: Family = of_device(
    "device_given_away",
    Kind::Gauge,
    In::Number,
    "1 while the device stays stopped because a move takes it away",
);
const SESSION_BYTES: Family = Family {
    labels: &["device", "direction"],
    ..of_device("device_session", Kind::Counter, In::Bytes, "Device data saved or loaded by sessions")
};
const ARCS: Family = Family {
    labels: &["device", "from", "to", "outcome"],
    ..of_device("device_arcs", Kind::Counter, In::Number, "Arcs between migration states that were tried")
};
const ARC_SECONDS: Family = Family {
    labels: &["device", "from", "to"],
    ..of_device(
        "device_arcs_duration",
        Kind::Counter,
        In::Seconds,
        "Total time that the device took for arcs",
    )
};
const RESETS: Family = of_device("device_resets", Kind::Counter, In::Number, "Resets, including failed ones");
const SWITCH_OVER: Family = Family {
    name: "switch_overs",
    kind: Kind::Counter,
    unit: In::Number,
    help: "Switch-overs by which this process took over, and failed attempts to replace it",
    labels: &["outcome"],
};
const STANDSTILL: Family = Family {
    name: "switch_over_standstill",
    kind: Kind::Gauge,
    unit: In::Seconds,
    help: "Longest time that a device was stopped when this process took over, else 0",
    labels: &[],
};

pub(super) const FAMILIES: &[&Family] = &[
    &STATE,
    &CLIENTS,
    &CONNECTIONS,
    &REQUESTS,
    &REFUSED,
    &MAPPINGS,
    &DIRTY_LOG,
    &HELD,
    &GIVEN_AWAY,
    &SESSION_BYTES,
    &ARCS,
    &ARC_SECONDS,
    &RESETS,
    &SWITCH_OVER,
    &STANDSTILL,
];

/// The switch-overs of this process.
pub static SWITCH_OVERS: SwitchOvers = SwitchOvers { failed: AtomicU64::new(0), took_over: Mutex::new(None) };

pub struct SwitchOvers {
    failed: AtomicU64,
    /// The standstill, if this process took over.
    took_over: Mutex<Option<Duration>>,
}

impl SwitchOvers {
    /// Another process was to take over, and did not.
    pub fn failed(&self) {
        self.failed.fetch_add(1, Relaxed);
    }

    /// This process has taken over.
    pub fn took_over(&self, standstill: Duration) {
        *self.took_over.lock().unwrap_or_else(PoisonError::into_inner) = Some(standstill);
    }
}

/// The devices that are served.
#[derive(Debug)]
pub struct Served(Vec<(String, Statistics)>);

impl Served {
    pub fn new(servers: &[Server]) -> Served {
        let of = |server: &Server| {
            let statistics = server.statistics();
            let name = statistics.socket().map_or("?".to_owned(), |socket| socket.display().to_string());
            (name, statistics)
        };
        Served(servers.iter().map(of).collect())
    }

    /// Answers scrapes here.
    pub fn answer_at(self, listener: Listener) -> anyhow::Result<Exposition> {
        listener.answer("serve", self)
    }
}

impl Source for Served {
    fn families(&self) -> &'static [&'static Family] {
        FAMILIES
    }

    fn samples(&self, family: &'static Family) -> Vec<Sample> {
        match family.name {
            "switch_overs" => {
                let taken = SWITCH_OVERS.took_over.lock().unwrap_or_else(PoisonError::into_inner).is_some();
                vec![
                    sample(["took_over"], Value::Count(u64::from(taken))),
                    sample(["failed"], Value::Count(SWITCH_OVERS.failed.load(Relaxed))),
                ]
            }
            "switch_over_standstill" => {
                let taken = *SWITCH_OVERS.took_over.lock().unwrap_or_else(PoisonError::into_inner);
                vec![sample([], number(taken.unwrap_or_default().as_secs_f64()))]
            }
            _ => self.0.iter().flat_map(|(name, device)| of(family, name, device)).collect(),
        }
    }
}

fn of(family: &Family, name: &str, device: &Statistics) -> Vec<Sample> {
    let machine = device.machine();
    let one = |value| vec![sample([name], value)];
    match family.name {
        "device_state" => {
            let state = machine.state();
            State::ALL.iter().map(|of| sample([name, of.name()], yes(*of == state))).collect()
        }
        "device_clients" => {
            let clients = device.clients();
            let roles = [
                ("vmm", clients.vmm),
                ("next", clients.next),
                ("control", clients.control),
                ("waiting", clients.waiting),
                ("undecided", clients.undecided),
            ];
            let of_role =
                |(role, count)| sample([name, role], number(u32::try_from(count).unwrap_or(u32::MAX)));
            roles.map(of_role).into()
        }
        "device_connections" => one(Value::Count(device.connections())),
        "device_requests" => {
            device.requests().map(|(command, count)| sample([name, command], Value::Count(count))).collect()
        }
        "device_refused_requests" => one(Value::Count(device.refused())),
        "device_dma_mappings" => one(number(u32::try_from(machine.mappings().count()).unwrap_or(u32::MAX))),
        "device_dirty_log" => one(yes(machine.mappings().is_logging())),
        "device_held" => one(yes(machine.holds_accesses())),
        "device_given_away" => one(yes(machine.stays().is_some())),
        "device_session" => {
            let counts = machine.counts();
            vec![
                sample([name, "save"], Value::Count(counts.saved_bytes)),
                sample([name, "load"], Value::Count(counts.loaded_bytes)),
            ]
        }
        "device_arcs" => {
            let arcs = machine.counts().arcs;
            let of = |arc: &limosa_device::ArcCount| {
                let labels = |outcome| [name, arc.from.name(), arc.to.name(), outcome];
                [
                    sample(labels("walked"), Value::Count(arc.walked)),
                    sample(labels("failed"), Value::Count(arc.failed)),
                ]
            };
            arcs.iter().flat_map(of).collect()
        }
        "device_arcs_duration" => {
            let arcs = machine.counts().arcs;
            let of = |arc: &limosa_device::ArcCount| {
                sample([name, arc.from.name(), arc.to.name()], number(arc.time.as_secs_f64()))
            };
            arcs.iter().map(of).collect()
        }
        "device_resets" => one(Value::Count(machine.reset_count())),
        _ => Vec::new(),
    }
}
