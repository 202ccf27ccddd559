//! Fds with messages that take none, too many fds, and fds of the wrong kind (`vfio-user.rst: VFIO_USER_DMA_MAP`, the capability
//! *max_msg_fds*).

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use limosa_vfio_user::codec::Command;
use rustix::event::PollFlags;
use rustix::fs::{Mode, OFlags, open};
use zerocopy::IntoBytes;

use super::{IOVA, PAGE, becomes_ready, event, host, map, memory, on_connection, on_wire};
use crate::check::{Check, Needs, Stop, Verdict, ensure, skip};
use crate::trial::Trial;
use crate::wire::{Raw, info_request};

pub(super) fn checks() -> Vec<Check> {
    let none = Needs::empty();
    vec![
        on_connection("vfio-user.fd-where-none-is-due", none, &["wire.answered"], |_, raw| {
            let fd = event()?;
            raw.ask_with(Command::DEVICE_GET_INFO, info_request().as_bytes(), &[fd.as_fd()])?
                .answered("GET_INFO with an fd")?;
            raw.in_step()
        }),
        on_connection("vfio-user.fd-of-a-refused-message-is-closed", none, &["fds.closed"], |t, raw| {
            let (ours, theirs) = pair()?;
            raw.ask_with(Command(999), &[], &[theirs.as_fd()])?.refused("message 999 with an fd")?;
            closed(t, ours, theirs)
        }),
        on_connection("vfio-user.fd-of-a-bad-map-is-closed", none, &["fds.closed", "map.fd"], |t, raw| {
            let (ours, theirs) = pair()?;
            bad_map(raw, &theirs, "a socket")?;
            closed(t, ours, theirs)
        }),
        on_wire("vfio-user.fds-beyond-the-limit", none, &["fds.limit"], |t| {
            let mut raw = Raw::open(t)?;
            let limit = raw.server.max_msg_fds.unwrap_or(1);
            let Some(count) = usize::try_from(limit).ok().filter(|limit| *limit < 250) else {
                return skip("the server takes as many fds as the system passes");
            };
            let fd = event()?;
            let fds = vec![fd.as_fd(); count + 3];
            let answer = raw
                .ask_with(Command::DMA_MAP, map(IOVA, PAGE).as_bytes(), &fds)?
                .not_done(&format!("DMA_MAP with {} fds, where {count} are taken", fds.len()))?;
            raw.goes_on(t, &answer)
        }),
        on_connection("vfio-user.two-fds-for-one-map", none, &["map.fd"], |_, raw| {
            let (one, other) = (memory(PAGE)?, memory(PAGE)?);
            raw.ask_with(Command::DMA_MAP, map(IOVA, PAGE).as_bytes(), &[one.as_fd(), other.as_fd()])?
                .refused("DMA_MAP with two fds")?;
            raw.in_step()
        }),
        on_connection("vfio-user.pipe-for-a-map", none, &["map.fd"], |_, raw| {
            let (_read, write) = host(rustix::pipe::pipe())?;
            bad_map(raw, &write, "a pipe")
        }),
        on_connection("vfio-user.event-for-a-map", none, &["map.fd"], |_, raw| {
            bad_map(raw, &event()?, "an eventfd")
        }),
        on_connection("vfio-user.folder-for-a-map", none, &["map.fd"], |_, raw| {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            bad_map(raw, &host(open("/", flags, Mode::empty()))?, "a folder")
        }),
        on_connection("vfio-user.read-only-memory-for-a-map", none, &["map.fd"], |_, raw| {
            let memory = memory(PAGE)?;
            let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
            let fd = host(open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()))?;
            bad_map(raw, &fd, "memory that cannot be written")
        }),
    ]
}

/// A readable and writable map with an fd of the wrong kind.
fn bad_map(raw: &mut Raw, fd: &OwnedFd, what: &str) -> Verdict {
    raw.ask_with(Command::DMA_MAP, map(IOVA, PAGE).as_bytes(), &[fd.as_fd()])?
        .refused(&format!("DMA_MAP of {what}"))?;
    raw.in_step()
}

fn pair() -> Result<(OwnedFd, OwnedFd), Stop> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()
        .map_err(|error| Stop::Skip(format!("this host gives the suite no sockets: {error}")))?;
    Ok((ours.into(), theirs.into()))
}

/// Checks that no process holds the other end any more.
fn closed(t: &Trial, ours: OwnedFd, theirs: OwnedFd) -> Verdict {
    drop(theirs);
    let closed = becomes_ready(t, &ours, PollFlags::RDHUP)?;
    ensure(closed, || "the server keeps an fd that came with a message that it refused".into())
}
