//! The links of a move as the user chose them: addresses, TLS certificates and bandwidth.

use std::io;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use limosa_host::{Untrusted, User};
use limosa_migrate::Cancel;
use limosa_migrate::link::{self, Address, Bandwidth, Connector, Link, LinkError, Listener, Tls, Wait};
use limosa_stream::DATA_BYTES_MAX;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use crate::args;
use crate::exit::{self, Code};

/// TLS and bandwidth of this side's links.
#[derive(Debug)]
pub struct Links {
    tls: Option<Tls>,
    bandwidth: Option<Bandwidth>,
    /// The users whose servers behind UNIX sockets are trusted.
    servers: Vec<User>,
}

impl Links {
    /// Reads and checks the certificates that were given.
    pub fn new(args: &args::Tls) -> anyhow::Result<Links> {
        let (Some(ca), Some(certificate), Some(key)) = (&args.tls_ca, &args.tls_cert, &args.tls_key) else {
            return Ok(Links { tls: None, bandwidth: None, servers: Vec::new() });
        };
        keep_keys_from_dumps()?;
        let tls = Tls::load(ca, certificate, key, args.tls_name.as_deref())
            .map_err(|error| exit::error(Code::Usage, error.to_string()))?;
        tls.check(SystemTime::now()).map_err(|error| exit::error(Code::Unreachable, error.to_string()))?;
        Ok(Links { tls: Some(tls), bandwidth: None, servers: Vec::new() })
    }

    /// As [`Links::new`], and checks that a name is known for the certificate of the destination at this address. At a UNIX
    /// socket only servers of these users are spoken to.
    pub fn to(address: &Address, args: &args::Tls, servers: &[User]) -> anyhow::Result<Links> {
        let links = Links { servers: servers.to_vec(), ..Links::new(args)? };
        if let Some(tls) = &links.tls {
            tls.expected_name(address)
                .map_err(|error| exit::error(Code::Usage, format!("{error}, with --tls-name")))?;
        }
        Ok(links)
    }

    /// Limits what all links together send, in bytes per second.
    pub fn limited(self, bandwidth: Option<u64>, silence: Duration) -> anyhow::Result<Links> {
        if let Some(bytes_per_second) = bandwidth {
            // A frame has to arrive before the other side takes its delay for silence.
            let least = (2.0 * DATA_BYTES_MAX as f64 / silence.as_secs_f64()).ceil() as u64;
            if bytes_per_second < least {
                let what = format!(
                    "--bandwidth {bytes_per_second}: expected at least {least} bytes per second, at which a frame of the \
                     stream takes half of the {silence:?} that --silence allows"
                );
                return Err(exit::error(Code::Usage, what));
            }
        }
        Ok(Links { bandwidth: bandwidth.map(Bandwidth::new), ..self })
    }

    /// Whether the links are under TLS.
    pub fn are_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Makes links to this address, which share the bandwidth.
    pub fn connector(&self, address: &Address) -> Connector {
        let mut connector = Connector::new(address.clone()).with_server_users(self.servers.clone());
        if let Some(tls) = &self.tls {
            connector = connector.with_tls(tls.clone());
        }
        if let Some(bandwidth) = &self.bandwidth {
            connector = connector.with_bandwidth(bandwidth.clone());
        }
        connector
    }

    /// Accepts connections from this listener.
    pub fn acceptor(
        &self,
        listener: Listener,
        silence: Duration,
    ) -> anyhow::Result<limosa_migrate::Acceptor> {
        Ok(limosa_migrate::Acceptor::new(listener, self.tls.clone(), silence)?)
    }
}

/// Keeps the keys that this process is about to load, and what it moves, from core dumps and from other processes of its
/// user. Only root may borrow a device that it holds from then on.
fn keep_keys_from_dumps() -> anyhow::Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("cannot keep keys from core dumps")
}

/// The error for a link that could not be made.
pub fn failed(peer: &str, error: LinkError) -> anyhow::Error {
    match error {
        LinkError::Cancelled => limosa_migrate::Error::Cancelled.into(),
        LinkError::TimedOut => {
            exit::error(Code::Unreachable, format!("{peer}: it stalled in the TLS handshake"))
        }
        error => exit::error(Code::Unreachable, format!("{peer}: {error}")),
    }
}

/// An address of a socket.
pub fn address(text: &str) -> anyhow::Result<Address> {
    match text.parse() {
        Ok(Address::File(_)) => Err(exit::error(
            Code::Usage,
            format!(
                "`{text}`: expected unix:PATH or tcp:HOST:PORT; a file is written by `limosa save` and read by \
                 `limosa load`"
            ),
        )),
        Ok(address) => Ok(address),
        Err(error) => Err(exit::error(Code::Usage, link::AddressError::to_string(&error))),
    }
}

/// Listens on the address that the user gave.
pub fn listen(text: &str) -> anyhow::Result<Listener> {
    let address = address(text)?;
    Listener::bind(&address).map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::NotFound if matches!(address, Address::Unix(_)) => "make its folder first",
            io::ErrorKind::PermissionDenied if matches!(address, Address::Unix(_)) => {
                "choose a folder that you may write to"
            }
            _ => "choose another address",
        };
        exit::error(Code::Unreachable, format!("cannot listen on {address}: {error}; {hint}"))
    })
}

/// Connects, within this limit. `hint` is for the message when the destination does not listen.
pub fn connect(
    connector: &Connector,
    limit: Duration,
    cancel: Option<&Cancel>,
    hint: &str,
) -> anyhow::Result<Box<dyn Link>> {
    let address = connector.address();
    connector.connect(Wait::within(limit, cancel)).map_err(|error| match error {
        LinkError::Io(error) => {
            let is_untrusted = error.get_ref().is_some_and(|error| error.is::<Untrusted>());
            let untrusted = "--server-uid names a further user whose servers are trusted";
            let hint = if is_untrusted { untrusted } else { hint };
            exit::error(Code::Unreachable, format!("cannot connect to {address}: {error}; {hint}"))
        }
        error => failed(&address.to_string(), error),
    })
}
