//! How well the downtime is predicted and kept: a guest that dirties its memory at a constant rate, moved over a UNIX
//! socket pair again and again. Prints what was predicted, what it was, and what was allowed.
//!
//! `cargo bench -p limosa-migrate --bench downtime -- [RUNS [LIMIT_MS [DIRTY_MIB_PER_SECOND]]]`

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use limosa_device::{Loopback, Machine};
use limosa_migrate::{
    Convergence, Destination, DirtyLog, FilePages, GuestPages, Ledger, Memory, MemoryRegion, MovedDevice,
    Options, Outcome, PAGE_BYTES, Source, Vmm, WhenStalled, move_local,
};
use limosa_models::synthetic::{Synthetic, SyntheticConfig};
use limosa_protocol::bitmap::DirtyBitmap;
use limosa_testing::memfd;

const BYTES: u64 = 256 << 20;

/// A vCPU that writes to one page after the other at a rate in pages per second, and its dirty log.
struct Vcpu {
    pages: FilePages,
    dirty: DirtyBitmap,
    stopped: Mutex<bool>,
    news: Condvar,
    quit: AtomicBool,
}

impl Vcpu {
    fn run(&self, pages_per_second: f64) {
        let (began, mut written) = (Instant::now(), 0_u64);
        while !self.quit.load(Ordering::SeqCst) {
            let stopped = self.stopped.lock().expect("no panic");
            if *stopped {
                drop(self.news.wait(stopped).expect("no panic"));
                continue;
            }
            // A step each millisecond, under the lock that a stop takes.
            let due = (began.elapsed().as_secs_f64() * pages_per_second) as u64;
            for number in written..due.min(written + 4096) {
                let page = number % (BYTES / PAGE_BYTES);
                self.pages.write(page * PAGE_BYTES, &number.to_le_bytes()).expect("memory");
                self.dirty.set(page);
            }
            written = due.min(written + 4096);
            drop(stopped);
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
}

impl Vmm for Vcpu {
    fn stop(&self) -> Result<(), String> {
        *self.stopped.lock().expect("no panic") = true;
        Ok(())
    }
}

struct Log(Arc<Vcpu>);

impl DirtyLog for Log {
    fn start(&mut self) -> io::Result<()> {
        self.0.dirty.clear();
        Ok(())
    }
    fn harvest(&mut self, _: usize, dirty: &DirtyBitmap) -> io::Result<()> {
        let mut words = vec![0; (BYTES / PAGE_BYTES / 64) as usize];
        self.0.dirty.harvest(0, BYTES / PAGE_BYTES, &mut words);
        dirty.or_words(0, &words, BYTES / PAGE_BYTES);
        Ok(())
    }
    fn stop(&mut self) {}
}

fn memory(fill: u8) -> File {
    let file = memfd(BYTES);
    let pages = FilePages::new(file.try_clone().expect("an fd"), 0);
    let piece = vec![fill; 1 << 20];
    (0..BYTES).step_by(piece.len()).for_each(|at| pages.write(at, &piece).expect("room"));
    file
}

fn device() -> Loopback {
    let config = "state=1M,block=64K,verify=off".parse::<SyntheticConfig>().expect("right");
    Loopback::new("synthetic", Machine::simple(Synthetic::new(config).expect("right")))
}

/// One move: predicted and real downtime, in ms, and the rounds.
fn once(limit: Duration, pages_per_second: f64, files: &[File; 2]) -> (f64, f64, usize) {
    let pages = |file: &File| FilePages::new(file.try_clone().expect("an fd"), 0);
    let vcpu = Arc::new(Vcpu {
        pages: pages(&files[0]),
        dirty: DirtyBitmap::new(BYTES / PAGE_BYTES).expect("room"),
        stopped: Mutex::new(false),
        news: Condvar::new(),
        quit: AtomicBool::new(false),
    });
    let running = Arc::clone(&vcpu);
    let thread = std::thread::spawn(move || running.run(pages_per_second));
    let convergence = Convergence::default().with_downtime_goal(limit).with_when_stalled(WhenStalled::Abort);
    let (options, ledger) = (Options::default().with_convergence(convergence), Ledger::new());
    let (here, there, devices) = (pages(&files[0]), pages(&files[1]), [device(), device()]);
    let region = |pages| MemoryRegion { id: 0, iova: 0, size: BYTES, pages };
    let mut log = Log(Arc::clone(&vcpu));
    let (outcome, _) = move_local(
        Source::new(&[MovedDevice::new(&devices[0])], &options)
            .with_memory(Memory::logged(vec![region(&here)], &mut log))
            .with_vmm(&*vcpu),
        Destination::new(&[MovedDevice::new(&devices[1])], &ledger, &options).with_memory(&[region(&there)]),
    );
    vcpu.quit.store(true, Ordering::SeqCst);
    vcpu.news.notify_all();
    thread.join().expect("no panic");
    let Outcome::Moved(report) = outcome else { panic!("{outcome:?}") };
    let ms = |ns: Option<u64>| ns.map_or(f64::NAN, |ns| ns as f64 / 1e6);
    (ms(report.predicted_downtime_ns), ms(report.downtime_ns), report.rounds.len())
}

fn main() {
    let mut numbers = std::env::args().filter_map(|word| word.parse::<f64>().ok());
    let runs = numbers.next().unwrap_or(20.0) as usize;
    let limit = numbers.next().unwrap_or(30.0);
    let rate = numbers.next().unwrap_or(100.0);
    let files = [memory(1), memory(0)];
    let pages_per_second = rate * f64::from(1 << 20) / PAGE_BYTES as f64;
    let mut errors = Vec::new();
    let mut over = Vec::new();
    println!("{rate} MiB/s dirtied, {limit} ms allowed");
    for run in 1..=runs {
        let (predicted, real, rounds) = once(Duration::from_secs_f64(limit / 1e3), pages_per_second, &files);
        errors.push((predicted - real).abs() / real * 100.0);
        over.push((real - limit) / limit * 100.0);
        println!("{run:>4}  predicted {predicted:>8.2} ms  real {real:>8.2} ms  rounds {rounds}");
    }
    errors.sort_by(f64::total_cmp);
    over.sort_by(f64::total_cmp);
    let worst = |of: &[f64]| of.last().copied().unwrap_or(f64::NAN);
    let median = errors.get(errors.len() / 2).copied().unwrap_or(f64::NAN);
    println!("prediction off by {median:.0} % in the median, {:.0} % at worst", worst(&errors));
    println!("the limit exceeded by {:.0} % at worst (negative: kept)", worst(&over));
}
