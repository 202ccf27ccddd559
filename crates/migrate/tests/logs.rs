//! No dirty page is lost: not at a harvest, not at an abort, not when a log fails.

mod common;

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use common::{Ends, Step, VecPages, world};
use limosa_device::Fault;
use limosa_migrate::{Convergence, DirtyLog, FilePages, GuestPages, Observer, Outcome, PAGE_BYTES, Phase};
use limosa_protocol::bitmap::DirtyBitmap;
use limosa_protocol::{Errno, MigrationFlags};

const PAGES: u64 = 40;

/// A log of what a vCPU writes.
#[derive(Default)]
struct Log {
    marks: Mutex<BTreeSet<u64>>,
    given_back: Mutex<BTreeSet<u64>>,
    on: AtomicBool,
    harvest_fails: bool,
    start_fails: bool,
}

struct Handle(Arc<Log>);

impl DirtyLog for Handle {
    fn start(&mut self) -> io::Result<()> {
        if self.0.start_fails {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        self.0.on.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn harvest(&mut self, region: usize, dirty: &DirtyBitmap) -> io::Result<()> {
        assert_eq!(region, 0);
        if self.0.harvest_fails {
            return Err(io::ErrorKind::Other.into());
        }
        std::mem::take(&mut *self.0.marks.lock().unwrap()).into_iter().for_each(|page| dirty.set(page));
        Ok(())
    }
    fn give_back(&mut self, _: usize, dirty: &DirtyBitmap) {
        assert!(self.0.on.load(Ordering::SeqCst), "still on, so that nothing falls between");
        let pages = dirty.runs().flat_map(|(first, pages)| first..first + pages);
        self.0.given_back.lock().unwrap().extend(pages);
    }
    fn stop(&mut self) {
        assert!(self.0.on.swap(false, Ordering::SeqCst));
    }
}

/// A vCPU that writes pages before the first round and after each of the next ones.
struct Vcpu {
    log: Arc<Log>,
    memory: Arc<VecPages>,
    wrote: Mutex<BTreeSet<u64>>,
}

impl Vcpu {
    fn write(&self, page: u64, what: u32) {
        self.memory.write(page * PAGE_BYTES + 99, &what.to_le_bytes()).unwrap();
        self.wrote.lock().unwrap().insert(page);
        if self.log.on.load(Ordering::SeqCst) {
            self.log.marks.lock().unwrap().insert(page);
        }
    }
}

impl Observer for Vcpu {
    fn phase(&self, phase: Phase) {
        if phase == Phase::PreCopy {
            self.write(30, 77);
        }
    }
    fn round(&self, round: u32, _: u64) {
        if round <= 5 {
            self.write(round.into(), round);
            self.write(u64::from(round) * 2 + 1, round);
        }
    }
}

fn ends(log: Log) -> (Ends, Arc<Log>, Arc<Vcpu>) {
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 1000);
    let mut ends = Ends::new(vec![source], vec![destination]);
    let memory = Arc::new(VecPages::new((PAGES * PAGE_BYTES) as usize));
    let log = Arc::new(log);
    let vcpu = Arc::new(Vcpu { log: log.clone(), memory: memory.clone(), wrote: Mutex::default() });
    ends.observer = vcpu.clone();
    let there = Arc::new(VecPages::new((PAGES * PAGE_BYTES) as usize));
    ends.memory = Some((memory, there, PAGES * PAGE_BYTES));
    ends.log = Mutex::new(Some(Box::new(Handle(log.clone()))));
    ends.options.convergence = Convergence { rounds_max: 8, left_bytes_max: 0 };
    (ends, log, vcpu)
}

#[test]
fn what_a_vcpu_writes_between_rounds_arrives() {
    for harvest_fails in [false, true] {
        let (ends, log, vcpu) = ends(Log { harvest_fails, ..Log::default() });
        let (outcome, received) = ends.run_plain();
        let Outcome::Moved(report) = &outcome else { panic!("{outcome:?}") };
        assert!(report.rounds.len() > 5, "each write costs a round: {}", report.rounds.len());
        assert_eq!(vcpu.wrote.lock().unwrap().len(), 9);
        assert!(ends.check(outcome, received, "log"));
        assert!(!log.on.load(Ordering::SeqCst), "stopped");
        assert!(log.given_back.lock().unwrap().is_empty());
    }
}

#[test]
fn an_abort_gives_back_what_was_harvested() {
    for step in [Step::LoadFinish, Step::Load, Step::Start] {
        for harvest_fails in [false, true] {
            let (ends, log, vcpu) = ends(Log { harvest_fails, ..Log::default() });
            ends.destination[0].fail(step, 0, Fault::Refused(Errno::EIO));
            let (outcome, received) = ends.run_plain();
            assert!(!ends.check(outcome, received, "abort"));
            let given_back = log.given_back.lock().unwrap();
            let wrote = vcpu.wrote.lock().unwrap();
            assert!(given_back.is_superset(&wrote), "{step:?}: {given_back:?} of {wrote:?}");
            assert!(harvest_fails || given_back.len() < 20, "not more than was harvested");
            assert!(!log.on.load(Ordering::SeqCst), "stopped");
        }
    }
}

#[test]
fn an_abort_gives_back_what_devices_wrote() {
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 1000);
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = std::fs::File::from(fd);
    file.set_len(PAGES * PAGE_BYTES).unwrap();
    source.map(&file, PAGES * PAGE_BYTES);
    destination.fail(Step::LoadFinish, 0, Fault::Refused(Errno::EIO));
    let mut ends = Ends::new(vec![source], vec![destination]);
    let there = Arc::new(VecPages::new((PAGES * PAGE_BYTES) as usize));
    ends.memory = Some((Arc::new(FilePages::new(file, 0)), there, PAGES * PAGE_BYTES));
    let log = Arc::new(Log::default());
    ends.log = Mutex::new(Some(Box::new(Handle(log.clone()))));
    let (outcome, received) = ends.run_plain();
    assert!(!ends.check(outcome, received, "abort"));
    // The device wrote its first pages while it was saved in pre-copy.
    assert!(log.given_back.lock().unwrap().is_superset(&BTreeSet::from([0, 1])));
}

#[test]
fn a_log_that_does_not_start_undoes_the_move_before_anything_stops() {
    let (ends, log, _) = ends(Log { start_fails: true, ..Log::default() });
    let (outcome, received) = ends.run_plain();
    let Outcome::Undone { report, .. } = &outcome else { panic!("{outcome:?}") };
    assert_eq!(report.downtime_ns, None);
    assert!(!ends.check(outcome, received, "start"));
    assert!(log.given_back.lock().unwrap().is_empty());
}
