//! The first message of a connection (`vfio-user.rst: VFIO_USER_VERSION`): versions, capabilities, and the
//! resulting [`Limits`].

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The major version, and the highest minor version that this implementation speaks.
pub const VERSION: (u16, u16) = (0, 2);

/// The most bytes of JSON that are read from a peer, NUL included.
pub const JSON_BYTES_MAX: usize = 4096;

/// This implementation's limit on the fds of one message. QEMU refuses a larger number.
pub const MSG_FDS_MAX: usize = 16;

/// The most bytes of data in one message that this implementation ever agrees to. QEMU refuses a
/// larger number.
pub const DATA_XFER_BYTES_MAX: u32 = 64 << 20;

/// The bytes of data in one message that both sides propose, and that hold where a peer is silent.
pub const DATA_XFER_BYTES_DEFAULT: u32 = 1 << 20;

/// The longest VERSION reply, in bytes of the whole message: QEMU receives it into the buffer of its
/// request, which has this size.
pub const REPLY_BYTES_MAX: usize = 214;

/// Why a peer's version data is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VersionError {
    /// More JSON than [`JSON_BYTES_MAX`].
    #[error("{0} bytes of version data, more than {JSON_BYTES_MAX}")]
    TooLong(usize),
    /// The JSON does not end in its one NUL.
    #[error("the version data does not end with a NUL")]
    NotTerminated,
    /// Not JSON.
    #[error("the version data is not JSON: {0}")]
    NotJson(String),
    /// A capability has an invalid type or value.
    #[error("capability {name} must be {want}")]
    Capability {
        /// Its name.
        name: &'static str,
        /// The expected type or value.
        want: &'static str,
    },
}

/// The capabilities that one side announces. `None` for those that it does not announce.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// The sender's limit on the fds of one message; 1 if it does not announce one.
    pub max_msg_fds: Option<u64>,
    /// The most bytes of data in one message; 1 MiB where it is silent.
    pub max_data_xfer_size: Option<u64>,
    /// The most DMA mappings at once; 65535 where it is silent.
    pub max_dma_maps: Option<u64>,
    /// Page sizes of DMA mappings, ORed; 4096 where it is silent.
    pub pgsizes: Option<u64>,
    /// Whether REGION_WRITE_MULTI is understood.
    pub write_multiple: Option<bool>,
    /// The twin socket.
    pub twin_socket: Option<TwinSocket>,
    /// The migration capability of older versions of the specification; ignored.
    pub migration: Option<MigrationCapability>,
    /// The role that a client requests, and in a reply the role that it has
    /// (`docs/vfio-user-extensions.md: the control role`).
    pub role: Option<Role>,
}

/// A client's role on a server of this implementation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The VMM, one client at a time: the role of a client that does not request one.
    Vmm,
    /// A control client: state, session data, dirty log and configuration space. Refused without permission.
    Control,
    /// A control client if there is a VMM and the client has permission; otherwise the VMM.
    Either,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Vmm => "vmm",
            Role::Control => "control",
            Role::Either => "either",
        }
    }

    fn named(name: &str) -> Option<Role> {
        [Role::Vmm, Role::Control, Role::Either].into_iter().find(|role| role.name() == name)
    }
}

/// The capability of a second socket for the server's commands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TwinSocket {
    /// Whether the sender can, in a reply whether it does.
    pub supported: bool,
    /// In a reply, which of the message's fds is the socket.
    pub fd_index: Option<u64>,
}

/// The capability *migration* of libvfio-user and QEMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MigrationCapability {
    /// Bytes for each bit of a dirty bitmap.
    pub pgsize: Option<u64>,
    /// The most bytes of a dirty bitmap.
    pub max_bitmap_size: Option<u64>,
}

impl Capabilities {
    /// The announcement of a client of this implementation.
    pub fn of_client(max_data_xfer_size: u32, twin_socket: bool) -> Capabilities {
        Capabilities {
            max_msg_fds: Some(MSG_FDS_MAX as u64),
            max_data_xfer_size: Some(max_data_xfer_size.into()),
            max_dma_maps: Some(65535),
            pgsizes: Some(4096),
            write_multiple: Some(true),
            twin_socket: twin_socket.then_some(TwinSocket { supported: true, fd_index: None }),
            migration: None,
            role: None,
        }
    }

