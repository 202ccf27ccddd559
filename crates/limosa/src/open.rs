//! Opens the device that a user's name means.

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use limosa_client::{Device, Error};
use limosa_host::{Descriptor, User, other_than_file};
use limosa_protocol::Errno;
use limosa_vfio_kernel::{Door, KernelDevice, Listed, Name};
use limosa_vfio_user::client::{Client, Options, Role};
use serde::{Deserialize, Serialize};

use crate::exit::{self, Code};
use crate::open_elsewhere::{self, OpenElsewhere};
use crate::wrong_socket;

/// The forms of a name, for messages about names of another form.
const FORMS: &str =
    "`limosa probe` lists the kernel's devices, and `limosa probe --help` says how devices are named";

/// How devices are opened.
#[derive(Clone, Copy, Debug)]
pub struct Opening<'a> {
    /// How long one request of vfio-user may take.
    pub limit: Duration,
    /// How long a change of the migration state, or a reset, may take by vfio-user.
    pub state_limit: Duration,
    /// The kernel's interface to use; by default the one whose node was named, else the cdev, else the group.
    pub door: Option<Door>,
    /// The users whose vfio-user servers, and destinations at UNIX sockets, are trusted.
    pub servers: &'a [User],
    /// The role that is requested from a vfio-user server that supports roles.
    pub role: Role,
}

/// The same for threads that may outlive the caller, such as threads whose device hangs.
#[derive(Clone, Debug)]
pub struct Opener {
    pub limit: Duration,
    pub state_limit: Duration,
    pub door: Option<Door>,
    pub servers: Vec<User>,
    pub role: Role,
}

impl Opener {
    /// How it opens.
    pub fn opening(&self) -> Opening<'_> {
        let Opener { limit, state_limit, door, role, .. } = *self;
        Opening { limit, state_limit, door, servers: &self.servers, role }
    }

    /// The device alone, and a device's error.
    pub fn open(&self, name: &str) -> limosa_client::Result<Box<dyn Device>> {
        match self.opening().open(name) {
            Ok(opened) => Ok(opened.into_device()),
            Err(error) => Err(error.downcast::<Error>().unwrap_or_else(|error| Error::Disconnected {
                device: name.into(),
                reason: exit::message(&error),
            })),
        }
    }
}

/// A device that a user named, open.
pub struct Opened {
    name: String,
    transport: Transport,
}

enum Transport {
    VfioUser(Client),
    /// Opened here: the kernel closes it with this process.
    Kernel(KernelDevice),
    /// Borrowed from a process, which keeps it open.
    Borrowed(KernelDevice),
}

impl Deref for Opened {
    type Target = dyn Device;

    fn deref(&self) -> &(dyn Device + 'static) {
        match &self.transport {
            Transport::VfioUser(device) => device,
            Transport::Kernel(device) | Transport::Borrowed(device) => device,
        }
    }
}

impl Opened {
    /// The device, if it is a kernel device.
    pub fn kernel(&self) -> Option<&KernelDevice> {
        match &self.transport {
            Transport::VfioUser(_) => None,
            Transport::Kernel(device) | Transport::Borrowed(device) => Some(device),
        }
    }

    /// The connection to a device behind a socket.
    pub fn vfio_user(&self) -> Option<&Client> {
        match &self.transport {
            Transport::VfioUser(device) => Some(device),
            Transport::Kernel(_) | Transport::Borrowed(_) => None,
        }
    }

    /// The fd of a kernel device.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.kernel().map(AsFd::as_fd)
    }

    /// Whether the kernel closes the device when this process ends.
    pub fn closes_with_us(&self) -> bool {
        matches!(self.transport, Transport::Kernel(_))
    }

    /// Whether another process has the device open, and uses it.
    pub fn is_borrowed(&self) -> bool {
        matches!(self.transport, Transport::Borrowed(_))
    }

    /// The name by which other commands reach the device as long as this process has it open.
    pub fn name_while_open(&self) -> Option<String> {
        let fd = self.fd()?.as_raw_fd();
        Some(format!("/proc/{}/fd/{fd}", std::process::id()))
    }

    /// The process that serves it, if it is behind a socket and that process is visible from here.
    pub fn server(&self) -> Option<i32> {
        self.vfio_user()?.server_process()
    }

    /// The device alone.
    pub fn into_device(self) -> Box<dyn Device> {
        match self.transport {
            Transport::VfioUser(device) => Box::new(device),
            Transport::Kernel(device) | Transport::Borrowed(device) => Box::new(device),
        }
    }

    /// The name that the user gave.
    pub fn given(&self) -> &str {
        &self.name
    }
}

