//! UNIX sockets with a path: made with their rights, replaced when their server is gone, removed by their maker alone; and
//! which user's server a client has reached.

use std::fs;
use std::io::{self, Error, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use limosa_foreign_fd::Foreign;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, Stat};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::{Group, User};

/// The mode of a socket that is being made. Sockets that are ready can be read by their owner, so that one is not taken
/// for that of a server that is gone before it listens.
const BEING_MADE: Mode = Mode::WUSR;
/// Connections that wait to be accepted. All of them are accepted before one that comes later, so a client waits for as many
/// others at most; further ones wait within connect(2). The system's own limit (`net.core.somaxconn`, 4096) holds up a client
/// behind thousands that have gone already.
const BACKLOG: i32 = 128;

/// The mode and group of a socket; users with write permission may connect. By default only its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketAccess {
    /// Its mode, whatever the umask of the process: permission bits, with those to read and write for the owner.
    pub mode: u32,
    /// Its group; by default that of the process.
    pub group: Option<Group>,
}

impl Default for SocketAccess {
    fn default() -> SocketAccess {
        SocketAccess { mode: 0o600, group: None }
    }
}

/// The path of a socket that this process created. The socket is removed when this is dropped, if the path still
/// leads to it.
#[derive(Debug)]
pub struct SocketPath {
    path: PathBuf,
    device: u64,
    inode: u64,
}

/// Makes a socket and listens on it. It can be connected to by others than its owner and root only once it has its mode and
/// group.
///
/// `AddrInUse` when a server listens there, `AlreadyExists` when something is there that is not a socket, `InvalidInput` for
/// a mode that cannot be, `Unsupported` without `/proc`; else the system's errors. The socket of a server that is gone is replaced.
pub fn listen(path: &Path, access: &SocketAccess) -> io::Result<(SocketPath, UnixListener)> {
    if access.mode & !0o777 != 0 || access.mode & 0o600 != 0o600 {
        let what = format!(
            "mode {:o} of the socket: expected permissions such as 660, with both for the owner",
            access.mode
        );
        return Err(Error::new(ErrorKind::InvalidInput, what));
    }
    let address = SocketAddrUnix::new(path)?;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The mode of a socket that is bound to no path yet becomes that of its path, less the umask.
    rustix::fs::fchmod(&socket, BEING_MADE)?;
    // For `open_made`: what was bound has to be opened, also by a process that has no more room for descriptors then.
    let room = rustix::io::fcntl_dupfd_cloexec(&socket, 0)?;
    match rustix::net::bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            remove_stale(path)?;
            rustix::net::bind(&socket, &address)?;
        }
        bound => bound?,
    }
    drop(room);
    let (made, stat) = open_made(path)?;
    let place = SocketPath { path: path.into(), device: stat.st_dev, inode: stat.st_ino };
    rustix::net::listen(&socket, BACKLOG)?;
    give(&made, access.group, access.mode)?;
    Ok((place, UnixListener::from(socket)))
}

/// Gives a socket its group and mode.
fn give(socket: &OwnedFd, group: Option<Group>, mode: u32) -> io::Result<()> {
    if let Some(Group(group)) = group {
        let group = Some(Gid::from_raw(group));
        rustix::fs::chownat(socket, "", None, group, AtFlags::EMPTY_PATH).map_err(|errno| {
            let error = Error::from(errno);
            Error::new(error.kind(), format!("giving the socket to its group: {error}"))
        })?;
    }
    // By the descriptor, so that no other file is meant whose name this may be by now.
    let itself = format!("/proc/self/fd/{}", socket.as_raw_fd());
    fs::set_permissions(&itself, fs::Permissions::from_mode(mode)).map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            let what =
                format!("the socket cannot be given its mode: {itself}: {error}; /proc is not mounted here");
            Error::new(ErrorKind::Unsupported, what)
        }
        _ => error,
    })
}

