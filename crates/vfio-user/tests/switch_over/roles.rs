//! Which client is the VMM after a switch-over.

use std::os::unix::net::UnixStream;

use limosa_client::DeviceExt;
use limosa_protocol::State;
use limosa_vfio_user::client::{Client, Options as ClientOptions};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::bytes;
use crate::common::raw::*;
use crate::{Running, pad};

fn waits_for_the_place(folder: &std::path::Path) -> Raw {
    let mut raw = Raw::new(UnixStream::connect(folder.join("device0")).unwrap());
    raw.ask(VERSION, &[bytes![0u16, 0u16], b"{}\0".to_vec()].concat());
    raw
}

/// Whether it has an answer.
fn is_answered(raw: &Raw) -> bool {
    poll(&mut [PollFd::new(&raw.socket, PollFlags::IN)], Some(&Timespec::default())).unwrap() == 1
}

#[test]
fn a_client_that_waited_was_a_second_vmm_when_its_thread_was_faster_than_the_vmms() {
    let folder = tempfile::tempdir().unwrap();
    let mut running = Running::bind(folder.path(), vec![pad()]);
    let client = Client::connect(folder.path().join("device0"), ClientOptions::default()).unwrap();
    let mut waiting: Vec<_> = (0..12).map(|_| waits_for_the_place(folder.path())).collect();
    for round in 0..30 {
        running = running.replaced_by(vec![pad()]);
        assert_eq!(client.state().unwrap(), State::Running);
        let admitted = waiting.iter().position(is_answered);
        assert_eq!(admitted, None, "round {round}: a second VMM");
    }
    // One of them is the next: that whose thread was the first to read its VERSION.
    drop(client);
    let mut fds: Vec<_> = waiting.iter().map(|raw| PollFd::new(&raw.socket, PollFlags::IN)).collect();
    let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(poll(&mut fds, Some(&limit)).unwrap(), 1, "one has the VMM's place");
    let next = fds.iter().position(|fd| !fd.revents().is_empty()).unwrap();
    assert_eq!(waiting.remove(next).receive().flags, REPLY);
    drop(running);
}