/// The meaning of a device's name.
enum Named {
    Descriptor(Descriptor),
    Kernel(Name),
    /// The path of a socket, or a path where nothing is.
    Path(PathBuf),
}

impl Named {
    fn parse(name: &str) -> Named {
        match (Descriptor::parse(name), name.parse()) {
            (Some(descriptor), _) => Named::Descriptor(descriptor),
            (None, Ok(name)) => Named::Kernel(name),
            (None, Err(_)) => Named::Path(name.into()),
        }
    }
}

impl Opening<'_> {
    /// The same, of its own.
    pub fn owned(self) -> Opener {
        let Opening { limit, state_limit, door, role, .. } = self;
        Opener { limit, state_limit, door, servers: self.servers.to_vec(), role }
    }

    /// Opens the device that a user named.
    pub fn open(self, name: &str) -> anyhow::Result<Opened> {
        let transport = match Named::parse(name) {
            Named::Descriptor(descriptor) => Transport::Borrowed(KernelDevice::from_fd(
                name,
                open_elsewhere::borrow(descriptor, name)?.as_fd(),
                None,
            )?),
            Named::Kernel(_) => Transport::Kernel(self.kernel(name)?),
            Named::Path(path) => Transport::VfioUser(self.vfio_user(name, &path)?),
        };
        Ok(Opened { name: name.into(), transport })
    }

    fn kernel(self, name: &str) -> anyhow::Result<KernelDevice> {
        let options = limosa_vfio_kernel::Options { door: self.door, space: None };
        KernelDevice::open(name, &options).map_err(|error| {
            let by = if exit::is_in_use(&error) { holder_of(name) } else { None };
            let error = anyhow::Error::from(error);
            match by {
                Some(by) => error.context(format!("{name} is held by {by}")),
                None => error,
            }
        })
    }

    fn vfio_user(self, name: &str, path: &Path) -> anyhow::Result<Client> {
        let what = match std::fs::metadata(path) {
            Ok(found) if found.file_type().is_socket() => None,
            Ok(found) => Some(format!("it is {}, and no socket; {FORMS}", kind(&found))),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Some("permission denied: a folder on the way to it may not be entered by this user; run limosa as a user who \
                 may".to_owned()),
            Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&error.kind()) => {
                Some(format!(
                    "there is no such socket, and no such device of the kernel's; {FORMS}"
                ))
            }
            Err(error) => Some(format!("{error}; {FORMS}")),
        };
        if let Some(what) = what {
            return Err(exit::error(Code::Unreachable, format!("{name}: {what}")));
        }
        let server_users = Some(self.servers.to_vec());
        let options = Options {
            request_limit: self.limit,
            state_limit: self.state_limit,
            server_users,
            role: self.role,
            ..Options::default()
        };
        Client::connect(path, options).map_err(|error| {
            let is_other = matches!(
                error,
                Error::Misbehaved { .. } | Error::Disconnected { .. } | Error::Timeout { .. }
            );
            if is_other && let Some(what) = wrong_socket::not_a_device(path) {
                return exit::error(Code::Unreachable, format!("{name}: {what}"));
            }
            let hint = hint(&error);
            anyhow::Error::from(error).context(format!("{name} cannot be opened{hint}"))
        })
    }
}

/// The kind of a socket, as [`kind`] returns it.
pub const SOCKET: &str = "a socket";

/// The kind of file, for messages.
pub fn kind(found: &std::fs::Metadata) -> &'static str {
    match other_than_file(found.mode()) {
        Some(kind) => kind,
        None if found.len() == 0 => "an empty file",
        None => "a file",
    }
}

