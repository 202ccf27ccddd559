//! What moves go over: sockets, under TLS where certificates are given, with the bandwidth that is allowed.

use std::io;
use std::time::{Duration, SystemTime};

use limosa_migrate::Cancel;
use limosa_migrate::link::{
    self, Acceptor, Address, Bandwidth, LimitedLink, Link, LinkError, Listener, Tls, TlsLink, Wait,
};
use limosa_stream::DATA_BYTES_MAX;

use crate::args;
use crate::exit::{self, Code};

/// How this side makes a link of a socket.
#[derive(Debug)]
pub struct Links {
    tls: Option<Tls>,
    bandwidth: Option<Bandwidth>,
}

impl Links {
    /// With the certificates that were given, which are read and checked.
    pub fn new(args: &args::Tls) -> anyhow::Result<Links> {
        let (Some(ca), Some(certificate), Some(key)) = (&args.tls_ca, &args.tls_cert, &args.tls_key) else {
            return Ok(Links { tls: None, bandwidth: None });
        };
        let tls = Tls::load(ca, certificate, key, args.tls_name.as_deref())
            .map_err(|error| exit::error(Code::Usage, error.to_string()))?;
        tls.check(SystemTime::now()).map_err(|error| exit::error(Code::Unreachable, error.to_string()))?;
        Ok(Links { tls: Some(tls), bandwidth: None })
    }

    /// To this address, whose host may have to be the name in a certificate.
    pub fn to(address: &Address, args: &args::Tls) -> anyhow::Result<Links> {
        let links = Links::new(args)?;
        if let Some(tls) = &links.tls {
            tls.expected_name(address)
                .map_err(|error| exit::error(Code::Usage, format!("{error}, with --tls-name")))?;
        }
        Ok(links)
    }

    /// Sends no more than these bytes a second.
    pub fn limited(self, bandwidth: Option<u64>, silence: Duration) -> anyhow::Result<Links> {
        if let Some(bytes_per_second) = bandwidth {
            // The other side takes a frame that is not whole by then for silence.
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

    /// Whether they are under TLS.
    pub fn are_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Connects to whoever receives there.
    pub fn connect(
        &self,
        address: &Address,
        limit: Duration,
        cancel: Option<&Cancel>,
    ) -> Result<Box<dyn Link>, LinkError> {
        let wait = Wait::within(limit, cancel);
        let link = LimitedLink::new(link::connect(address, limit)?, self.bandwidth.clone());
        Ok(match &self.tls {
            Some(tls) => Box::new(TlsLink::connect(link, tls, address, wait)?),
            None => Box::new(link),
        })
    }

    /// Whoever connects to this listener.
    pub fn arrivals(&self, listener: Listener, silence: Duration) -> anyhow::Result<Acceptor> {
        Ok(Acceptor::new(listener, self.tls.clone(), silence)?)
    }
}

/// A link that did not come about.
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

/// Listens where the user said.
pub fn listen(text: &str) -> anyhow::Result<Listener> {
    let address = address(text)?;
    Listener::bind(&address).map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::NotFound if matches!(address, Address::Unix(_)) => "make its folder first",
            _ => "choose another address",
        };
        exit::error(Code::Unreachable, format!("cannot listen on {address}: {error}; {hint}"))
    })
}

/// Connects to who is there; `hint` says who that should be.
pub fn connect(
    links: &Links,
    address: &Address,
    limit: Duration,
    cancel: Option<&Cancel>,
    hint: &str,
) -> anyhow::Result<Box<dyn Link>> {
    links.connect(address, limit, cancel).map_err(|error| match error {
        LinkError::Io(error) => {
            exit::error(Code::Unreachable, format!("cannot connect to {address}: {error}; {hint}"))
        }
        error => failed(&address.to_string(), error),
    })
}