/// Whether this process may give the socket at a path these: `PermissionDenied` says why not; else the system's errors.
pub fn may_give_access(path: &Path, access: &SocketAccess) -> io::Result<()> {
    let user = User::current();
    if user == User::ROOT {
        return Ok(());
    }
    let refused = |what: String| Err(Error::new(ErrorKind::PermissionDenied, what));
    let owner = User(rustix::fs::lstat(path)?.st_uid);
    if owner != user {
        return refused(format!("the socket is that of {owner}, and this process runs as {user}"));
    }
    let Some(Group(group)) = access.group else { return Ok(()) };
    let own = rustix::process::getegid();
    let is_member = rustix::process::getgroups()?.iter().chain([&own]).any(|own| own.as_raw() == group);
    if is_member { Ok(()) } else { refused(format!("{user} is no member of group {group}")) }
}

/// The socket that was bound just now, unless something else has its name already.
fn open_made(path: &Path) -> io::Result<(OwnedFd, Stat)> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = rustix::fs::open(path, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&made)?;
    let is_it =
        is_socket(&stat) && stat.st_uid == User::current().0 && stat.st_nlink == 1 && is_being_made(&stat);
    match is_it {
        true => Ok((made, stat)),
        false => {
            Err(Error::new(ErrorKind::AlreadyExists, "another process replaced the socket as it was made"))
        }
    }
}

fn is_socket(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Socket
}

fn is_being_made(stat: &Stat) -> bool {
    !Mode::from_raw_mode(stat.st_mode).contains(Mode::RUSR)
}

fn remove_stale(path: &Path) -> io::Result<()> {
    let found = rustix::fs::lstat(path)?;
    if !is_socket(&found) {
        return Err(Error::new(ErrorKind::AlreadyExists, "there is a file here that is not a socket"));
    }
    if is_being_made(&found) {
        let what = "another server begins to listen here, or has died while it did: then remove the socket";
        return Err(Error::new(ErrorKind::AddrInUse, what));
    }
    if is_alive(path)? {
        return Err(Error::new(ErrorKind::AddrInUse, "another server listens here"));
    }
    tracing::info!(path = %path.display(), "replacing the socket of a server that is gone");
    // Another server may have replaced it by now: what is taken away is looked at before it is removed.
    let name = path.file_name().ok_or(ErrorKind::InvalidInput)?;
    let aside = path.with_file_name(format!(".{}.{}.stale", name.display(), std::process::id()));
    rustix::fs::renameat_with(CWD, path, CWD, &aside, RenameFlags::NOREPLACE)?;
    let taken = rustix::fs::lstat(&aside)?;
    if (taken.st_dev, taken.st_ino) != (found.st_dev, found.st_ino) {
        rustix::fs::renameat_with(CWD, &aside, CWD, path, RenameFlags::NOREPLACE)?;
        return Err(Error::new(ErrorKind::AddrInUse, "another server listens here since just now"));
    }
    fs::remove_file(aside)
}

