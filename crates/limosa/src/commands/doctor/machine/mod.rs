//! The machine: what it can do for a move, part by part.

mod files;
mod kernel;
mod limits;
mod network;
#[cfg(test)]
mod tests;
mod time;
mod vfio;

use super::finding::{About, Finding, Kind, Level, PIDFD_GETFD, PTRACE_LIMITED, PTRACE_OFF, UNREADABLE};
use super::report::Facts;
#[cfg(test)]
use files::System;
pub use files::{Host, Running};
use kernel::Release;

/// The purpose of the examination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// No device is named: everything is examined, and findings about kernel devices are no obstacle to other devices.
    Machine,
    /// A kernel device is named.
    KernelDevice,
    /// Only devices behind sockets are named.
    Socket,
}

/// The facts and the findings of a machine.
pub struct Look<'a> {
    pub host: &'a Host<'a>,
    wanted: Wanted,
    pub facts: Facts,
    pub findings: Vec<Finding>,
}

impl Look<'_> {
    fn find(&mut self, kind: &'static Kind, what: impl Into<String>) {
        self.findings.extend(self.finding(kind, what));
    }

    /// Adds a finding, unless it concerns something that was not asked for.
    fn finding(&self, kind: &'static Kind, what: impl Into<String>) -> Option<Finding> {
        let mut finding = Finding::new(kind, "machine", what);
        match (kind.about, self.wanted) {
            (About::Kernel, Wanted::Socket) => return None,
            (About::Kernel, Wanted::Machine) => finding.level = finding.level.min(Level::Warning),
            _ => {}
        }
        Some(finding)
    }

    fn looks_at_kernel_devices(&self) -> bool {
        self.wanted != Wanted::Socket
    }
}

/// Examines the whole machine.
pub fn look(host: &Host<'_>, wanted: Wanted) -> (Facts, Vec<Finding>) {
    let mut look = Look { host, wanted, facts: Facts::default(), findings: Vec::new() };
    let release = kernel::look(&mut look);
    if look.looks_at_kernel_devices() {
        vfio::look(&mut look);
    }
    limits::look(&mut look);
    network::look(&mut look);
    time::look(&mut look);
    processes(&mut look, release);
    let unreadable = host.unreadable();
    if !unreadable.is_empty() {
        look.find(&UNREADABLE, format!("not readable: {}", unreadable.join(", ")));
    }
    (look.facts, look.findings)
}

/// Whether processes may take descriptors from each other (Yama's `ptrace_scope`, pidfd_getfd(2)).
fn processes(look: &mut Look<'_>, release: Option<Release>) {
    if release.is_some_and(|release| release < Release(5, 6)) {
        look.find(&PIDFD_GETFD, "the kernel has no pidfd_getfd");
    }
    let scope = look.host.number("proc/sys/kernel/yama/ptrace_scope");
    let meaning = match scope {
        None => "no restriction by Yama",
        Some(0) => "0: processes of one user may trace each other",
        Some(1) => "1: only a process that started another one may trace it, and root",
        Some(2) => "2: only with CAP_SYS_PTRACE",
        Some(_) => "3: nobody",
    };
    look.facts.add("ptrace scope", meaning);
    let is_root = limits::has_capability(look.host, limits::CAP_SYS_PTRACE);
    match scope {
        Some(1) if !is_root => {
            look.find(&PTRACE_LIMITED, "kernel.yama.ptrace_scope is 1, and this user is not root")
        }
        Some(2) if !is_root => {
            look.find(&PTRACE_OFF, "kernel.yama.ptrace_scope is 2, and this process has no CAP_SYS_PTRACE");
        }
        Some(scope @ 3..) => look.find(&PTRACE_OFF, format!("kernel.yama.ptrace_scope is {scope}")),
        _ => {}
    }
}