    /// Whether a client that announces this is QEMU. Its DMA_READ and DMA_WRITE messages are not those of the
    /// specification: the count has 32 bits, and the data begins 4 bytes earlier (`hw/vfio-user/protocol.h:
    /// VFIOUserDMARW`, as of QEMU 11.1). No other client announces the size of its bitmaps together with REGION_WRITE_MULTI
    /// and without a twin socket.
    pub fn are_qemus(&self) -> bool {
        let bitmap = self.migration.and_then(|migration| migration.max_bitmap_size);
        bitmap.is_some() && self.write_multiple == Some(true) && self.twin_socket.is_none()
    }

    /// The answer of a server with `self` to a client that announced `theirs`: only capabilities that the client
    /// knows.
    #[must_use]
    pub fn answer(&self, theirs: &Capabilities) -> Capabilities {
        Capabilities {
            max_msg_fds: self.max_msg_fds,
            max_data_xfer_size: self.max_data_xfer_size,
            max_dma_maps: self.max_dma_maps,
            pgsizes: self.pgsizes,
            write_multiple: self.write_multiple.filter(|_| theirs.write_multiple == Some(true)),
            twin_socket: self.twin_socket.filter(|_| theirs.twin_socket.is_some_and(|twin| twin.supported)),
            migration: self.migration.filter(|_| theirs.migration.is_some()),
            role: self.role.filter(|_| theirs.role.is_some()),
        }
    }

    /// Reads version data as it lies on the wire; empty means nothing announced.
    pub fn decode(data: &[u8]) -> Result<Capabilities, VersionError> {
        if data.is_empty() {
            return Ok(Capabilities::default());
        }
        if data.len() > JSON_BYTES_MAX {
            return Err(VersionError::TooLong(data.len()));
        }
        let Some((0, json)) = data.split_last() else { return Err(VersionError::NotTerminated) };
        if json.is_empty() {
            return Ok(Capabilities::default());
        }
        // serde_json limits the depth; a NUL inside is no JSON.
        let value: Value =
            serde_json::from_slice(json).map_err(|error| VersionError::NotJson(error.to_string()))?;
        let Value::Object(all) = value else { return Err(wrong("version data", "an object")) };
        let Some(caps) = object(&all, "capabilities")? else { return Ok(Capabilities::default()) };
        let twin_socket = match object(caps, "twin_socket")? {
            None => None,
            Some(twin) => Some(TwinSocket {
                supported: boolean(twin, "supported")?.unwrap_or(false),
                fd_index: number(twin, "fd_index")?,
            }),
        };
        let migration = match object(caps, "migration")? {
            None => None,
            Some(migration) => Some(MigrationCapability {
                pgsize: number(migration, "pgsize")?,
                max_bitmap_size: number(migration, "max_bitmap_size")?,
            }),
        };
        let role = match caps.get("role") {
            None => None,
            Some(role) => {
                let named = role.as_str().and_then(Role::named);
                Some(named.ok_or(wrong("role", "\"vmm\", \"control\" or \"either\""))?)
            }
        };
        let capabilities = Capabilities {
            max_msg_fds: number(caps, "max_msg_fds")?,
            max_data_xfer_size: number(caps, "max_data_xfer_size")?,
            max_dma_maps: number(caps, "max_dma_maps")?,
            pgsizes: number(caps, "pgsizes")?,
            write_multiple: boolean(caps, "write_multiple")?,
            twin_socket,
            migration,
            role,
        };
        // A limit of 0 would make every transfer endless.
        if capabilities.max_data_xfer_size == Some(0) {
            return Err(wrong("max_data_xfer_size", "at least 1"));
        }
        if capabilities.pgsizes.is_some_and(|sizes| sizes % 4096 != 0 || sizes == 0) {
            return Err(wrong("pgsizes", "a multiple of 4096"));
        }
        Ok(capabilities)
    }

    /// The version data in its wire format, including NUL, in at most `bytes_max` bytes: capabilities that do not
    /// fit are left out, the least important first.
    pub fn encode(&self, bytes_max: usize) -> Vec<u8> {
        let mut left_out = 0;
        loop {
            let mut data = self.json(left_out).to_string().into_bytes();
            data.push(0);
            if data.len() <= bytes_max || left_out > 7 {
                return data;
            }
            left_out += 1;
        }
    }