/// Whether a server listens: the kernel refuses a connection only where none does.
fn is_alive(path: &Path) -> io::Result<bool> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    // Whoever listens may have sent something to it by the time that it is closed.
    let probe = Foreign::new(rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?);
    match rustix::net::connect(&probe, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        // EAGAIN: its queue is full.
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

/// The shortest and the longest time that the kernel takes for a limit.
const CONNECT_MIN: Duration = Duration::from_millis(1);
const CONNECT_MAX: Duration = Duration::from_secs(365 * 86_400);

/// Connects to the socket at a path. EAGAIN when the queue of connections of its server stays full for so long.
pub fn connect(path: &Path, limit: Duration) -> rustix::io::Result<Foreign<UnixStream>> {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // It holds for connect(2) too, which else waits for ever.
    set_socket_timeout(&socket, Timeout::Send, Some(limit.clamp(CONNECT_MIN, CONNECT_MAX)))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let socket = Foreign::new(UnixStream::from(socket));
    set_socket_timeout(&socket, Timeout::Send, None)?;
    Ok(socket)
}

impl SocketPath {
    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which socket it is: the device and inode of its path.
    pub fn identity(&self) -> (u64, u64) {
        (self.device, self.inode)
    }

    /// Sets the socket's mode and group; without a group, that of the process.
    ///
    /// `InvalidInput` if the path leads to something else; otherwise the system's errors.
    pub fn give(&self, access: &SocketAccess) -> io::Result<()> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let socket = rustix::fs::open(&self.path, flags, Mode::empty())?;
        let found = rustix::fs::fstat(&socket)?;
        if (found.st_dev, found.st_ino) != self.identity() {
            let what = format!("{}: something else is here than this server's socket", self.path.display());
            return Err(Error::new(ErrorKind::InvalidInput, what));
        }
        let own = Group(rustix::process::getegid().as_raw());
        give(&socket, Some(access.group.unwrap_or(own)), access.mode)
    }

    /// Leaves the socket where it is, for another process that has its listener now.
    pub fn leave(mut self) {
        // No file has this path, so nothing is removed.
        self.path = PathBuf::new();
    }

    /// The path of a socket that another process made and [left](SocketPath::leave), and whose listener this one has
    /// now. Clients that check the server ([`check_server`]) see this process from now on, since listen(2) is called
    /// again.
    ///
    /// `InvalidInput` when the path does not lead to the socket of that identity, or `listener` does not listen;
    /// otherwise the system's errors.
    pub fn adopt(path: &Path, identity: (u64, u64), listener: &UnixListener) -> io::Result<SocketPath> {
        let invalid = |what: &str| Error::new(ErrorKind::InvalidInput, format!("{}: {what}", path.display()));
        let found = rustix::fs::lstat(path)?;
        if !is_socket(&found) || (found.st_dev, found.st_ino) != identity {
            return Err(invalid(
                "expected the socket of the server that hands it over; something else is here",
            ));
        }
        if !rustix::net::sockopt::socket_acceptconn(listener)? {
            return Err(invalid("expected a socket that listens"));
        }
        rustix::net::listen(listener, BACKLOG)?;
        Ok(SocketPath { path: path.into(), device: identity.0, inode: identity.1 })
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        let found = rustix::fs::lstat(&self.path);
        let is_same = found.is_ok_and(|found| (found.st_dev, found.st_ino) == (self.device, self.inode));
        if is_same && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the socket could not be removed");
        }
    }
}

/// A server that runs as a user whose servers are not trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server that listens there was started by {server}; expected one of {}", joined(.trusted))]
pub struct Untrusted {
    /// The server's user.
    pub server: User,
    /// The users whose servers are trusted.
    pub trusted: Vec<User>,
}

fn joined(users: &[User]) -> String {
    let users: Vec<_> = users.iter().map(ToString::to_string).collect();
    users.join(" or ")
}

