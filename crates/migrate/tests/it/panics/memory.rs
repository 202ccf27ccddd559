//! Panics of guest memory and of its log.

use super::{FLAGS, Machine, panicked};
use crate::common::hooked::{Call, before, ends_in_time, panic_quietly};
use limosa_client::DeviceExt;
use limosa_migrate::{DirtyLog, GuestPages, Outcome};
use limosa_protocol::State;
use limosa_protocol::bitmap::DirtyBitmap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Memory that panics.
pub(super) struct PanickingPages {
    pub(super) bytes: Mutex<Vec<u8>>,
    pub(super) panics: Option<&'static str>,
}

impl PanickingPages {
    fn call(&self, place: &str) {
        if self.panics == Some(place) {
            panic_quietly();
        }
    }
}

impl GuestPages for PanickingPages {
    fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.call("read");
        into.copy_from_slice(&self.bytes.lock().unwrap()[offset as usize..][..into.len()]);
        Ok(())
    }
    fn write(&self, offset: u64, from: &[u8]) -> std::io::Result<()> {
        self.call("write");
        self.bytes.lock().unwrap()[offset as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }
    fn data(&self, range: Range<u64>) -> std::io::Result<Option<Range<u64>>> {
        self.call("data");
        Ok((!range.is_empty()).then_some(range))
    }
    fn zero(&self, _: u64, _: u64) -> std::io::Result<()> {
        self.call("zero");
        Ok(())
    }
}

#[test]
fn a_panic_of_guest_memory_is_an_error() {
    for (side, at) in [(0, "read"), (0, "data"), (1, "write"), (1, "zero"), (1, "read"), (1, "data")] {
        ends_in_time(at, move || {
            let mut machine = Machine::new(FLAGS);
            let mut bytes = machine.memory[side].bytes.lock().unwrap().clone();
            if at == "zero" {
                // What is zero already is not made zero.
                bytes.fill(7);
            }
            let bytes = Mutex::new(bytes);
            machine.memory[side] = Arc::new(PanickingPages { bytes, panics: Some(at) });
            let (outcome, received) = machine.run();
            machine.check(&outcome, &received, at);
            assert!(matches!(outcome, Outcome::Undone { .. }), "{at}: {outcome:?}");
            let place = panicked(&outcome, &received).unwrap_or_default();
            assert!(place.starts_with(&format!("GuestPages::{at} at 0x")), "{at}: {outcome:?}");
        });
    }
}

/// A log that panics.
pub(super) struct PanickingLog {
    pub(super) panics: Option<&'static str>,
    pub(super) always_dirty: bool,
    pub(super) started: Arc<AtomicBool>,
    pub(super) stopped: Arc<AtomicBool>,
}

impl PanickingLog {
    pub(super) fn new(panics: Option<&'static str>) -> PanickingLog {
        PanickingLog { panics, always_dirty: false, started: Arc::default(), stopped: Arc::default() }
    }
    fn call(&self, place: &str) {
        if self.panics == Some(place) {
            panic_quietly();
        }
    }
}

impl DirtyLog for PanickingLog {
    fn start(&mut self) -> std::io::Result<()> {
        self.started.store(true, Ordering::SeqCst);
        self.call("start");
        Ok(())
    }
    fn harvest(&mut self, _: usize, dirty: &DirtyBitmap) -> std::io::Result<()> {
        self.call("harvest");
        if self.always_dirty {
            dirty.set_range(0, dirty.pages());
        }
        Ok(())
    }
    fn give_back(&mut self, _: usize, _: &DirtyBitmap) {
        self.call("give_back");
    }
    fn stop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.call("stop");
    }
    fn covers_devices(&self) -> bool {
        true
    }
}

#[test]
fn a_panic_of_the_dirty_log_is_an_error_and_the_log_is_stopped() {
    // The last two are on the way back, which a panic does not end.
    for (at, moves) in [("start", false), ("harvest", false), ("give_back", false), ("stop", true)] {
        ends_in_time(at, move || {
            let mut machine = Machine::new(FLAGS);
            machine.log = PanickingLog::new(Some(at));
            if at == "give_back" {
                machine.destination =
                    machine.destination.hook(before(Call::Set(State::Stop), |_| panic_quietly()));
            }
            let stopped = machine.log.stopped.clone();
            let (outcome, received) = machine.run();
            machine.check(&outcome, &received, at);
            assert_eq!(matches!(outcome, Outcome::Moved(_)), moves, "{at}: {outcome:?}");
            assert!(stopped.load(Ordering::SeqCst), "{at}: the log was left on");
            assert!(machine.source.dma_logging_stop().is_err(), "{at}: the device's log was left on");
            let notes = match &outcome {
                Outcome::Moved(report) | Outcome::Undone { report, .. } => &report.notes,
                Outcome::InDoubt(doubt) => panic!("{at}: {doubt:?}"),
            };
            let place = format!("DirtyLog::{at}");
            let told = panicked(&outcome, &received).is_some_and(|told| told == place)
                || notes.iter().any(|note| note.contains(&format!("{place} panicked")));
            assert!(told, "{at}: {outcome:?}");
        });
    }
}
