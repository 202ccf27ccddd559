//! [`Connector`]: makes the links of a move to one destination.

use limosa_host::{User, check_server};

use super::{Address, Bandwidth, FurtherLinks, LimitedLink, Link, LinkError, Tls, TlsLink, Wait};
use crate::link::socket::connect_to;

/// Connects to one destination as often as needed: for the first link of a move, for its further links, and to ask
/// what became of it. All links share one bandwidth, and are under TLS if it has certificates.
///
/// ```no_run
/// use std::time::Duration;
///
/// use limosa_migrate::link::{Bandwidth, Connector, Wait};
/// use limosa_migrate::{Outcome, Source};
///
/// fn send(source: Source<'_>) -> Result<Outcome, Box<dyn std::error::Error>> {
///     let connector = Connector::new("tcp:destination:7000".parse()?).with_bandwidth(Bandwidth::new(100 << 20));
///     let link = connector.connect(Wait::within(Duration::from_secs(30), None))?;
///     Ok(source.send_over(&link, &connector))
/// }
/// ```
#[derive(Clone, Debug)]
pub struct Connector {
    address: Address,
    tls: Option<Tls>,
    bandwidth: Option<Bandwidth>,
    within_host: bool,
    server_users: Option<Vec<User>>,
}

impl Connector {
    /// Plain links without a limit to this address, with no check of the listener.
    pub fn new(address: Address) -> Connector {
        Connector { address, tls: None, bandwidth: None, within_host: false, server_users: None }
    }

    /// Links under TLS.
    #[must_use]
    pub fn with_tls(self, tls: Tls) -> Connector {
        Connector { tls: Some(tls), ..self }
    }

    /// Links that share this bandwidth when they send.
    #[must_use]
    pub fn with_bandwidth(self, bandwidth: Bandwidth) -> Connector {
        Connector { bandwidth: Some(bandwidth), ..self }
    }

    /// Links to a UNIX socket only if its server was started by one of these users (SO_PEERCRED). Another one is refused
    /// with `PermissionDenied`, before anything is sent. No matter at a TCP port, whose server's user is not known.
    #[must_use]
    pub fn with_server_users(self, users: Vec<User>) -> Connector {
        Connector { server_users: Some(users), ..self }
    }

    /// Refuses to connect over TCP to a host that has other addresses than those of the loopback.
    #[must_use]
    pub fn within_host(self) -> Connector {
        Connector { within_host: true, ..self }
    }

    /// The destination's address.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Makes one more link. The wait bounds the connecting and the TLS handshake together. A cancel does not end the
    /// wait for a UNIX socket whose listener accepts no connection.
    pub fn connect(&self, wait: Wait<'_>) -> Result<Box<dyn Link>, LinkError> {
        let socket = connect_to(&self.address, self.within_host, wait)?;
        if let (Address::Unix(_), Some(users)) = (&self.address, &self.server_users) {
            check_server(&socket, users)?;
        }
        let link = LimitedLink::new(socket, self.bandwidth.clone());
        Ok(match &self.tls {
            Some(tls) => Box::new(TlsLink::connect(link, tls, &self.address, wait)?),
            None => Box::new(link),
        })
    }
}

impl FurtherLinks for Connector {
    fn next(&self, wait: Wait<'_>) -> Result<Box<dyn Link>, LinkError> {
        self.connect(wait)
    }
}
