//! A GiB of guest memory to a file and to an S3 server on a loopback port, and back; how fast, at what cost of processor
//! time in this process, and how much memory of its own the engine has meanwhile. The floor is the same bytes written to a file and put on the disk by themselves.

#[path = "../tests/it/support/server.rs"]
mod server;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::Instant;

use limosa_migrate::{
    AfterLoad, AfterSave, Destination, FilePages, Ledger, Memory, MemoryRegion, Options, Outcome, Received,
    SnapshotFile, SnapshotSource, SnapshotTarget, Source, verify,
};
use limosa_store::Object;
use limosa_testing::memfd;
use server::{BUCKET, Server};

const BYTES: u64 = 1 << 30;
const PIECE_BYTES: usize = 1 << 20;

fn main() {
    // `cargo bench` and `cargo test` give arguments of their own.
    if std::env::var_os("LIMOSA_BENCH_SERVER").is_some() {
        return serve();
    }
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let mut server = Command::new(std::env::current_exe().unwrap())
        .env("LIMOSA_BENCH_SERVER", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut variables = Vec::new();
    for line in BufReader::new(server.stdout.take().unwrap()).lines() {
        match line.unwrap().split_once('=') {
            Some((name, value)) => variables.push((name.to_owned(), value.to_owned())),
            None => break,
        }
    }
    let guest = guest(true);
    let idle = self::guest(false);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guest");
    measure("write and sync a file (floor)", || floor(&guest, &folder.path().join("floor")));
    let file = SnapshotFile::new(&path);
    measure("save to a file", || save(&guest, &file));
    measure("verify a file", || check(&file));
    measure("load from a file", || load(&idle, &file));
    let object = Object::new(&format!("s3://{BUCKET}/guest"), variables).unwrap();
    measure("save to S3", || save(&guest, &object));
    measure("verify in S3", || check(&object));
    measure("load from S3", || load(&idle, &object));
    drop(server.stdin.take());
    server.wait().unwrap();
}

/// Says where it is, and stays until nobody wants it any more.
fn serve() {
    let server = Server::start();
    for (name, value) in server.variables() {
        println!("{name}={value}");
    }
    println!("ready");
    std::io::stdout().flush().unwrap();
    let _ = std::io::stdin().read(&mut [0]);
}

fn guest(touched: bool) -> File {
    let file = memfd(BYTES);
    let mut piece: Vec<u8> =
        (0..PIECE_BYTES as u64 / 8).flat_map(|word| (word | 1 << 60).to_le_bytes()).collect();
    for at in (0..BYTES).step_by(PIECE_BYTES).take_while(|_| touched) {
        piece[..8].copy_from_slice(&at.to_le_bytes());
        file.write_all_at(&piece, at).unwrap();
    }
    file
}

fn measure(what: &str, act: impl FnOnce()) {
    // Resets the peak (proc(5): clear_refs).
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let (before, began, busy) = (kibibytes("VmRSS:"), Instant::now(), cpu_seconds());
    act();
    let (seconds, busy) = (began.elapsed().as_secs_f64(), cpu_seconds() - busy);
    let peak = kibibytes("VmHWM:").saturating_sub(before) / 1024;
    let rate = BYTES as f64 / f64::from(1 << 20) / seconds;
    println!("{what:<32} {rate:>8.0} MiB/s {busy:>6.2} CPU s   at most {peak:>3} MiB of memory");
}

/// What this process has used of the processors: proc(5), stat, the 14th and 15th field, in hundredths.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let ticks: u64 =
        fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum();
    ticks as f64 / 100.0
}

fn check(from: &dyn SnapshotSource) {
    assert!(verify(from, Options::default().silence_max, None).unwrap().sealed);
}

fn kibibytes(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn floor(guest: &File, path: &std::path::Path) {
    let (mut to, mut piece) = (File::create(path).unwrap(), vec![0; PIECE_BYTES]);
    for at in (0..BYTES).step_by(PIECE_BYTES) {
        guest.read_exact_at(&mut piece, at).unwrap();
        to.write_all(&piece).unwrap();
    }
    to.sync_all().unwrap();
    std::fs::remove_file(path).unwrap();
}

fn save(guest: &File, to: &dyn SnapshotTarget) {
    let pages = FilePages::new(guest.try_clone().unwrap(), 0);
    let (options, region) = (Options::default(), MemoryRegion { id: 0, iova: 0, size: BYTES, pages: &pages });
    let source = Source::new(&[], &options).with_memory(Memory::stopped(vec![region]));
    let outcome = source.save(to, AfterSave::Run);
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
}

fn load(guest: &File, from: &dyn SnapshotSource) {
    let pages = FilePages::new(guest.try_clone().unwrap(), 0);
    let (options, ledger) = (Options::default(), Ledger::new());
    let regions = [MemoryRegion { id: 0, iova: 0, size: BYTES, pages: &pages }];
    let destination = Destination::new(&[], &ledger, &options).with_memory(&regions);
    let received = destination.load(from, AfterLoad::Stop);
    assert!(matches!(received, Received::Stopped(_)), "{received:?}");
}
