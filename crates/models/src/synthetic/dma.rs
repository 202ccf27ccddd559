//! DMA into guest memory: a thread that writes stamped pages into a window, at a rate, each with the next sequence
//! number. The sequence number determines the expected contents of every page of the window ([`Window::expected`]).

use std::str::FromStr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use limosa_device::Bus;
use limosa_device::pci::Function;
use limosa_protocol::Errno;
use zerocopy::IntoBytes;

use super::stamp::{PAGE_BYTES, Stamp, StampError, mix, verify_page};

/// Which page of the window is written next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// One after the other, round and round.
    #[default]
    Sequential,
    /// Any, decided by seed and sequence number.
    Random,
    /// Always the first.
    OnePage,
}

impl Pattern {
    /// The pattern with this number in the register.
    pub fn from_raw(number: u64) -> Option<Pattern> {
        [Pattern::Sequential, Pattern::Random, Pattern::OnePage].into_iter().find(|p| p.raw() == number)
    }

    /// The number in the register.
    pub const fn raw(self) -> u64 {
        self as u64
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Pattern, String> {
        match text {
            "sequential" => Ok(Pattern::Sequential),
            "random" => Ok(Pattern::Random),
            "one-page" => Ok(Pattern::OnePage),
            _ => Err("expected sequential, random or one-page".into()),
        }
    }
}

/// The window that a device writes to, with the data that a client needs to check the writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The device's seed.
    pub seed: u64,
    /// Pages of [`PAGE_BYTES`] bytes.
    pub pages: u64,
    /// In which order.
    pub pattern: Pattern,
}

impl Window {
    /// The page that a write goes to.
    pub fn page_of(&self, sequence: u64) -> u64 {
        match self.pattern {
            Pattern::Sequential => sequence % self.pages.max(1),
            Pattern::Random => mix(self.seed ^ mix(sequence)) % self.pages.max(1),
            Pattern::OnePage => 0,
        }
    }

    /// For each page the sequence number of the last of `writes` writes that went to it; `None`
    /// for a page that was not written. Takes time and memory in proportion to the window.
    pub fn expected(&self, writes: u64) -> Vec<Option<u64>> {
        let mut last = vec![None; self.pages as usize];
        // In sequence the last round tells all; at random, walk back until every page was met.
        let mut missing = last.len();
        for sequence in (0..writes).rev() {
            let page = &mut last[self.page_of(sequence) as usize];
            if page.is_none() {
                *page = Some(sequence);
                missing -= 1;
            }
            if missing == 0 || self.pattern == Pattern::OnePage {
                break;
            }
        }
        last
    }

    /// Checks one page of a window: compares its contents with the expected ones (see [`Window::expected`]).
    pub fn check(&self, index: u64, expected: Option<u64>, page: &[u8]) -> Result<(), String> {
        match (expected, verify_page(page)) {
            (None, Err(StampError::Unstamped)) => Ok(()),
            (Some(sequence), Ok(stamp)) if stamp == (Stamp { seed: self.seed, index, sequence }) => Ok(()),
            (want, Ok(stamp)) => Err(format!("page {index}: expected write {want:?}, found {stamp:?}")),
            (want, Err(error)) => Err(format!("page {index}: expected write {want:?}, but {error}")),
        }
    }
}

/// The registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Registers {
    /// IOVA of the window.
    pub(super) base: u64,
    pub(super) pages: u64,
    pub(super) pattern: Pattern,
    /// Bytes each second; 0 for as fast as possible.
    pub(super) rate: u64,
    /// Stops by itself at this sequence number; 0 for never.
    pub(super) limit: u64,
    /// The next write's number; the writes done.
    pub(super) sequence: u64,
    pub(super) enabled: bool,
    /// The last write was refused.
    pub(super) failed: bool,
}

struct Shared {
    bus: Bus,
    /// Raises the interrupt.
    function: Arc<Mutex<Function>>,
    state: Mutex<Engine>,
    /// There may be something to do.
    work: Condvar,
    /// A write is over.
    idle: Condvar,
}

struct Engine {
    seed: u64,
    registers: Registers,
    /// The device is in a state that runs.
    running: bool,
    /// A write is under way.
    busy: bool,
    quit: bool,
    pace: Pace,
}

/// When the next write is due: `written` pages after `since`.
struct Pace {
    since: Instant,
    written: u64,
}

/// Lost time up to this long is made good; a longer break is not.
const CATCH_UP_MAX: Duration = Duration::from_millis(20);

impl Pace {
    fn new() -> Pace {
        Pace { since: Instant::now(), written: 0 }
    }

    /// How long to wait for the next write.
    fn wait(&mut self, rate: u64) -> Duration {
        if rate == 0 {
            return Duration::ZERO;
        }
        let due = Duration::from_secs_f64(self.written as f64 * PAGE_BYTES as f64 / rate as f64);
        let past = self.since.elapsed();
        if past > due + CATCH_UP_MAX {
            *self = Pace::new();
        }
        due.saturating_sub(past)
    }
}

/// The thread, and the way to it.
pub(super) struct Dma {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Dma {
    /// Starts the thread, with the device running and the engine not enabled.
    pub(super) fn new(
        bus: Bus,
        function: Arc<Mutex<Function>>,
        seed: u64,
        registers: Registers,
    ) -> std::io::Result<Dma> {
        let state = Engine { seed, registers, running: true, busy: false, quit: false, pace: Pace::new() };
        let shared = Arc::new(Shared {
            bus,
            function,
            state: Mutex::new(state),
            work: Condvar::new(),
            idle: Condvar::new(),
        });
        let worker = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("synthetic-dma".into()).spawn(move || worker.run())?;
        Ok(Dma { shared, thread: Some(thread) })
    }

