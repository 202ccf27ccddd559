//! A process that stands for a guest's, to be stopped and set going.

use std::process::{Child, Command, Stdio};
use std::time::Instant;

use super::LIMIT;

/// Killed when it is dropped.
pub struct Vcpus(Child);

impl Vcpus {
    pub fn start() -> Vcpus {
        Vcpus::spawn(Command::new("sleep").arg("1000"))
    }

    pub fn spawn(command: &mut Command) -> Vcpus {
        Vcpus(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }

    pub fn pid(&self) -> String {
        self.0.id().to_string()
    }

    pub fn is_stopped(&self) -> bool {
        self.stat().1.starts_with('T')
    }

    /// Its name, and what `/proc/PID/stat` says behind it.
    fn stat(&self) -> (String, String) {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let (name, rest) = stat.rsplit_once(") ").unwrap();
        (name.split_once('(').unwrap().1.to_owned(), rest.to_owned())
    }

    /// Waits until it runs this program.
    pub fn runs(&self, program: &str) {
        let began = Instant::now();
        while self.stat().0 != program {
            assert!(began.elapsed() < LIMIT, "it never ran {program}");
            std::thread::yield_now();
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
