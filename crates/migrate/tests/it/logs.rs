//! No dirty page is lost: not at a harvest, not at an abort, not when a log fails.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::{Ends, Quirks, Step, TestDevice, VecPages, world};
use limosa_client::dirty::StartedLog;
use limosa_client::{Device, DeviceIdentity, DeviceLog, DirtySource};
use limosa_device::{Fault, Loopback};
use limosa_migrate::{
    Convergence, DirtyLog, FilePages, GuestPages, Observer, Outcome, PAGE_BYTES, Phase, Round,
};
use limosa_protocol::bitmap::DirtyBitmap;
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::{Errno, FeatureIndex, MigrationFlags};
use limosa_testing::memfd;

const PAGES: u64 = 40;

/// A log of what a vCPU writes.
#[derive(Default)]
struct Log {
    marks: Mutex<BTreeSet<u64>>,
    given_back: Mutex<BTreeSet<u64>>,
    on: AtomicBool,
    harvests: AtomicU32,
    harvest_fails: bool,
    start_fails: bool,
    /// The engine is its only reader.
    is_alone: bool,
}

struct Handle(Arc<Log>);

impl DirtyLog for Handle {
    fn start(&mut self) -> io::Result<()> {
        self.0.on.store(true, Ordering::SeqCst);
        // Half-way: what it has started is on.
        if self.0.start_fails { Err(io::ErrorKind::ResourceBusy.into()) } else { Ok(()) }
    }
    fn harvest(&mut self, region: usize, dirty: &DirtyBitmap) -> io::Result<()> {
        assert_eq!(region, 0);
        self.0.harvests.fetch_add(1, Ordering::SeqCst);
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
    fn has_other_readers(&self) -> bool {
        !self.0.is_alone
    }
    fn stop(&mut self) {
        // Called after a start that failed, too.
        assert!(self.0.on.swap(false, Ordering::SeqCst) || self.0.start_fails);
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
    fn round(&self, round: &Round) {
        let round = round.round;
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
    ends.options.convergence = Convergence::default().with_downtime_goal(Duration::ZERO).with_rounds_max(8);
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
fn an_abort_does_not_read_all_memory_for_a_log_that_has_no_other_readers() {
    for is_alone in [false, true] {
        let (ends, log, _) = ends(Log { is_alone, ..Log::default() });
        ends.destination[0].fail(Step::LoadFinish, 0, Fault::Refused(Errno::EIO));
        let (outcome, received) = ends.run_plain();
        let Outcome::Undone { report, .. } = &outcome else { panic!("{outcome:?}") };
        let rounds = report.rounds.len() as u32;
        assert!(!ends.check(outcome, received, "abort"));
        assert_eq!(log.given_back.lock().unwrap().is_empty(), is_alone);
        assert!(!log.on.load(Ordering::SeqCst), "stopped");
        // After each round, at the stop unless the destination has failed by then, and in the undo where that is of use.
        let beside_rounds = log.harvests.load(Ordering::SeqCst) - rounds;
        let in_undo = u32::from(!is_alone);
        assert!((in_undo..=in_undo + 1).contains(&beside_rounds), "{beside_rounds} beside {rounds} rounds");
    }
}

#[test]
fn an_abort_gives_back_what_devices_wrote() {
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 1000);
    let file = memfd(PAGES * PAGE_BYTES);
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
fn a_log_that_a_process_left_on_when_it_died_does_not_bar_the_next_move() {
    let (ends, ..) = ends(Log::default());
    let everything = DmaLoggingRange { iova: 0, length: PAGES * PAGE_BYTES };
    let died = DeviceLog::new(&ends.source[0].client);
    died.start(PAGE_BYTES, &[everything]).unwrap();
    let (outcome, received) = ends.run_plain();
    assert!(ends.check(outcome, received, "left on"));
}

#[test]
fn a_log_that_does_not_start_undoes_the_move_before_anything_stops() {
    let (ends, log, _) = ends(Log { start_fails: true, ..Log::default() });
    let (outcome, received) = ends.run_plain();
    let Outcome::Undone { report, .. } = &outcome else { panic!("{outcome:?}") };
    assert_eq!(report.downtime_ns, None);
    assert!(report.notes.is_empty(), "{:?}", report.notes);
    assert!(!ends.check(outcome, received, "start"));
    assert!(log.given_back.lock().unwrap().is_empty());
    assert!(!log.on.load(Ordering::SeqCst), "stopped");
}

/// What a device writes, as its IOMMU would see it: the log of the device behind the quirks that hide it.
struct Iommu {
    device: Loopback,
    sees: Option<DeviceIdentity>,
    page_bytes: Mutex<Option<u64>>,
    starts: Option<Errno>,
    reports: Option<Errno>,
    reported: Mutex<BTreeSet<u64>>,
}

impl Iommu {
    fn new(device: &TestDevice) -> Iommu {
        Iommu {
            device: device.client.inner.clone(),
            sees: device.client.identity(),
            page_bytes: Mutex::new(None),
            starts: None,
            reports: None,
            reported: Mutex::default(),
        }
    }

    fn is_on(&self) -> bool {
        self.page_bytes.lock().unwrap().is_some()
    }
}

fn refused(errno: Errno) -> limosa_client::Error {
    limosa_client::Error::Refused { device: "iommu".into(), request: "it".into(), errno, hint: "".into() }
}

impl DirtySource for Iommu {
    fn name(&self) -> &str {
        "iommu"
    }
    fn sees(&self, device: &dyn Device) -> bool {
        self.sees.is_some() && device.identity() == self.sees
    }
    fn start(&self, hint: u64, ranges: &[DmaLoggingRange]) -> limosa_client::Result<u64> {
        if let Some(errno) = self.starts {
            return Err(refused(errno));
        }
        let page_bytes = DeviceLog::new(&self.device).start(hint, ranges)?;
        *self.page_bytes.lock().unwrap() = Some(page_bytes);
        Ok(page_bytes)
    }
    fn report(&self, iova: u64, length: u64, page_size: u64, words: &mut [u64]) -> limosa_client::Result<()> {
        if let Some(errno) = self.reports {
            return Err(refused(errno));
        }
        let page_bytes = self.page_bytes.lock().unwrap().expect("it is on");
        DeviceLog::started(&self.device, StartedLog::new(page_bytes))
            .report(iova, length, page_size, words)?;
        let pages = limosa_protocol::bitmap::runs(words).flat_map(|(first, pages)| first..first + pages);
        self.reported.lock().unwrap().extend(pages);
        Ok(())
    }
    fn stop(&self) -> limosa_client::Result<()> {
        let page_bytes = self.page_bytes.lock().unwrap().take().expect("it is on");
        DeviceLog::started(&self.device, StartedLog::new(page_bytes)).stop()
    }
}

/// Moves a device that does not log itself, and memory that it writes, with these sources.
fn behind(iommu: impl FnOnce(&TestDevice) -> Vec<Iommu>) -> (Ends, Vec<Arc<Iommu>>) {
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 5000);
    let [here, there] = [(); 2].map(|()| memfd(PAGES * PAGE_BYTES));
    source.map(&here, PAGES * PAGE_BYTES);
    let lacks = vec![
        FeatureIndex::DMA_LOGGING_START,
        FeatureIndex::DMA_LOGGING_STOP,
        FeatureIndex::DMA_LOGGING_REPORT,
    ];
    source.quirks(Quirks { lacks, ..Quirks::default() });
    let iommus: Vec<_> = iommu(&source).into_iter().map(Arc::new).collect();
    let mut ends = Ends::new(vec![source], vec![destination]);
    ends.sources = iommus.iter().map(|iommu| Arc::clone(iommu) as Arc<dyn DirtySource>).collect();
    ends.memory =
        Some((Arc::new(FilePages::new(here, 0)), Arc::new(FilePages::new(there, 0)), PAGES * PAGE_BYTES));
    (ends, iommus)
}

#[test]
fn a_device_without_a_log_is_seen_by_a_source() {
    for reports in [None, Some(Errno::EIO)] {
        let (ends, iommus) = behind(|device| vec![Iommu { reports, ..Iommu::new(device) }]);
        let (outcome, received) = ends.run_plain();
        let Outcome::Moved(report) = &outcome else { panic!("{outcome:?}") };
        assert!(report.notes.is_empty(), "not blind: {:?}", report.notes);
        assert!(!report.rounds.is_empty(), "memory moves in pre-copy");
        assert!(ends.check(outcome, received, "seen"), "{reports:?}");
        assert!(reports.is_some() || iommus[0].reported.lock().unwrap().contains(&0), "it wrote");
        assert!(!iommus[0].is_on(), "stopped");
    }
}

#[test]
fn a_device_that_no_source_sees_makes_all_memory_move_after_the_stop() {
    let another = Some(DeviceIdentity::unique());
    let (ends, iommus) = behind(|device| vec![Iommu { sees: another, ..Iommu::new(device) }]);
    let (outcome, received) = ends.run_plain();
    let Outcome::Moved(report) = &outcome else { panic!("{outcome:?}") };
    assert!(report.notes.iter().any(|note| note.contains("no log sees the DMA of dev-source")), "{report:?}");
    assert!(ends.check(outcome, received, "not seen"));
    assert!(!iommus[0].is_on(), "stopped");
}

#[test]
fn a_source_that_does_not_start_undoes_the_move_and_stops_the_others() {
    let (mut ends, iommus) =
        behind(|device| vec![Iommu::new(device), Iommu { starts: Some(Errno::EBUSY), ..Iommu::new(device) }]);
    let log = Arc::new(Log::default());
    ends.log = Mutex::new(Some(Box::new(Handle(log.clone()))));
    let (outcome, received) = ends.run_plain();
    let Outcome::Undone { why, report } = &outcome else { panic!("{outcome:?}") };
    assert!(
        why.to_string().contains("iommu: starting its DMA log") && why.to_string().contains("EBUSY"),
        "{why}"
    );
    assert_eq!(report.downtime_ns, None);
    assert!(!ends.check(outcome, received, "start"));
    assert!(!iommus[0].is_on() && !log.on.load(Ordering::SeqCst), "stopped");
}

#[test]
fn an_abort_gives_back_what_sources_saw_and_a_retry_moves_it() {
    for reports in [None, Some(Errno::EIO)] {
        let (mut ends, iommus) = behind(|device| vec![Iommu { reports, ..Iommu::new(device) }]);
        let log = Arc::new(Log::default());
        ends.log = Mutex::new(Some(Box::new(Handle(log.clone()))));
        ends.destination[0].fail(Step::LoadFinish, 0, Fault::Refused(Errno::EIO));
        let (outcome, received) = ends.run_plain();
        assert!(!ends.check(outcome, received, "abort"));
        let given_back = log.given_back.lock().unwrap().clone();
        assert!(given_back.is_superset(&BTreeSet::from([0, 1])), "what it wrote in pre-copy: {given_back:?}");
        assert!(given_back.is_superset(&iommus[0].reported.lock().unwrap()));
        assert!(!iommus[0].is_on(), "stopped");
        ends.log = Mutex::new(Some(Box::new(Handle(log.clone()))));
        let (outcome, received) = ends.run_plain();
        assert!(ends.check(outcome, received, "retry"));
    }
}
