//! Two devices behind servers, a guest in the first, and moves from one to the other.

use limosa_protocol::State;

use super::link::{Plan, Proxy};
use super::{Ended, Folder, GUEST, Running, Server, limosa, start};

/// Two synthetic devices. The first one runs the guest.
pub struct Pair {
    pub folder: Folder,
    pub source: Server,
    pub destination: Server,
}

/// A move between two commands, and the link between them where it goes through a [`Proxy`].
pub struct Sending {
    pub proxy: Option<Proxy>,
    pub sender: Running,
    pub receiver: Running,
}

impl Pair {
    /// With these options of each device.
    pub fn new(source: &[&str], destination: &[&str]) -> Pair {
        let folder = Folder::new();
        let (source, destination) =
            (folder.device("source", source), folder.device("destination", destination));
        source.mark(GUEST);
        Pair { folder, source, destination }
    }

    /// The arguments of a local move, with more of them.
    pub fn migration<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        [&["migrate", &self.source.socket, &self.destination.socket], more].concat()
    }

    /// Moves the device within this host.
    pub fn migrate(&self, more: &[&str]) -> Ended {
        limosa(&self.migration(more))
    }

    /// Starts `limosa receive`, waits until it listens, and starts `limosa send`, each with more arguments.
    pub fn send(&self, plan: Option<Plan>, receive: &[&str], send: &[&str]) -> Sending {
        let listen = format!("unix:{}", self.folder.text("link"));
        let args = ["-vv", "receive", &self.destination.socket, "--listen", &listen];
        let receiver = start(&[&args, receive].concat());
        receiver.line("listening on");
        let proxy = plan.map(|plan| Proxy::new(&self.folder, &listen, plan));
        let to = proxy.as_ref().map_or(&listen, |proxy| &proxy.address);
        let sender = start(&[&["-vv", "send", &self.source.socket, "--to", to], send].concat());
        Sending { proxy, sender, receiver }
    }

    #[track_caller]
    pub fn has_moved(&self) {
        assert!(self.destination.runs(GUEST) && self.source.state() == State::Stop);
    }

    /// The move did not take place: the source runs, and the destination as it was made.
    #[track_caller]
    pub fn is_as_before(&self) {
        assert!(self.source.runs(GUEST));
        assert_eq!((self.destination.state(), self.destination.guest()), (State::Running, 0));
    }
}
