//! Each of the four processes of a move killed in each phase, links cut, moves called off. The
//! surviving processes say what happened, the other side's device is usable, and the guest never runs twice.

mod interrupts;
mod links;
mod processes;

use crate::support::link::{Plan, Proxy};
use crate::support::pair::{Pair, Sending};
use crate::support::{Folder, GUEST, JsonOutput, Running, Server, limosa, start};
use limosa_models::synthetic::registers;
use limosa_protocol::State;
use rustix::process::Signal;

/// How long a device stalls where it is the stall that holds a phase open. It says when it begins, so that
/// this only has to be longer than a signal takes.
const STALL_MS: u32 = 800;

/// A move that stands still in a phase.
struct Scene {
    folder: Folder,
    source: Server,
    destination: Server,
    proxy: Option<Proxy>,
    sender: Running,
    receiver: Running,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Handshake,
    PreCopy,
    StopCopy,
    Load,
    Commit,
}

impl Scene {
    fn at(at: At) -> Scene {
        Scene::at_with(at, &[])
    }

    /// The same with further arguments for the sender.
    fn at_with(at: At, more: &[&str]) -> Scene {
        let precopy = if at == At::StopCopy { "precopy=0" } else { "precopy=100" };
        let stall = match at {
            At::Load => format!("fault=stall:RESUMING>STOP:{STALL_MS}"),
            At::Commit => format!("fault=stall:STOP>RUNNING_P2P:{STALL_MS}"),
            _ => "seed=2".into(),
        };
        let pair = Pair::new(&["state=8M", precopy], &["state=8M", &stall]);
        let plan = match at {
            At::Handshake => Some(Plan::Hold(1)),
            At::PreCopy | At::StopCopy => Some(Plan::Hold(2 << 20)),
            _ => None,
        };
        let Sending { proxy, sender, receiver } = pair.send(plan, &[], more);
        let Pair { folder, source, destination } = pair;
        if let Some(proxy) = &proxy {
            proxy.held();
        }
        match at {
            At::Handshake => {}
            At::PreCopy => drop(sender.line("phase=\"pre-copy\"")),
            At::StopCopy => drop(sender.line("phase=\"stop-copy\"")),
            At::Load => {
                // A device may finish what it has before the SUM has come.
                drop(sender.line("phase=\"load\""));
                destination.line("stalls as scripted");
            }
            At::Commit => destination.line("stalls as scripted"),
        }
        Scene { folder, source, destination, proxy, sender, receiver }
    }

    fn release(&self) {
        if let Some(proxy) = &self.proxy {
            proxy.release();
        }
    }
}

/// The source goes on with the guest, and can be moved.
#[track_caller]
fn source_goes_on(source: &Server, folder: &Folder) {
    assert!(source.runs(GUEST), "{} {:#x}", source.state(), source.guest());
    let next = folder.device("next", &["state=8M"]);
    limosa(&["migrate", &source.socket, &next.socket]).ok();
    assert!(next.runs(GUEST) && source.state() == State::Stop);
    assert_eq!(next.register(registers::BAD_BLOCKS), 0);
}

/// A source that nobody drives any more can be set to run by hand.
#[track_caller]
fn source_can_be_run_again(source: &Server, folder: &Folder) {
    limosa(&["state", &source.socket, "set", "RUNNING", "--force"]).ok();
    source_goes_on(source, folder);
}

#[track_caller]
fn destination_is_empty(destination: &Server, folder: &Folder) {
    assert_eq!((destination.state(), destination.guest()), (State::Running, 0));
    destination.is_usable(folder);
}

const AT_WORK: [At; 3] = [At::Handshake, At::PreCopy, At::StopCopy];
