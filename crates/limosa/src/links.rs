//! The links of a move as the user chose them: addresses, TLS certificates and bandwidth.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use limosa_host::{Untrusted, User};
use limosa_migrate::link::{self, Address, Bandwidth, Connector, Link, LinkError, Listener, Tls, Wait};
use limosa_migrate::{Acceptor, Cancel, Ledger, Options};
use limosa_stream::DATA_BYTES_MAX;
use rustix::fs::{Access, access};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use crate::args;
use crate::exit::{self, Code};
use crate::open;

/// The limit for the lookup of a host's name.
const LOOKUP_MAX: Duration = Duration::from_secs(30);

/// TLS and bandwidth of this side's links.
#[derive(Debug)]
pub struct Links {
    tls: Option<Tls>,
    /// Whether links without TLS may leave this host.
    is_insecure: bool,
    bandwidth: Option<Bandwidth>,
    /// The users whose servers behind UNIX sockets are trusted.
    servers: Vec<User>,
}

impl Links {
    /// Reads and checks the certificates that were given.
    fn new(args: &args::Tls) -> anyhow::Result<Links> {
        let (Some(ca), Some(certificate), Some(key)) = (&args.tls_ca, &args.tls_cert, &args.tls_key) else {
            let is_insecure = args.insecure;
            return Ok(Links { tls: None, is_insecure, bandwidth: None, servers: Vec::new() });
        };
        for (option, file) in [("--tls-ca", ca), ("--tls-cert", certificate), ("--tls-key", key)] {
            access(file, Access::READ_OK).map_err(|errno| {
                let error = io::Error::from(errno);
                exit::error(exit::of_file(&error), format!("{option} {}: {error}", file.display()))
            })?;
        }
        keep_keys_from_dumps()?;
        let tls = Tls::load(ca, certificate, key, args.tls_name.as_deref())
            .map_err(|error| exit::error(Code::Usage, error.to_string()))?;
        tls.check(SystemTime::now()).map_err(|error| exit::error(Code::Unreachable, error.to_string()))?;
        Ok(Links { tls: Some(tls), is_insecure: false, bandwidth: None, servers: Vec::new() })
    }

    /// For links to this address. Checks that a name is known for the destination's certificate, or that the links stay within
    /// this host, unless the user accepts other ones without TLS. At a UNIX socket only servers of these users are accepted.
    pub fn to(address: &Address, args: &args::Tls, servers: &[User]) -> anyhow::Result<Links> {
        let links = Links { servers: servers.to_vec(), ..Links::new(args)? };
        match &links.tls {
            Some(tls) => {
                tls.expected_name(address)
                    .map_err(|error| exit::error(Code::Usage, format!("{error}, with --tls-name")))?;
            }
            None if links.stays_within_host() => {
                let looked_up = link::stays_within_host(address, LOOKUP_MAX);
                let stays = looked_up.map_err(|error| {
                    exit::error(Code::Unreachable, format!("cannot connect to {address}: {error}"))
                })?;
                if !stays {
                    return Err(insecure(address));
                }
            }
            None => {}
        }
        Ok(links)
    }

    /// For a listener on the address that the user gave. Checks that it is known whose certificates are accepted, or that nobody
    /// beyond this host can connect, unless the user accepts that without TLS.
    pub fn listening(text: &str, args: &args::Tls, names: &args::Names) -> anyhow::Result<(Links, Address)> {
        let (address, links) = (address(text)?, Links::new(args)?);
        if links.tls.is_some() && args.tls_name.is_none() && !names.tls_any_name {
            let what = "every certificate of the authorities in --tls-ca would be accepted, whoever has it; expected \
                        --tls-name NAME, the name in the other side's certificate, or --tls-any-name";
            return Err(exit::error(Code::Usage, what));
        }
        if links.stays_within_host() {
            let stays = link::stays_within_host(&address, LOOKUP_MAX);
            if !stays.map_err(|error| cannot_listen(&address, &error))? {
                return Err(insecure(&address));
            }
        }
        Ok((links, address))
    }