/// Checks that the server at the other end of a connected UNIX socket runs as one of these users (SO_PEERCRED: whoever
/// called listen(2)). `PermissionDenied` with an [`Untrusted`] if not.
pub fn check_server(socket: impl AsFd, trusted: &[User]) -> io::Result<()> {
    let server = User(rustix::net::sockopt::socket_peercred(socket)?.uid.as_raw());
    match trusted.contains(&server) {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::PermissionDenied, Untrusted { server, trusted: trusted.into() })),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn a_socket_has_its_mode() {
        let folder = folder();
        let path = folder.path().join("socket");
        for wanted in [0o600, 0o660, 0o666, 0o777] {
            let access =
                SocketAccess { mode: wanted, group: Some(Group(rustix::process::getegid().as_raw())) };
            let (place, _listener) = listen(&path, &access).unwrap();
            assert_eq!(mode(&path), wanted);
            assert_eq!(place.path(), path);
            UnixStream::connect(&path).unwrap();
        }
        for wrong in [0, 0o060, 0o200, 0o1600, 0o100_600] {
            let access = SocketAccess { mode: wrong, group: None };
            assert_eq!(listen(&path, &access).unwrap_err().kind(), ErrorKind::InvalidInput, "{wrong:o}");
        }
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_that_listens_gets_another_mode() {
        let folder = folder();
        let path = folder.path().join("socket");
        let (place, _listener) = listen(&path, &SocketAccess::default()).unwrap();
        let access = SocketAccess { mode: 0o666, group: None };
        may_give_access(&path, &access).unwrap();
        place.give(&access).unwrap();
        assert_eq!(mode(&path), 0o666);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        assert_eq!(place.give(&access).unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn only_the_own_socket_is_removed() {
        let folder = folder();
        let path = folder.path().join("socket");
        let (place, listener) = listen(&path, &SocketAccess::default()).unwrap();
        fs::remove_file(&path).unwrap();
        let _others = UnixListener::bind(&path).unwrap();
        drop((place, listener));
        assert!(path.exists());
        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        drop(SocketPath { path: path.clone(), device: 0, inode: 0 });
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_socket_left_behind_is_replaced_and_nothing_else() {
        let folder = folder();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let made = listen(&path, &SocketAccess::default()).unwrap();
        let error = listen(&path, &SocketAccess::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddrInUse);
        UnixStream::connect(&path).unwrap();
        drop(made);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left");
        fs::write(&path, "precious").unwrap();
        let error = listen(&path, &SocketAccess::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_socket_whose_server_does_not_listen_yet_is_not_taken_for_one_left_behind() {
        let folder = folder();
        let path = folder.path().join("socket");
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::fs::fchmod(&socket, BEING_MADE).unwrap();
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        let error = listen(&path, &SocketAccess::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddrInUse);
        assert!(path.exists());
    }

    /// Programs keep a lock on a folder so that it is not cleaned up, and every user may have one who can open the folder.
    #[test]
    fn a_lock_on_the_folder_holds_nothing_up() {
        let folder = folder();
        let lock = fs::File::open(folder.path()).unwrap();
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        listen(&path, &SocketAccess::default()).unwrap();
    }

    #[test]
    fn a_server_whose_queue_is_full_is_not_waited_for_for_ever() {
        let folder = folder();
        let path = folder.path().join("socket");
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&socket, 0).unwrap();
        let mut queued = Vec::new();
        let error = loop {
            match connect(&path, Duration::from_millis(5)) {
                Ok(client) => queued.push(client),
                Err(error) => break error,
            }
        };
        assert_eq!(error, Errno::AGAIN, "after {}", queued.len());
    }

    #[test]
    fn servers_of_other_users_are_told_apart() {
        let folder = folder();
        let path = folder.path().join("socket");
        let _made = listen(&path, &SocketAccess::default()).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        check_server(&client, &[User(4242), User::current()]).unwrap();
        let error = check_server(&client, &[User(4242)]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        let said = error.to_string();
        assert!(said.contains(&User::current().to_string()) && said.contains("user 4242"), "{said}");
    }

    #[test]
    fn a_socket_that_was_left_is_removed_by_whoever_adopted_it() {
        let folder = folder();
        let path = folder.path().join("socket");
        let (place, listener) = listen(&path, &SocketAccess::default()).unwrap();
        let identity = place.identity();
        place.leave();
        assert!(path.exists());
        let adopted = SocketPath::adopt(&path, identity, &listener).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(adopted);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_that_leads_elsewhere_is_not_adopted() {
        let folder = folder();
        let (path, other) = (folder.path().join("socket"), folder.path().join("other"));
        let (place, listener) = listen(&path, &SocketAccess::default()).unwrap();
        let (_other_place, _other_listener) = listen(&other, &SocketAccess::default()).unwrap();
        let refused = SocketPath::adopt(&other, place.identity(), &listener).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput);
        fs::write(folder.path().join("file"), "").unwrap();
        assert!(SocketPath::adopt(&folder.path().join("file"), place.identity(), &listener).is_err());
        let stream = UnixListener::from(OwnedFd::from(UnixStream::connect(&path).unwrap()));
        assert!(SocketPath::adopt(&path, place.identity(), &stream).is_err());
    }
}
