//! The family `vfio-user`, tested against itself: for each of its clauses a server that breaks just that, and the checks
//! that find it. `docs/conformance/mutations-vfio-user.md` is the table. With UPDATE_DOCS set the page is written anew.

mod faults;
mod proxy;

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use faults::Case;
use limosa_check::{
    CLAUSES, Check, Document, Family, Limits, Options, Outcome, Report, SocketWire, Target, Transport, Wire,
    checks, run,
};
use limosa_device::{Bus, Description, Machine, SimpleMigration, SimpleModel};
use limosa_models::synthetic::{Synthetic, SyntheticConfig};
use limosa_protocol::Errno;
use limosa_protocol::info::{IrqFlags, pci_index};
use limosa_vfio_user::client::{self, Client};
use proxy::{Fault, Faulty};

use crate::table::Table;

/// The synthetic device with more vectors than it has.
struct Vectors(Synthetic);

impl SimpleModel for Vectors {
    fn description(&self) -> Description {
        let mut description = self.0.description();
        let irq = &mut description.irqs[pci_index::IRQ_MSIX as usize];
        (irq.flags, irq.count) = (IrqFlags::EVENTFD, 4);
        let irq = &mut description.irqs[pci_index::IRQ_MSI as usize];
        (irq.flags, irq.count) = (IrqFlags::EVENTFD, 4);
        description
    }
    fn attach(&mut self, bus: Bus) {
        self.0.attach(bus);
    }
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.0.region_read(region, offset, data)
    }
    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.0.region_write(region, offset, data)
    }
    fn reset(&mut self) -> Result<(), Errno> {
        self.0.reset()
    }
    fn migration(&mut self) -> Option<&mut dyn SimpleMigration> {
        self.0.migration()
    }
}

fn check(fault: Fault, only: Option<&str>) -> Report {
    let config = SyntheticConfig { state_bytes: 64 << 10, block_bytes: 4096, ..SyntheticConfig::default() };
    let server = Faulty::start(Machine::simple(Vectors(Synthetic::new(config).unwrap())), fault);
    let dialled = Arc::clone(&server);
    checked(server, only, move || dialled.dial())
}

/// The family on this server, whose checks connect as `dial` does.
fn checked(
    server: Arc<Faulty>,
    only: Option<&str>,
    dial: impl Fn() -> std::io::Result<Box<dyn Wire>> + Send + Sync + 'static,
) -> Report {
    let target = Target::new("faulty", Transport::VfioUser, move || {
        server.dead.store(false, Ordering::SeqCst);
        Ok(Box::new(Client::connect(&server.upstream, client::Options::default())?))
    })
    .dial(dial);
    let options = Options {
        families: vec![Family::VfioUser],
        only: only.into_iter().map(ToOwned::to_owned).collect(),
        destructive: true,
        // What a server does not do is waited for as long.
        limits: Limits { check: Duration::from_secs(4), silent_max: u32::MAX, ..Limits::default() },
        ..Options::default()
    };
    run(&target, &options, |_| {}).unwrap()
}

fn failed(report: &Report) -> BTreeSet<String> {
    report.failed().map(|check| check.id.clone()).collect()
}

fn family() -> Vec<Check> {
    checks().into_iter().filter(|check| check.family == Family::VfioUser).collect()
}

#[test]
fn a_server_without_a_fault_passes() {
    let report = check(Fault::Nothing, None);
    let failed: Vec<_> = report.failed().collect();
    assert!(failed.is_empty(), "{failed:#?}");
    let skipped: Vec<_> =
        report.checks.iter().filter(|check| matches!(check.outcome, Outcome::Skip(_))).collect();
    assert!(skipped.is_empty(), "{skipped:#?}");
    assert_eq!((&*report.left_in, &report.ended_early), ("RUNNING", &None));
    assert!(report.seconds < 10.0, "{}", report.seconds);
}

#[test]
fn a_connection_that_an_ending_server_took_in_its_last_moment_is_made_again() {
    let server =
        Faulty::start(Machine::simple(Synthetic::new(SyntheticConfig::default()).unwrap()), Fault::Nothing);
    let (dialled, count) = (Arc::clone(&server), AtomicUsize::new(0));
    let report = checked(server, Some("vfio-user.version-limits"), move || {
        if count.fetch_add(1, Ordering::SeqCst) == 0 {
            return Ok(Box::new(SocketWire::new(UnixStream::pair()?.0)?));
        }
        dialled.dial()
    });
    assert_eq!((report.counts().pass, failed(&report)), (1, BTreeSet::new()), "{report:#?}");
}

#[test]
fn each_fault_of_a_server_is_found_by_exactly_the_checks_that_should() {
    let cases: Vec<Case> = faults::all();
    let next = AtomicUsize::new(0);
    let found: Mutex<Vec<Option<BTreeSet<String>>>> = Mutex::new(cases.iter().map(|_| None).collect());
    std::thread::scope(|scope| {
        // A case mostly waits for what its server does not do.
        for _ in 0..4 {
            scope.spawn(|| {
                while let (at, Some(case)) = {
                    let at = next.fetch_add(1, Ordering::SeqCst);
                    (at, cases.get(at))
                } {
                    let report = check(case.fault, case.only);
                    assert_eq!(report.ended_early, None, "{}", case.words);
                    found.lock().unwrap()[at] = Some(failed(&report));
                }
            });
        }
    });
    let found: Vec<_> = found.into_inner().unwrap().into_iter().map(Option::unwrap).collect();
    let family = family();
    let mut can_fail = BTreeSet::new();
    let mut rows = Vec::new();
    let mut missed = Vec::new();
    for (case, failed) in cases.iter().zip(&found) {
        let cites = |check: &&Check| failed.contains(&*check.id) && check.clauses.contains(&case.clause);
        if !family.iter().any(|check| cites(&check)) {
            missed.push(format!("{}: breaks {}, and failed {failed:?}", case.words, case.clause));
        }
        can_fail.extend(failed.iter().cloned());
        let ids: Vec<_> = failed.iter().map(|id| format!("`{id}`")).collect();
        rows.push(format!("| {} | `{}` | {} |", case.words, case.clause, ids.join(" ")));
    }
    let never: Vec<_> = family
        .iter()
        .filter(|check| !can_fail.contains(&*check.id))
        .map(|check| check.id.to_string())
        .collect();
    let unbroken: Vec<_> = CLAUSES
        .iter()
        .filter(|clause| clause.document == Document::VfioUser && clause.unchecked.is_empty())
        .filter(|clause| !cases.iter().any(|case| case.clause == clause.id))
        .map(|clause| clause.id)
        .collect();
    let page = format!("{HEAD}{}\n", rows.join("\n"));
    Table { file: "mutations-vfio-user.md", page, missed, never, unbroken }.hold();
}

const HEAD: &str = "\
# The family vfio-user, tested against itself

For each clause of `vfio-user.rst` a server that breaks just that: a proxy with one fault in front of a server of this project. The
last column is the checks that fail, all of them. A test holds the table to what happens, and holds that every check of the
family fails somewhere in it.

| fault | clause | checks that fail |
|---|---|---|
";
