//! Devices that hang, die, or are not in RUNNING: the suite ends within its limits, and says where it was.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use limosa_check::{Family, Limits, Options, Outcome, Target, Transport, run};
use limosa_client::{
    Device, DeviceExt, DirtyBits, DmaMap, Error, FeatureReply, FeatureRequest, IrqAction, Region, Result,
};
use limosa_device::{Loopback, Machine};
use limosa_models::uart::Mtty;
use limosa_protocol::info::{DeviceInfo, IrqInfo};
use limosa_protocol::{FeatureIndex, FeatureOp, State};

/// A device that hangs when its log is to start, and dies after so many requests.
struct Odd {
    inner: Loopback,
    hangs: bool,
    lives: Arc<AtomicU64>,
}

impl Odd {
    fn alive(&self) -> Result<()> {
        match self.lives.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::Disconnected { device: self.inner.name().into(), reason: "it died".into() }),
        }
    }
}

impl Device for Odd {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn feature(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        self.alive()?;
        if self.hangs && (request.index, request.op) == (FeatureIndex::DMA_LOGGING_START, FeatureOp::SET) {
            loop {
                std::thread::park();
            }
        }
        self.inner.feature(request)
    }
    fn reset(&self) -> Result<()> {
        self.alive()?;
        self.inner.reset()
    }
    fn info(&self) -> Result<DeviceInfo> {
        self.alive()?;
        self.inner.info()
    }
    fn region(&self, index: u32) -> Result<Region> {
        self.inner.region(index)
    }
    fn irq(&self, index: u32) -> Result<IrqInfo> {
        self.inner.irq(index)
    }
    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        self.inner.region_read(region, offset, data)
    }
    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.inner.region_write(region, offset, data)
    }
    fn set_irqs(&self, index: u32, start: u32, action: IrqAction<'_>) -> Result<()> {
        self.inner.set_irqs(index, start, action)
    }
    fn dma_map(&self, map: &DmaMap<'_>) -> Result<()> {
        self.inner.dma_map(map)
    }
    fn dma_unmap(&self, iova: u64, size: u64, dirty: Option<DirtyBits<'_>>) -> Result<()> {
        self.inner.dma_unmap(iova, size, dirty)
    }
}

fn loopback() -> Loopback {
    Loopback::new("loopback", Machine::simple(Mtty::new(1).unwrap()))
}

fn target(inner: &Loopback, hangs: bool, lives: u64) -> Target {
    let (inner, lives) = (inner.clone(), Arc::new(AtomicU64::new(lives)));
    Target::new("odd", Transport::VfioUser, move || {
        let odd = Odd { inner: inner.clone(), hangs, lives: Arc::clone(&lives) };
        odd.alive()?;
        Ok(Box::new(odd))
    })
}

fn options(families: &[Family]) -> Options {
    let limits = Limits { check: Duration::from_millis(200), silent_max: 1, ..Limits::default() };
    Options { families: families.to_vec(), limits, ..Options::default() }
}

#[test]
fn a_device_that_hangs_costs_a_limit_and_ends_the_suite_after_several() {
    let begun = Instant::now();
    let report =
        run(&target(&loopback(), true, u64::MAX), &options(&[Family::States, Family::Logging]), |_| {})
            .unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    let failed: Vec<_> = report.failed().collect();
    assert_eq!(failed.len(), 1, "{failed:#?}");
    assert!(
        failed[0].outcome.detail().contains("no answer to `feature set DMA_LOGGING_START 16`"),
        "{:?}",
        failed[0]
    );
    assert!(failed[0].requests.iter().any(|line| line.contains("no answer")), "{:?}", failed[0]);
    assert!(
        report.ended_early.as_ref().is_some_and(|why| why.contains("logging.start-and-stop")),
        "{report:?}"
    );
    assert_eq!(report.left_in, "RUNNING");
    assert!(
        matches!(&report.checks.last().unwrap().outcome, Outcome::Skip(why) if why.contains("had ended"))
    );
}

#[test]
fn a_device_that_dies_ends_the_suite() {
    let report = run(&target(&loopback(), false, 400), &options(&[Family::States]), |_| {}).unwrap();
    assert!(
        report.ended_early.as_ref().is_some_and(|why| why.contains("it died")),
        "{:?}",
        report.ended_early
    );
    assert!(report.left_in.starts_with("unknown"), "{}", report.left_in);
    assert!(report.counts().pass > 5 && report.counts().fail >= 1, "{:?}", report.counts());
}

#[test]
fn a_device_that_does_not_run_is_reset_only_when_that_is_allowed() {
    let inner = loopback();
    let _stream = inner.set_state(State::Resuming).unwrap();
    let error = run(&target(&inner, false, u64::MAX), &options(&[Family::States]), |_| {}).unwrap_err();
    assert!(error.to_string().contains("in RESUMING, expected RUNNING; --destructive resets it"), "{error}");
    assert_eq!(inner.state().unwrap(), State::Resuming, "it was not touched");
    let options = Options { destructive: true, ..options(&[Family::States]) };
    let report = run(&target(&inner, false, u64::MAX), &options, |_| {}).unwrap();
    assert_eq!((report.counts().fail, &*report.left_in), (0, "RUNNING"));
}
