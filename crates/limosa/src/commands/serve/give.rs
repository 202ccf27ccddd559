//! The old process of a switch-over: it waits for a process that takes its place, and keeps serving after every failed attempt.

use std::os::fd::AsFd;
use std::time::Instant;

use limosa_switch_over::{Cause, Error, GiveOptions, Given, Giver, Item, Refusal, Step, TakeOver};
use limosa_vfio_user::server::{Server, ShutdownHandle, SwitchOver};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::NAME;
use super::child;
use super::requests::Requests;
use crate::metrics::SWITCH_OVERS;
use crate::service;

/// How long to wait after a failure of the socket itself, such as no room for open files.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Returns once a new process serves, or once told to stop; then the servers are shut down. Without a door only a process that
/// this one starts itself can take over.
pub fn until_given(door: Option<&TakeOver>, servers: &[Server], requests: &Requests) {
    let stop = &requests.stop;
    let giver = UntilStopped { servers: SwitchOver::new(servers), stop };
    let on_step = |step| match step {
        Step::Hello => service::reloading(),
        step => tracing::debug!(%step, "done by this server"),
    };
    let options = GiveOptions { name: NAME, observer: Some(&on_step), ..GiveOptions::default() };
    while !stop.is_shut_down() {
        if requests.replace() {
            service::reloading();
            match child::start_and_give(&giver, &options, stop) {
                Ok((given, pid)) => return replaced(given, pid),
                Err(error) => {
                    SWITCH_OVERS.failed();
                    tracing::warn!(%error, "not replaced: this server goes on");
                    service::ready();
                }
            }
            continue;
        }
        let Some(door) = door else {
            requests.wait();
            continue;
        };
        match door.serve_one(&giver, &options, Some(requests.as_fd())) {
            Ok(given) => {
                let pid = given.report.other_pid.unsigned_abs();
                return replaced(given, pid);
            }
            Err(Error { cause: Cause::Stopped, .. }) => {}
            Err(_) if stop.is_shut_down() => {}
            Err(error) => {
                SWITCH_OVERS.failed();
                goes_on(&error, stop);
            }
        }
    }
    shut_down(servers);
}

fn replaced(Given { report, .. }: Given, pid: u32) {
    service::main_process(pid);
    let standstill = report.standstill;
    tracing::info!(pid, other = report.other, ?standstill, "another process serves now");
}

pub fn shut_down(servers: &[Server]) {
    servers.iter().for_each(|server| server.shutdown_handle().shut_down());
}

fn goes_on(error: &Error, stop: &ShutdownHandle) {
    tracing::warn!(%error, "not replaced: this server goes on");
    match error.step {
        Step::Hello => _ = poll(&mut [PollFd::new(stop, PollFlags::IN)], Some(&PAUSE)),
        _ => service::ready(),
    }
}

/// Gives nothing away once this process was told to end, so that its end need not wait for the new server.
struct UntilStopped<'a> {
    servers: SwitchOver<'a>,
    stop: &'a ShutdownHandle,
}

impl UntilStopped<'_> {
    fn goes_on(&self) -> Result<(), Refusal> {
        match self.stop.is_shut_down() {
            false => Ok(()),
            true => Err(Refusal::new("the old server was told to end; start the new one without it")),
        }
    }
}

impl Giver for UntilStopped<'_> {
    fn offer(&self) -> Result<Vec<Item>, Refusal> {
        self.goes_on()?;
        self.servers.offer()
    }

    fn prepare(&self) -> Result<Vec<Item>, Refusal> {
        self.goes_on()?;
        self.servers.prepare()
    }

    fn prepare_more(&self) -> Result<Option<Vec<Item>>, Refusal> {
        self.goes_on()?;
        self.servers.prepare_more()
    }

    fn freeze(&self, until: Instant) -> Result<(), Refusal> {
        self.goes_on()?;
        self.servers.freeze(until)
    }

    fn rest(&self) -> Result<Vec<Item>, Refusal> {
        self.servers.rest()
    }

    fn thaw(&self) {
        self.servers.thaw();
    }

    fn given(&self) {
        self.servers.given();
    }
}