    /// The JSON without the last `left_out` capabilities in order of importance.
    fn json(&self, left_out: usize) -> Value {
        let number = |n: Option<u64>| n.map(Value::from);
        let twin = self.twin_socket.map(|twin| {
            let mut object = Map::new();
            object.insert("supported".into(), twin.supported.into());
            if let Some(index) = twin.fd_index {
                object.insert("fd_index".into(), index.into());
            }
            Value::Object(object)
        });
        let migration = self.migration.map(|migration| {
            let mut object = Map::new();
            if let Some(size) = migration.pgsize {
                object.insert("pgsize".into(), size.into());
            }
            if let Some(size) = migration.max_bitmap_size {
                object.insert("max_bitmap_size".into(), size.into());
            }
            Value::Object(object)
        });
        let by_importance = [
            ("max_msg_fds", number(self.max_msg_fds)),
            ("max_data_xfer_size", number(self.max_data_xfer_size)),
            ("role", self.role.map(|role| Value::from(role.name()))),
            ("twin_socket", twin),
            ("write_multiple", self.write_multiple.map(Value::from)),
            ("max_dma_maps", number(self.max_dma_maps)),
            ("pgsizes", number(self.pgsizes)),
            ("migration", migration),
        ];
        let keep = by_importance.len().saturating_sub(left_out);
        let mut caps = Map::new();
        for (name, value) in by_importance.into_iter().take(keep) {
            if let Some(value) = value {
                caps.insert(name.into(), value);
            }
        }
        let mut all = Map::new();
        all.insert("capabilities".into(), Value::Object(caps));
        Value::Object(all)
    }
}

/// The limits of a connection after VERSION.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// The minor version.
    pub minor: u16,
    /// The most fds that may be sent to the peer in one message.
    pub msg_fds_max: usize,
    /// The most bytes of data in one message, either way.
    pub data_xfer_bytes_max: u32,
    /// The most DMA mappings at once.
    pub dma_maps_max: u64,
    /// Page sizes of DMA mappings, ORed.
    pub page_sizes: u64,
    /// Whether REGION_WRITE_MULTI may be sent.
    pub write_multiple: bool,
    /// Whether the server's commands use a separate socket, and the index of its fd in the reply.
    pub twin_socket: Option<u64>,
}

impl Limits {
    /// The limits for a client's announcement and a server's answer; both sides compute the same.
    pub fn agree(minor: u16, client: &Capabilities, server: &Capabilities, peer: &Capabilities) -> Limits {
        let data_xfer = |caps: &Capabilities| match caps.max_data_xfer_size {
            None => DATA_XFER_BYTES_DEFAULT,
            // A value beyond this implementation's own limit counts as that limit.
            Some(size) => u32::try_from(size).unwrap_or(u32::MAX).clamp(1, DATA_XFER_BYTES_MAX),
        };
        let dma_maps = |caps: &Capabilities| caps.max_dma_maps.unwrap_or(65535);
        Limits {
            minor,
            msg_fds_max: usize::try_from(peer.max_msg_fds.unwrap_or(1))
                .unwrap_or(usize::MAX)
                .min(MSG_FDS_MAX),
            data_xfer_bytes_max: data_xfer(client).min(data_xfer(server)),
            dma_maps_max: dma_maps(client).min(dma_maps(server)),
            page_sizes: server.pgsizes.unwrap_or(4096),
            write_multiple: client.write_multiple == Some(true) && server.write_multiple == Some(true),
            twin_socket: server.twin_socket.filter(|twin| twin.supported).and_then(|twin| twin.fd_index),
        }
    }
}

fn wrong(name: &'static str, want: &'static str) -> VersionError {
    VersionError::Capability { name, want }
}

fn object<'a>(
    map: &'a Map<String, Value>,
    name: &'static str,
) -> Result<Option<&'a Map<String, Value>>, VersionError> {
    match map.get(name) {
        None => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object)),
        Some(_) => Err(wrong(name, "an object")),
    }
}

fn number(map: &Map<String, Value>, name: &'static str) -> Result<Option<u64>, VersionError> {
    match map.get(name) {
        None => Ok(None),
        Some(value) => value.as_u64().map(Some).ok_or(wrong(name, "a number, not negative")),
    }
}

fn boolean(map: &Map<String, Value>, name: &'static str) -> Result<Option<bool>, VersionError> {
    match map.get(name) {
        None => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(_) => Err(wrong(name, "true or false")),
    }
}

#[cfg(test)]
mod tests;