    pub(super) fn registers(&self) -> Registers {
        self.shared.lock().registers
    }

    /// Lets the thread write only while the device runs. Once this has returned for `false`,
    /// nothing is under way.
    pub(super) fn set_running(&self, running: bool) {
        let mut engine = self.shared.lock();
        engine.running = running;
        self.shared.settle(engine);
    }

    /// Starts or stops the engine. Once this has returned for `false`, nothing is under way.
    pub(super) fn enable(&self, on: bool) -> Result<(), Errno> {
        let mut engine = self.shared.lock();
        if on && engine.registers.pages == 0 {
            return Err(Errno::EINVAL);
        }
        let done = engine.registers.limit != 0 && engine.registers.sequence >= engine.registers.limit;
        engine.registers.enabled = on && !done;
        engine.registers.failed &= !on;
        self.shared.settle(engine);
        Ok(())
    }

    /// Changes the registers: EBUSY while the engine is enabled.
    pub(super) fn change(&self, change: impl FnOnce(&mut Registers)) -> Result<(), Errno> {
        let mut engine = self.shared.lock();
        if engine.registers.enabled {
            return Err(Errno::EBUSY);
        }
        change(&mut engine.registers);
        Ok(())
    }

    /// Changes the rate, which may be done at any time.
    pub(super) fn set_rate(&self, rate: u64) {
        let mut engine = self.shared.lock();
        engine.registers.rate = rate;
        self.shared.settle(engine);
    }

    /// Puts everything in place: for a load or a reset. Waits until nothing is under way.
    pub(super) fn replace(&self, seed: u64, registers: Registers, running: bool) {
        let mut engine = self.shared.lock();
        engine.running = false;
        let mut engine = self.shared.until_idle(engine);
        (engine.seed, engine.registers, engine.running) = (seed, registers, running);
        self.shared.settle(engine);
    }
}

impl Drop for Dma {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.work.notify_all();
        if let Some(thread) = self.thread.take() {
            // It panics only if guest memory or interrupts do; then there is nothing to wait for.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Engine> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// After a change: wakes the thread when there is work, else waits until it has ended.
    fn settle(&self, mut engine: MutexGuard<'_, Engine>) {
        engine.pace = Pace::new();
        // A thread that would find no work is not woken: many devices that stop at once would have as many to run.
        match engine.running && engine.registers.enabled {
            true => self.work.notify_all(),
            false => drop(self.until_idle(engine)),
        }
    }

    fn until_idle<'a>(&'a self, mut engine: MutexGuard<'a, Engine>) -> MutexGuard<'a, Engine> {
        while engine.busy {
            engine = self.idle.wait(engine).unwrap_or_else(PoisonError::into_inner);
        }
        engine
    }

    fn run(&self) {
        let mut page = [0; PAGE_BYTES / 8];
        let mut engine = self.lock();
        while !engine.quit {
            if !(engine.running && engine.registers.enabled) {
                engine = self.work.wait(engine).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let rate = engine.registers.rate;
            let wait = engine.pace.wait(rate);
            if !wait.is_zero() {
                let waited = self.work.wait_timeout(engine, wait);
                engine = waited.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            engine.busy = true;
            let (seed, registers) = (engine.seed, engine.registers);
            drop(engine);
            let written = self.write(seed, &registers, &mut page);
            engine = self.lock();
            engine.busy = false;
            if engine.finish(written) {
                self.interrupt();
            }
            self.idle.notify_all();
        }
    }

    /// Sends the message. The engine's lock is held, so that who hears it reads what it stands for.
    fn interrupt(&self) {
        let mut function = self.function.lock().unwrap_or_else(PoisonError::into_inner);
        function.raise(0, &self.bus.interrupts);
        function.lower(0, &self.bus.interrupts);
    }

    fn write(&self, seed: u64, registers: &Registers, page: &mut [u64]) -> Result<(), Errno> {
        let Registers { base, pages, pattern, sequence, .. } = *registers;
        let index = Window { seed, pages, pattern }.page_of(sequence);
        Stamp { seed, index, sequence }.fill(page);
        let iova = index.checked_mul(PAGE_BYTES as u64).and_then(|at| at.checked_add(base));
        self.bus.memory.write(iova.ok_or(Errno::EFAULT)?, page.as_bytes())
    }
}

impl Engine {
    /// Counts a write, and says whether the engine turned itself off.
    fn finish(&mut self, written: Result<(), Errno>) -> bool {
        let registers = &mut self.registers;
        match written {
            Ok(()) => {
                registers.sequence += 1;
                self.pace.written += 1;
                if registers.sequence != registers.limit {
                    return false;
                }
            }
            Err(errno) => {
                tracing::warn!(%errno, sequence = registers.sequence, "DMA write failed; the engine stops");
                registers.failed = true;
            }
        }
        registers.enabled = false;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expected_names_the_last_write_to_each_page() {
        for pattern in [Pattern::Sequential, Pattern::Random, Pattern::OnePage] {
            let window = Window { seed: 3, pages: 7, pattern };
            for writes in [0, 1, 6, 7, 8, 100] {
                let mut want = vec![None; 7];
                (0..writes).for_each(|sequence| want[window.page_of(sequence) as usize] = Some(sequence));
                assert_eq!(window.expected(writes), want, "{pattern:?} {writes}");
            }
        }
    }
}