    /// Listens on an address that [`Links::listening`] has checked.
    pub fn bind(&self, address: &Address) -> anyhow::Result<Listener> {
        let listener = Listener::bind(address).map_err(|error| cannot_listen(address, &error))?;
        // A name may have been looked up differently.
        match self.stays_within_host() && !listener.stays_within_host() {
            true => Err(insecure(address)),
            false => Ok(listener),
        }
    }

    /// Whether links must not leave this host, since they are not under TLS.
    fn stays_within_host(&self) -> bool {
        self.tls.is_none() && !self.is_insecure
    }

    /// Limits what all links together send, in bytes per second.
    pub fn limited(self, bandwidth: Option<u64>, silence: Duration) -> anyhow::Result<Links> {
        if let Some(bytes_per_second) = bandwidth {
            // A frame has to arrive before the other side mistakes its delay for silence.
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
        match &self.tls {
            Some(tls) => connector = connector.with_tls(tls.clone()),
            // A name may be looked up differently the next time.
            None if self.stays_within_host() => connector = connector.within_host(),
            None => {}
        }
        if let Some(bandwidth) = &self.bandwidth {
            connector = connector.with_bandwidth(bandwidth.clone());
        }
        connector
    }

    /// Accepts sources from this listener, and answers those in doubt.
    pub fn acceptor(
        &self,
        listener: Listener,
        ledger: &Arc<Ledger>,
        options: &Options,
    ) -> anyhow::Result<Acceptor> {
        let started = Acceptor::new(listener, self.tls.clone(), Arc::clone(ledger), options);
        started.context("cannot accept connections")
    }

    /// Only answers sources in doubt that connect to this listener.
    pub fn answering(
        &self,
        listener: Listener,
        ledger: &Arc<Ledger>,
        options: &Options,
    ) -> anyhow::Result<Acceptor> {
        let started = Acceptor::answering(listener, self.tls.clone(), Arc::clone(ledger), options);
        started.context("cannot accept connections")
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
        Err(error) => {
            // A file is not an address here.
            let error = link::AddressError::to_string(&error);
            let why = error.split_once("; expected").map_or(&*error, |(why, _)| why);
            Err(exit::error(Code::Usage, format!("{why}; expected unix:PATH or tcp:HOST:PORT")))
        }
    }
}

/// The refusal of TCP beyond this host without TLS.
fn insecure(address: &Address) -> anyhow::Error {
    let what = format!(
        "{address}: without TLS, anyone on the path to another host can read and alter guest memory and device state, and take \
         the devices over; expected --tls-ca, --tls-cert and --tls-key, an address of this host alone (unix:PATH, \
         tcp:127.0.0.1:PORT), or --insecure for a network where nobody else is"
    );
    exit::error(Code::Usage, what)
}

fn cannot_listen(address: &Address, error: &io::Error) -> anyhow::Error {
    let code = exit::of_file(error);
    let hint = match error.kind() {
        io::ErrorKind::AlreadyExists => "choose another path, or remove it",
        io::ErrorKind::NotFound if matches!(address, Address::Unix(_)) => "make its folder first",
        io::ErrorKind::PermissionDenied if matches!(address, Address::Unix(_)) => {
            "choose a folder that you may write to"
        }
        _ => "choose another address",
    };
    // An existing file is a refusal, and a disk may fail. Any other error means that the address is unavailable.
    let is_disk = matches!(error.kind(), io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::StorageFull);
    let code = if code == Code::Refused || is_disk { code } else { Code::Unreachable };
    exit::error(code, format!("cannot listen on {address}: {error}; {hint}"))
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
            if let Address::Unix(path) = address
                && let Ok(found) = std::fs::metadata(path)
                && open::kind(&found) != open::SOCKET
            {
                let what = format!(
                    "cannot connect to {address}: it is {}, and no socket; {hint}",
                    open::kind(&found)
                );
                return exit::error(Code::Unreachable, what);
            }
            exit::error(Code::Unreachable, format!("cannot connect to {address}: {error}; {hint}"))
        }
        error => failed(&address.to_string(), error),
    })
}
