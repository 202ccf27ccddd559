//! How long a client waits while its server's process is replaced: `cargo bench -p limosa --bench switch_over`.
//!
//! A synthetic device with 4 MiB of state and 1 GiB of guest memory mapped; a register is read every 50 us. A run's blackout is
//! the longest time without an answered read. After each run the same is measured for as long while nothing is replaced: what the
//! machine's other work costs the client. LIMOSA_BENCH_RUNS sets the number of runs (200).

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use limosa_client::{Device, DmaMap, DmaMemory};
use limosa_models::synthetic::{REGISTERS_REGION, registers};
use limosa_protocol::info::DmaMapFlags;
use limosa_vfio_user::client::{Client, Options};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

const MEMORY_BYTES: u64 = 1 << 30;
const BETWEEN: Duration = Duration::from_micros(50);

fn main() -> anyhow::Result<()> {
    // `cargo test --benches` only wants to know that it runs.
    let is_smoke = !std::env::args().any(|argument| argument == "--bench");
    let runs = std::env::var("LIMOSA_BENCH_RUNS").ok().and_then(|text| text.parse().ok());
    let runs = if is_smoke { 2 } else { runs.unwrap_or(200) };
    let folder = tempfile::tempdir()?;
    let mut server = serve(folder.path(), false)?;
    let client = Client::connect(folder.path().join("device"), Options::default())?;
    let memory = File::from(memfd_create("guest", MemfdFlags::CLOEXEC)?);
    fallocate(&memory, FallocateFlags::empty(), 0, MEMORY_BYTES)?;
    let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
    let file = DmaMemory::File { fd: memory.as_fd(), offset: 0 };
    client.dma_map(&DmaMap { iova: 0, size: MEMORY_BYTES, flags, memory: file })?;

    let (mut blackouts, mut undisturbed) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        let began = Instant::now();
        let ends = AtomicBool::new(false);
        let blackout = std::thread::scope(|scope| {
            let blackout = scope.spawn(|| longest_wait(&client, || ends.load(Ordering::Relaxed)));
            let replaced = serve(folder.path(), true).map(|new| std::mem::replace(&mut server, new));
            ends.store(true, Ordering::Relaxed);
            ensure!(replaced?.wait()?.success(), "the old server failed");
            blackout.join().map_err(|_| anyhow::anyhow!("the client panicked"))?
        })?;
        blackouts.push(blackout);
        let until = Instant::now() + began.elapsed();
        undisturbed.push(longest_wait(&client, || Instant::now() >= until)?);
    }
    server.kill()?;
    server.wait()?;
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("blackout over {runs} runs: {}; load {}", percentiles(blackouts), load.trim());
    println!("longest wait while nothing is replaced: {}", percentiles(undisturbed));
    Ok(())
}

fn percentiles(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)];
    format!("p50 {:?}, p90 {:?}, p95 {:?}, p99 {:?}, max {:?}", at(50), at(90), at(95), at(99), at(100))
}

/// The longest time between two answers.
fn longest_wait(client: &Client, ends: impl Fn() -> bool) -> anyhow::Result<Duration> {
    let (mut longest, mut answered) = (Duration::ZERO, Instant::now());
    while !ends() {
        client.region_read(REGISTERS_REGION, registers::SEED, &mut [0; 8])?;
        let now = Instant::now();
        longest = longest.max(now - answered);
        answered = now;
        std::thread::sleep(BETWEEN);
    }
    Ok(longest)
}

/// Starts a server, and waits until it serves and the one before it has ended.
fn serve(folder: &Path, takes: bool) -> anyhow::Result<Child> {
    let takeover = folder.join("takeover");
    let mut command = Command::new(env!("CARGO_BIN_EXE_limosa"));
    command.args(["serve", "synthetic", "-o", "state=4M", "--socket"]).arg(folder.join("device"));
    command.arg("--takeover").arg(&takeover);
    if takes {
        command.arg("--take-from").arg(&takeover);
    }
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("standard output")?).read_line(&mut line)?;
    ensure!(line.starts_with("listening on "), "the server said `{line}`");
    Ok(child)
}
