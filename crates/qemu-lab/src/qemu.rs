//! A process of QEMU with served devices.

use std::env;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use limosa_testing::{Ended, LIMIT, Process, Transcript, beside_the_test};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;
use tempfile::TempDir;

use crate::{Guest, Qmp, Qtest, initramfs};

/// Bytes of guest memory, all of it below the first hole.
pub const RAM_BYTES: u64 = 256 << 20;

/// The slot of the first device; each further one is in the next slot.
const FIRST_SLOT: u8 = 5;

/// How QEMU is to be started.
pub struct QemuBuilder {
    sockets: Vec<PathBuf>,
    is_shared: bool,
    extra: Vec<String>,
    trace: Option<PathBuf>,
}

/// QEMU, which does not outlive this.
pub struct Qemu {
    process: Process,
    /// Sockets, and the guest's initramfs.
    folder: TempDir,
    qmp: Qmp,
}

impl QemuBuilder {
    /// With the device that is served at this path, in the next slot from 5 on.
    #[must_use]
    pub fn device(mut self, socket: impl AsRef<Path>) -> QemuBuilder {
        self.sockets.push(socket.as_ref().to_owned());
        self
    }

    /// With memory that QEMU does not share, so that devices have to reach it by messages.
    #[must_use]
    pub fn private_memory(mut self) -> QemuBuilder {
        self.is_shared = false;
        self
    }

    /// With a further option.
    #[must_use]
    pub fn option(mut self, option: &str) -> QemuBuilder {
        self.extra.push(option.to_owned());
        self
    }

    /// Traced by the command, which writes to this file.
    #[must_use]
    pub fn traced(mut self, file: impl AsRef<Path>) -> QemuBuilder {
        self.trace = Some(file.as_ref().to_owned());
        self
    }

    /// Starts it without a processor: the test is the guest.
    pub fn qtest(self) -> (Qemu, Qtest) {
        let folder = tempfile::tempdir().expect("a folder for sockets");
        let path = folder.path().join("qtest.sock");
        let listener = UnixListener::bind(&path).expect("a socket for qtest");
        let args =
            ["-accel", "qtest", "-qtest-log", "/dev/null", "-qtest", &format!("unix:{}", path.display())]
                .map(str::to_owned);
        let qemu = self.start(folder, &args);
        let stream = qemu.accept(&listener);
        (qemu, Qtest::new(stream))
    }

    /// Boots Linux under emulation, and waits until the guest takes jobs.
    pub fn guest(self) -> (Qemu, Guest) {
        let folder = tempfile::tempdir().expect("a folder for sockets");
        let initramfs = folder.path().join("initramfs");
        initramfs::write(&initramfs, &beside_the_test("limosa-qemu-guest"));
        let path = folder.path().join("jobs.sock");
        let listener = UnixListener::bind(&path).expect("a socket for the guest's jobs");
        let console = folder.path().join("console");
        let args = [
            "-accel",
            "tcg",
            "-cpu",
            "qemu64",
            "-no-reboot",
            "-kernel",
            prepared().join("vmlinuz").to_str().expect("a path of the lab"),
            "-initrd",
            initramfs.to_str().expect("a path of ours"),
            "-append",
            "console=ttyS0 loglevel=7 panic=-1 mitigations=off tsc=reliable hugepages=2",
            "-chardev",
            &format!("file,id=console,path={}", console.display()),
            "-serial",
            "chardev:console",
            "-chardev",
            &format!("socket,id=jobs,path={}", path.display()),
            "-serial",
            "chardev:jobs",
        ]
        .map(str::to_owned);
        let qemu = self.start(folder, &args);
        let stream = qemu.accept(&listener);
        let transcript = qemu.transcript().clone();
        (qemu, Guest::new(stream, console, transcript))
    }

    fn start(self, folder: TempDir, accelerator: &[String]) -> Qemu {
        let qmp = folder.path().join("qmp.sock");
        let listener = UnixListener::bind(&qmp).expect("a socket for QMP");
        let share = if self.is_shared { "on" } else { "off" };
        let kind = if self.is_shared { "memfd" } else { "ram" };
        let program = prepared().join("qemu-system-x86_64");
        let mut command = match &self.trace {
            None => Command::new(program),
            Some(file) => {
                let mut command = Command::new(beside_the_test("limosa"));
                // QEMU would outlive a tracer that is killed.
                command.args(["trace", "-o"]).arg(file).args(["--", "setpriv", "--pdeathsig", "KILL"]);
                command.arg(program);
                command
            }
        };
        command
            .args(accelerator)
            .args(["-machine", "pc,memory-backend=ram", "-m", &format!("{}M", RAM_BYTES >> 20)])
            .arg("-object")
            .arg(format!("memory-backend-{kind},id=ram,size={}M,share={share}", RAM_BYTES >> 20))
            .args(["-nodefaults", "-display", "none", "-qmp", &format!("unix:{}", qmp.display())])
            .args(&self.extra);
        for (index, socket) in self.sockets.iter().enumerate() {
            let device = json!({
                "driver": "vfio-user-pci",
                "id": format!("device{index}"),
                "addr": format!("{:#x}", FIRST_SLOT as usize + index),
                "socket": { "type": "unix", "path": socket },
            });
            command.args(["-device", &device.to_string()]);
        }
        let process = Process::start(&mut command);
        let stream = accept(&process, &listener);
        let qmp = Qmp::new(stream, process.transcript().clone());
        Qemu { process, folder, qmp }
    }
}

impl Qemu {
    /// A QEMU with shared memory and no devices.
    pub fn builder() -> QemuBuilder {
        QemuBuilder { sockets: Vec::new(), is_shared: true, extra: Vec::new(), trace: None }
    }

    /// The slot of device number `index`.
    pub fn slot(index: u8) -> u8 {
        FIRST_SLOT + index
    }

    /// Its machine protocol.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// What it said.
    pub fn transcript(&self) -> &Transcript {
        self.process.transcript()
    }

    /// Tells it to end, and waits until it has: its exit code, or that of the command that traces it.
    pub fn quit(mut self) -> i32 {
        self.qmp.execute("quit", json!({}));
        self.process.end().code
    }

    /// Waits for an end that nobody tells it to come to, and says how it ended.
    pub fn ended_by_itself(self) -> Ended {
        self.process.end()
    }

    /// A folder that goes with it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The connection that QEMU makes to a socket of ours.
    fn accept(&self, listener: &UnixListener) -> UnixStream {
        accept(&self.process, listener)
    }
}

/// Waits for QEMU to connect: while it starts it does, or it ends.
fn accept(qemu: &Process, listener: &UnixListener) -> UnixStream {
    let pid = qemu.pid().parse().ok().and_then(Pid::from_raw).expect("a process has a number");
    let process = pidfd_open(pid, PidfdFlags::empty()).expect("a child of ours");
    let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(&process, PollFlags::IN)];
    let limit = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
    let ready = poll(&mut fds, Some(&limit)).expect("poll");
    assert!(ready > 0, "QEMU neither connects nor ends: {}", qemu.err());
    if fds[0].revents().contains(PollFlags::IN) {
        return listener.accept().expect("QEMU connects").0;
    }
    qemu.transcript().end();
    panic!("QEMU ended: {}", qemu.err());
}

/// The folder that `lab/qemu/prepare` made.
fn prepared() -> PathBuf {
    let folder = env::var_os("LIMOSA_LAB_QEMU_FOLDER");
    PathBuf::from(folder.expect("LIMOSA_LAB_QEMU_FOLDER is not set: these tests are run by lab/qemu/run"))
}
