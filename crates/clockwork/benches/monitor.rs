//! Compares the cost of a call of this crate with the cost of the standard library's call, in ns.

use std::hint::black_box;
use std::sync::Mutex;
use std::time::Instant;

use limosa_clockwork::{Monitor, now};

const CALLS: u32 = 2_000_000;
const ROUNDS: usize = 9;

/// The lowest mean of several rounds, in ns per call.
fn ns(call: impl Fn()) -> f64 {
    let round = || {
        let began = Instant::now();
        for _ in 0..CALLS {
            call();
        }
        began.elapsed().as_secs_f64() * 1e9 / f64::from(CALLS)
    };
    (0..ROUNDS).map(|_| round()).fold(f64::INFINITY, f64::min)
}

fn main() {
    let (mutex, monitor) = (Mutex::new(0u64), Monitor::new(0u64));
    let mutex_ns = ns(|| *black_box(&mutex).lock().unwrap() += 1);
    let monitor_ns = ns(|| *black_box(&monitor).lock() += 1);
    let instant_ns = ns(|| _ = black_box(Instant::now()));
    let now_ns = ns(|| _ = black_box(now()));
    println!("Mutex::lock {mutex_ns:.1} ns, Monitor::lock {monitor_ns:.1} ns");
    println!("Instant::now {instant_ns:.1} ns, clockwork::now {now_ns:.1} ns");
}
