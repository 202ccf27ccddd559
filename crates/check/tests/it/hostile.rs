//! Devices that hang, die, answer garbage, give data for ever, or are not in RUNNING: the suite ends within its limits, and says
//! where it was.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use limosa_check::{Family, Limits, Options, Outcome, Target, Transport, run};
use limosa_client::{
    Chunk, DataStream, Device, DeviceExt, DirtyBits, DmaMap, Error, FeatureReply, FeatureRequest, IrqAction,
    Region, Result,
};
use limosa_device::{Loopback, Machine};
use limosa_models::uart::Mtty;
use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::info::{DeviceInfo, IrqInfo};
use limosa_protocol::{FeatureIndex, FeatureOp, State};

/// What is odd about a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Oddity {
    Nothing,
    /// It hangs when its log is to start.
    Hangs,
    /// It dies after so many requests.
    Dies(u64),
    /// Behind so many requests it answers that it is in a state that does not exist.
    Garbage(u64),
    /// What it saves has no end.
    Endless,
}

struct Odd {
    inner: Loopback,
    oddity: Oddity,
    lives: Arc<AtomicU64>,
}

/// Data for ever.
struct Endless(Box<dyn DataStream>);

impl DataStream for Endless {
    fn read(&mut self, data: &mut [u8]) -> Result<Chunk> {
        data.fill(0);
        Ok(Chunk::Data(data.len()))
    }
    fn write(&mut self, data: &[u8]) -> Result<()> {
        self.0.write(data)
    }
    fn precopy_info(&mut self) -> Result<PrecopyInfo> {
        self.0.precopy_info()
    }
    fn transfer_bytes_max(&self) -> usize {
        self.0.transfer_bytes_max()
    }
}

impl Odd {
    fn alive(&self) -> Result<()> {
        let left = self.lives.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        match (left, self.oddity) {
            (Err(_), Oddity::Dies(_)) => {
                Err(Error::Disconnected { device: self.inner.name().into(), reason: "it died".into() })
            }
            _ => Ok(()),
        }
    }
}

impl Device for Odd {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn feature(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        self.alive()?;
        let asked = (request.index, request.op);
        if self.oddity == Oddity::Hangs && asked == (FeatureIndex::DMA_LOGGING_START, FeatureOp::SET) {
            loop {
                std::thread::park();
            }
        }
        let mut reply = self.inner.feature(request)?;
        let is_over = self.lives.load(Ordering::SeqCst) == 0;
        match self.oddity {
            Oddity::Garbage(_) if is_over && asked == (FeatureIndex::MIG_DEVICE_STATE, FeatureOp::GET) => {
                request.payload[..4].copy_from_slice(&99u32.to_ne_bytes());
            }
            Oddity::Endless => reply.stream = reply.stream.map(|stream| Box::new(Endless(stream)) as _),
            _ => {}
        }
        Ok(reply)
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

fn target(inner: &Loopback, oddity: Oddity) -> Target {
    let lives = match oddity {
        Oddity::Dies(lives) | Oddity::Garbage(lives) => lives,
        _ => u64::MAX,
    };
    let (inner, lives) = (inner.clone(), Arc::new(AtomicU64::new(lives)));
    Target::new("odd", Transport::VfioUser, move || {
        let odd = Odd { inner: inner.clone(), oddity, lives: Arc::clone(&lives) };
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
        run(&target(&loopback(), Oddity::Hangs), &options(&[Family::States, Family::Logging]), |_| {})
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
    let report = run(&target(&loopback(), Oddity::Dies(400)), &options(&[Family::States]), |_| {}).unwrap();
    assert!(
        report.ended_early.as_ref().is_some_and(|why| why.contains("it died")),
        "{:?}",
        report.ended_early
    );
    assert!(report.left_in.starts_with("unknown"), "{}", report.left_in);
    assert!(report.counts().pass > 5 && report.counts().fail >= 1, "{:?}", report.counts());
}

#[test]
fn a_device_that_answers_garbage_fails_and_is_not_said_to_run() {
    let report =
        run(&target(&loopback(), Oddity::Garbage(400)), &options(&[Family::States]), |_| {}).unwrap();
    assert!(report.counts().pass > 5 && report.counts().fail >= 1, "{:?}", report.counts());
    assert!(report.failed().any(|check| check.outcome.detail().contains("99")), "{report:#?}");
    assert!(report.left_in.starts_with("unknown"), "{}", report.left_in);
}

#[test]
fn a_device_whose_data_has_no_end_costs_a_limit_and_runs_again() {
    let endless = target(&loopback(), Oddity::Endless);
    let mut options = options(&[Family::Session, Family::States]);
    (options.limits.state_bytes_max, options.limits.sample_bytes_max) = (1 << 20, 1 << 16);
    let report = run(&endless, &options, |_| {}).unwrap();
    assert!(
        report.failed().any(|check| check.outcome.detail().contains("the data has no end")),
        "{report:#?}"
    );
    assert!(report.counts().pass > 20, "{:?}", report.counts());
    assert_eq!((&report.ended_early, &*report.left_in), (&None, "RUNNING"));
}

#[test]
fn a_device_that_does_not_run_is_reset_only_when_that_is_allowed() {
    let inner = loopback();
    let _stream = inner.set_state(State::Resuming).unwrap();
    let error = run(&target(&inner, Oddity::Nothing), &options(&[Family::States]), |_| {}).unwrap_err();
    assert!(error.to_string().contains("in RESUMING, expected RUNNING; --destructive resets it"), "{error}");
    assert_eq!(inner.state().unwrap(), State::Resuming, "it was not touched");
    let options = Options { destructive: true, ..options(&[Family::States]) };
    let report = run(&target(&inner, Oddity::Nothing), &options, |_| {}).unwrap();
    assert_eq!((report.counts().fail, &*report.left_in), (0, "RUNNING"));
}
