//! The command as a process of this machine, and devices that it is told to move.
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::path::PathBuf;

use limosa_client::{Chunk, Device, DeviceExt};
use limosa_lab::{Ended, Kind, Machine, Mdev, Running};
use limosa_protocol::State;
use limosa_vfio_kernel::{KernelDevice, Options};

/// Exit codes, as `limosa --help` has them.
pub const FAILED: i32 = 1;
pub const USAGE: i32 = 2;
pub const REFUSED: i32 = 3;
pub const UNREACHABLE: i32 = 4;

pub const DOORS: [&str; 2] = ["cdev", "group"];

/// Where the command runs.
pub struct Here(Machine);

impl Here {
    pub fn new() -> Here {
        Here(Machine::here())
    }

    #[track_caller]
    pub fn start(&self, args: &[&str]) -> Running {
        self.start_as(&[], args)
    }

    /// By another program, such as `setpriv`.
    #[track_caller]
    pub fn start_as(&self, by: &[&str], args: &[&str]) -> Running {
        let program = limosa_lab::limosa().get_program().to_str().unwrap().to_owned();
        self.0.start(&[by, &[program.as_str()], args].concat())
    }

    /// Runs it to its end.
    #[track_caller]
    pub fn limosa(&self, args: &[&str]) -> Ended {
        self.start(args).end()
    }

    /// It does what it is told; what it prints.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        self.limosa(args).ok()
    }

    /// It holds the device: that process, and the name by which others reach the device.
    #[track_caller]
    pub fn holds(&self, args: &[&str]) -> (Running, String) {
        let running = self.start(args);
        let line = running.line("holding ");
        let name = line.split_once(" as ").and_then(|(_, rest)| rest.split_once(" until"));
        let name = name.unwrap_or_else(|| panic!("no name in `{line}`")).0.to_owned();
        (running, name)
    }
}

/// A fresh name for a file or socket.
pub fn path(name: &str) -> String {
    static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path: PathBuf = std::env::temp_dir().join(format!("command-{}-{number}-{name}", std::process::id()));
    path.to_str().unwrap().to_owned()
}

pub fn mtty() -> Kind {
    kind("mtty-1")
}

/// The kind of the lab's own that can do everything.
pub fn full() -> Kind {
    kind("limosa-full")
}

pub fn kind(name: &str) -> Kind {
    let parent = name.split('-').next().unwrap_or_default();
    Kind { parent: parent.into(), name: name.into() }
}

pub fn is_ours(kind: &Kind) -> bool {
    kind.parent == "limosa"
}

/// The flags that `probe` prints for this kind.
pub fn flags(kind: &Kind) -> &'static str {
    match kind.name.as_str() {
        "limosa-plain" => "STOP_COPY",
        "limosa-p2p" => "STOP_COPY+P2P",
        "limosa-precopy" => "STOP_COPY+PRE_COPY",
        _ => "STOP_COPY+P2P+PRE_COPY",
    }
}

/// A device with something in it by which its state is known.
pub struct Marked {
    pub mdev: Mdev,
    pub kind: Kind,
}

impl Marked {
    pub fn new(kind: &Kind, mark: u8) -> Marked {
        let device = Marked { mdev: kind.create(), kind: kind.clone() };
        device.set_mark(mark);
        device
    }

    /// Nothing of what a test looks for is in it.
    pub fn empty(kind: &Kind) -> Marked {
        Marked::new(kind, 0)
    }

    pub fn uuid(&self) -> &str {
        self.mdev.uuid()
    }

    pub fn cdev(&self) -> String {
        self.mdev.cdev().to_str().unwrap().to_owned()
    }

    /// Its names, one for each form.
    pub fn names(&self) -> [String; 5] {
        let group = self.mdev.group().to_string();
        let node = format!("/dev/vfio/{group}");
        [self.uuid().to_owned(), self.uuid().to_uppercase(), self.cdev(), node, group]
    }

    /// A register of BAR0 that is part of the state and does nothing: SCR of a 16550A, SCRATCH 0 of ours; and how
    /// wide it is.
    fn register(&self) -> (u64, usize) {
        if is_ours(&self.kind) { (0xc0, 8) } else { (7, 1) }
    }

    /// Opens the device for that. Neither kind forgets its state when it is closed.
    pub fn set_mark(&self, mark: u8) {
        let (at, bytes) = self.register();
        open(self.uuid()).region_write(0, at, &vec![mark; bytes]).unwrap();
    }

    pub fn mark(&self) -> u8 {
        self.mark_of(&open(self.uuid()))
    }

    /// The same through somebody who has it open.
    pub fn mark_of(&self, device: &KernelDevice) -> u8 {
        let (at, bytes) = self.register();
        let mut data = vec![0; bytes];
        device.region_read(0, at, &mut data).unwrap();
        assert!(data.iter().all(|byte| *byte == data[0]), "{data:?}");
        data[0]
    }

    /// The state in which the next who opens the device finds it.
    pub fn state(&self) -> State {
        open(self.uuid()).state().unwrap()
    }

    /// Whatever was done to it: it can be opened, reset, saved and loaded.
    #[track_caller]
    pub fn is_usable(&self) {
        let device = open(self.uuid());
        device.reset().unwrap();
        let mut stream = device.set_state(State::StopCopy).unwrap().unwrap();
        let (mut saved, mut chunk) = (Vec::new(), vec![0; 1 << 20]);
        while let Chunk::Data(bytes) = stream.read(&mut chunk).unwrap() {
            saved.extend_from_slice(&chunk[..bytes]);
        }
        let mut stream = device.set_state(State::Resuming).unwrap().unwrap();
        stream.write(&saved).unwrap();
        device.set_state(State::Running).unwrap();
        assert_eq!(device.state().unwrap(), State::Running);
    }
}

fn open(name: &str) -> KernelDevice {
    KernelDevice::open(name, &Options::default()).unwrap_or_else(|error| panic!("{error}"))
}
