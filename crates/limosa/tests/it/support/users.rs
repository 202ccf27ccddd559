//! A second user of the host, and processes of this one that hold files. A second user needs root.

use std::fs::{File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use limosa_testing::this_test;

use super::{Folder, Running, prepared};

/// The second user, and its group.
pub const OTHER: u32 = 65534;

/// Whether this process may act for a second user; says why not.
pub fn can_be_another(test: &str) -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        println!("{test} is skipped: it needs a second user, and so root");
    }
    is_root
}

/// Starts the command as the second user.
pub fn start_as_other<S: AsRef<str>>(args: &[S]) -> Running {
    // By a descriptor: the folders above the program may be closed to that user.
    let program = File::open(env!("CARGO_BIN_EXE_limosa")).unwrap();
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    command.uid(OTHER).gid(OTHER);
    Running::start(&mut prepared(command, args))
}

impl Folder {
    /// Lets every user in.
    pub fn open_to_all(self) -> Folder {
        std::fs::set_permissions(self.path(""), Permissions::from_mode(0o755)).unwrap();
        self
    }

    /// A folder in it that is the second user's.
    pub fn others(&self, name: &str) -> String {
        let path = self.path(name);
        std::fs::create_dir(&path).unwrap();
        give_away(&path);
        path.to_str().unwrap().to_owned()
    }
}

/// Makes this the second user's.
pub fn give_away(path: &Path) {
    std::os::unix::fs::chown(path, Some(OTHER), Some(OTHER)).unwrap();
}

/// Lets the command borrow what this process holds, where Yama keeps that to its parents (`kernel.yama.ptrace_scope` 1).
pub fn let_others_borrow() {
    // Without Yama there is nothing to allow.
    let _ = rustix::process::set_ptracer(rustix::process::PTracer::Any);
}

const HOLD: &str = "LIMOSA_TEST_HOLD";

/// A process, of the second user where there is one, that holds files: each as an `(access, path)` with access one of
/// `path` (O_PATH), `read`, `write`, `both`, and `memory`, `memory-read` and `memory-sealed` for a memfd with a copy of it.
pub struct Holder {
    process: Running,
    numbers: Vec<String>,
}

impl Holder {
    pub fn start(files: &[(&str, &Path)]) -> Holder {
        let files: Vec<_> =
            files.iter().map(|(access, path)| format!("{access} {}", path.display())).collect();
        let mut command = this_test("users::a_process_that_holds_files");
        command.env(HOLD, files.join("\n"));
        if rustix::process::geteuid().is_root() {
            command.uid(OTHER).gid(OTHER);
        }
        let process = Running::start(&mut command);
        let numbers = process.after("it holds ").split(' ').map(str::to_owned).collect();
        Holder { process, numbers }
    }

    /// The name of a file that it holds.
    pub fn name(&self, file: usize) -> String {
        format!("/proc/{}/fd/{}", self.process.pid(), self.numbers[file])
    }
}

/// What [`Holder`] starts; called by the test `users::a_process_that_holds_files`.
pub fn hold_files() {
    use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, memfd_create, open};
    let Ok(files) = std::env::var(HOLD) else { return };
    let_others_borrow();
    let mut held = Vec::new();
    for file in files.lines() {
        let (access, path) = file.split_once(' ').unwrap();
        let flags = match access {
            "path" => OFlags::PATH,
            "write" => OFlags::WRONLY,
            "both" => OFlags::RDWR,
            _ => OFlags::RDONLY,
        };
        let opened = open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap();
        if !access.starts_with("memory") {
            held.push(opened);
            continue;
        }
        let memory = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        std::io::copy(&mut File::from(opened), &mut File::from(memory.try_clone().unwrap())).unwrap();
        held.push(match access {
            "memory-read" => {
                let name = format!("/proc/self/fd/{}", memory.as_raw_fd());
                open(name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap()
            }
            "memory-sealed" => {
                fcntl_add_seals(&memory, SealFlags::WRITE).unwrap();
                memory
            }
            _ => memory,
        });
    }
    let numbers: Vec<_> = held.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
    println!("it holds {}", numbers.join(" "));
    loop {
        std::thread::park();
    }
}
