//! The sockets of traced processes that carry vfio-user, recognized by their first bytes.

use std::collections::HashMap;

use limosa_vfio_user::codec::{Command, Header};
use zerocopy::FromBytes;

use crate::event::Direction;
use crate::framer::{Framed, Framer, begins_with_version, looks_like_header};
use crate::recorder::RecorderHandle;
use crate::seen::Seen;

/// Limit on the sockets that are tracked.
const SOCKETS_MAX: usize = 4096;

/// All of them, by inode.
#[derive(Debug, Default)]
pub struct Sockets {
    all: HashMap<u64, Socket>,
    /// Where each was connected to.
    names: HashMap<u64, String>,
    conversations: u32,
}

#[derive(Debug)]
enum Socket {
    /// Too few bytes came to decide: the written bytes, and the read bytes.
    Undecided {
        existed: bool,
        first: [Vec<u8>; 2],
    },
    /// Not vfio-user.
    Other,
    VfioUser {
        conversation: u32,
        pid: i32,
        is_client: bool,
        framers: [Framer; 2],
    },
}

impl Sockets {
    /// A socket was connected to this path.
    pub fn connected(&mut self, inode: u64, path: &[u8]) {
        if self.names.len() >= SOCKETS_MAX {
            self.names.clear();
        }
        self.names.insert(inode, String::from_utf8_lossy(path).into_owned());
    }

    /// The name of a socket: the last part of the path to which it was connected, or at which it was accepted.
    fn name(&self, pid: i32, inode: u64) -> String {
        let path = self.names.get(&inode).cloned().or_else(|| super::files::path_of_socket(pid, inode));
        let path = path.unwrap_or_else(|| format!("socket:[{inode}]"));
        super::files::shown(path.rsplit('/').next().unwrap_or(&path))
    }

    /// How many of the next bytes need not be fetched; all of them for a socket that does not speak vfio-user.
    pub fn unread(&self, inode: u64, is_write: bool) -> usize {
        match self.all.get(&inode) {
            Some(Socket::VfioUser { framers, .. }) => framers[usize::from(!is_write)].unread(),
            Some(Socket::Other) => usize::MAX,
            Some(Socket::Undecided { .. }) | None => 0,
        }
    }

    /// Whether a socket is known not to matter.
    pub fn is_other(&self, inode: u64) -> bool {
        matches!(self.all.get(&inode), Some(Socket::Other))
    }

    /// Bytes that need no inspection were transferred over a socket.
    pub fn skip(&mut self, inode: u64, is_write: bool, bytes: usize, recorder: &RecorderHandle) {
        if let Some(Socket::VfioUser { conversation, is_client, framers, .. }) = self.all.get_mut(&inode) {
            let direction = direction(is_write, *is_client);
            let framer = &mut framers[usize::from(!is_write)];
            let time_ns = recorder.now_ns();
            framer.skip(time_ns, bytes, &mut |framed| {
                record(*conversation, direction, framed, time_ns, recorder)
            });
        }
    }

    /// Bytes were transferred over a socket, and fds with the first of them. `existed` is whether it existed before the trace.
    pub fn bytes(
        &mut self,
        (pid, inode): (i32, u64),
        (is_write, existed): (bool, bool),
        (time_ns, bytes): (u64, &[u8]),
        fds: Vec<String>,
        recorder: &RecorderHandle,
    ) {
        if self.all.len() >= SOCKETS_MAX {
            self.all.retain(|_, socket| matches!(socket, Socket::VfioUser { .. }));
            if self.all.len() >= SOCKETS_MAX {
                return;
            }
        }
        let new = || Socket::Undecided { existed, first: Default::default() };
        let way = usize::from(!is_write);
        let socket = self.all.entry(inode).or_insert_with(new);
        if let Socket::Undecided { existed, first } = socket {
            let room = Header::BYTES - first[way].len().min(Header::BYTES);
            first[way].extend_from_slice(&bytes[..bytes.len().min(room)]);
            let speaks = match existed {
                true => looks_like_header(&first[way]),
                false => begins_with_version(&first[way]),
            };
            let Some(speaks) = speaks else { return };
            if !speaks {
                *socket = Socket::Other;
                return;
            }
            let is_whole = begins_with_version(&first[way]) == Some(true);
            let is_client = is_write == is_clients(&first[way]);
            let mut framers = [Framer::default(), Framer::default()];
            // The bytes before this piece: less than a header, so no message is complete.
            for (framer, (at, before)) in framers.iter_mut().zip(first.iter().enumerate()) {
                let before =
                    if at == way { &before[..before.len() - bytes.len().min(room)] } else { &before[..] };
                framer.push(time_ns, before, Vec::new(), &mut |_| {});
            }
            self.conversations += 1;
            let conversation = self.conversations;
            *socket = Socket::VfioUser { conversation, pid, is_client, framers };
            let name = self.name(pid, inode);
            let pid = u32::try_from(pid).ok();
            recorder.record(Seen::Opened { time_ns, conversation, name, pid, is_whole });
        }
        let Some(Socket::VfioUser { conversation, is_client, framers, .. }) = self.all.get_mut(&inode) else {
            return;
        };
        let direction = direction(is_write, *is_client);
        framers[way].push(time_ns, bytes, fds, &mut |framed| {
            record(*conversation, direction, framed, time_ns, recorder);
        });
    }

    /// The peer closed a socket.
    pub fn ended(&mut self, inode: u64, recorder: &RecorderHandle) {
        if let Some(socket) = self.all.remove(&inode) {
            close(socket, recorder);
        }
        self.names.remove(&inode);
    }

    /// A process is gone.
    pub fn process_ended(&mut self, process: i32, recorder: &RecorderHandle) {
        let its = |socket: &Socket| matches!(socket, Socket::VfioUser { pid, .. } if *pid == process);
        let gone: Vec<_> =
            self.all.iter().filter(|(_, socket)| its(socket)).map(|(inode, _)| *inode).collect();
        gone.into_iter().for_each(|inode| self.ended(inode, recorder));
    }
}

/// Whether these bytes begin with a header of the client (`true`), or of the server.
fn is_clients(bytes: &[u8]) -> bool {
    let Ok((header, _)) = Header::read_from_prefix(bytes) else { return true };
    let is_command = header.flags & Header::TYPE_MASK == Header::TYPE_COMMAND;
    let asks_client = matches!(header.command, Command::DMA_READ | Command::DMA_WRITE);
    is_command != asks_client
}

fn direction(is_write: bool, is_client: bool) -> Direction {
    if is_write == is_client { Direction::ToDevice } else { Direction::FromDevice }
}

fn close(socket: Socket, recorder: &RecorderHandle) {
    let Socket::VfioUser { conversation, is_client, framers, .. } = socket else { return };
    let time_ns = recorder.now_ns();
    for (mut framer, is_write) in framers.into_iter().zip([true, false]) {
        let direction = direction(is_write, is_client);
        framer.end(&mut |framed| record(conversation, direction, framed, time_ns, recorder));
    }
    recorder.record(Seen::Closed { time_ns, conversation });
}

fn record(conversation: u32, direction: Direction, framed: Framed, time_ns: u64, recorder: &RecorderHandle) {
    recorder.record(match framed {
        Framed::Message(message) => Seen::Message { conversation, direction, message },
        Framed::Malformed(malformed) => Seen::Malformed { time_ns, conversation, direction, malformed },
    });
}