/// The process that has the device open, as far as this user may know.
fn holder_of(name: &str) -> Option<String> {
    let device = listed(name)?;
    let group = device.group.map(|group| Path::new("/dev/vfio").join(group.to_string()));
    let holders = OpenElsewhere::look().holders(&device.folder, group.as_deref());
    let names: Vec<_> = holders.iter().map(ToString::to_string).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

/// The kernel's entry for this name, if it is the name of exactly one VFIO device.
pub fn listed(name: &str) -> Option<Listed> {
    let named = Named::parse(name);
    let path = match &named {
        Named::Descriptor(descriptor) => open_elsewhere::sysfs_path(*descriptor),
        _ => None,
    };
    let is_it = |device: &Listed| match &named {
        Named::Descriptor(_) => path.as_ref() == Some(&device.folder),
        Named::Kernel(Name::Pci(id) | Name::Mdev(id)) => device.id == *id,
        Named::Kernel(Name::Cdev(number)) => {
            device.cdev == Some(format!("/dev/vfio/devices/vfio{number}").into())
        }
        Named::Kernel(Name::Group(group)) => device.group == Some(*group),
        Named::Path(_) => false,
    };
    let mut devices = limosa_vfio_kernel::list().into_iter().filter(is_it);
    devices.next().filter(|_| devices.next().is_none())
}

/// Advice about a device that cannot be opened.
fn hint(error: &Error) -> &'static str {
    match error {
        Error::Os { errno: Errno::ECONNREFUSED, .. } => " (nobody listens there: is its server running?)",
        Error::Os { errno: Errno::EACCES, .. } => {
            " (its server does not admit this user: `limosa serve` has --mode and --group for the users of the device, and --control for a \
             socket of the users who may move it)"
        }
        Error::Os { errno: Errno::EPERM, .. } => {
            " (--server-uid names a further user whose servers are trusted)"
        }
        Error::Timeout { .. } => " (most servers serve one client at a time: is another one connected?)",
        Error::Misbehaved { .. } => " (is it a vfio-user server?)",
        _ => "",
    }
}

/// Whether this is the name of a socket, and not that of a kernel device.
pub fn is_socket_path(name: &str) -> bool {
    matches!(Named::parse(name), Named::Path(_))
}

/// Whether two names mean the same device.
pub fn same(one: &str, other: &str) -> bool {
    let of = |name: &str| (identity(name), Named::parse(name));
    match (of(one), of(other)) {
        ((Some(one), _), (Some(other), _)) => one == other,
        // VFIO has neither.
        ((None, Named::Kernel(one)), (None, Named::Kernel(other))) => one == other,
        _ => false,
    }
}

/// A device's identity, independent of its name, until the machine is started again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Identity {
    /// A socket: its inode, the file system of that, and the time when a server created it, in seconds and nanoseconds since
    /// 1970, since inodes are reused.
    Socket { device: u64, inode: u64, made: (i64, i64) },
    /// A device's place in sysfs.
    Kernel(PathBuf),
}

/// The identity of the device that has this name now; `None` if there is no such device.
pub fn identity(name: &str) -> Option<Identity> {
    match Named::parse(name) {
        Named::Descriptor(_) | Named::Kernel(_) => listed(name).map(|device| Identity::Kernel(device.folder)),
        Named::Path(path) => std::fs::metadata(path).ok().map(|found| Identity::Socket {
            device: found.dev(),
            inode: found.ino(),
            made: (found.mtime(), found.mtime_nsec()),
        }),
    }
}

/// A name of the device that means the same in every process and every folder.
pub fn lasting_name(name: &str) -> io::Result<String> {
    Ok(match Named::parse(name) {
        Named::Kernel(_) => name.into(),
        Named::Descriptor(descriptor) => open_elsewhere::lasting_name(descriptor),
        Named::Path(path) => std::path::absolute(path)?.to_string_lossy().into_owned(),
    })
}

/// Whether a name means the same in every folder.
pub fn is_lasting(name: &str) -> bool {
    match Named::parse(name) {
        Named::Path(path) => path.is_absolute(),
        Named::Descriptor(_) | Named::Kernel(_) => true,
    }
}
