//! The agent: runs programs of its machine, and reads and writes files there, for a controller elsewhere. One
//! connection is one program, which does not outlive it, or one file.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Error, ErrorKind, Read};
use std::net::{TcpListener, TcpStream};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustix::process::{Pid, Signal, kill_process_group};

use crate::frame;

/// How many programs an agent runs at a time.
const PROGRAMS_MAX: usize = 64;

/// Serves whoever connects, for ever.
pub fn serve(listener: &TcpListener) -> io::Result<()> {
    static PROGRAMS: AtomicUsize = AtomicUsize::new(0);
    loop {
        let (link, _) = listener.accept()?;
        if PROGRAMS.fetch_add(1, Ordering::Relaxed) >= PROGRAMS_MAX {
            let _ = frame::send(&link, frame::FAILED, b"too many programs at once");
            PROGRAMS.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        thread::spawn(move || {
            if let Err(error) = answer(&link) {
                // Whoever is gone does not hear it.
                let _ = frame::send(&link, frame::FAILED, error.to_string().as_bytes());
            }
            PROGRAMS.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// Does what the controller asks.
fn answer(link: &TcpStream) -> io::Result<()> {
    link.set_nodelay(true)?;
    let (kind, payload) = frame::receive(link)?;
    let bad = |what| Error::new(ErrorKind::InvalidData, what);
    let path = |path: &[u8]| PathBuf::from(OsStr::from_bytes(path));
    match kind {
        frame::RUN => run(link, payload.strip_suffix(b"\0").ok_or_else(|| bad("no program to run"))?),
        frame::WRITE => {
            let at = payload.iter().position(|&byte| byte == 0).ok_or_else(|| bad("no file to write"))?;
            named(&path(&payload[..at]), |file| fs::write(file, &payload[at + 1..]))?;
            frame::send(link, frame::END, &[0; 4])
        }
        frame::READ => {
            let mut text = Vec::new();
            let limit = frame::PAYLOAD_MAX as u64;
            named(&path(&payload), |file| File::open(file)?.take(limit).read_to_end(&mut text))?;
            frame::send(link, frame::OUT, &text)?;
            frame::send(link, frame::END, &[0; 4])
        }
        _ => Err(bad("neither a program nor a file is asked for")),
    }
}

/// An error says which file it is about.
fn named<T>(file: &Path, work: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    work(file).map_err(|error| Error::new(error.kind(), format!("{}: {error}", file.display())))
}

/// Runs the program that the controller names, to its end or the controller's.
fn run(link: &TcpStream, arguments: &[u8]) -> io::Result<()> {
    let mut arguments = arguments.split(|&byte| byte == 0).map(OsStr::from_bytes);
    let program = arguments.next().unwrap_or_default();
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Of its own, so that what it started is reached too.
        .process_group(0)
        .spawn()
        .map_err(|error| Error::new(error.kind(), format!("{}: {error}", program.display())))?;
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a process has a number");
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let said = Mutex::new(link);
    let status = thread::scope(|threads| {
        threads.spawn(|| pass(out, frame::OUT, &said));
        threads.spawn(|| pass(err, frame::ERR, &said));
        threads.spawn(|| obey(link, group));
        let status = child.wait();
        // What it left behind would keep its output open.
        let _ = kill_process_group(group, Signal::KILL);
        // The one that obeys waits for the controller.
        let _ = link.shutdown(std::net::Shutdown::Read);
        status
    })?;
    let code = status.code().unwrap_or_else(|| -status.signal().unwrap_or(0));
    frame::send(link, frame::END, &code.to_le_bytes())
}

/// Passes on what the program says.
fn pass(from: Option<impl Read>, kind: u8, to: &Mutex<&TcpStream>) {
    let Some(mut from) = from else { return };
    let mut piece = vec![0; frame::PAYLOAD_MAX];
    while let Ok(bytes @ 1..) = from.read(&mut piece) {
        let Ok(to) = to.lock() else { return };
        // The program is ended when the link is, so it need not be told here.
        let _ = frame::send(*to, kind, &piece[..bytes]);
    }
}

/// Gives the program the controller's signals, and SIGKILL when the controller is gone.
fn obey(link: &TcpStream, group: Pid) {
    while let Ok((frame::SIGNAL, payload)) = frame::receive(link) {
        if let Some(signal) = frame::number(&payload).ok().and_then(Signal::from_named_raw) {
            let _ = kill_process_group(group, signal);
        }
    }
    let _ = kill_process_group(group, Signal::KILL);
}
