//! Addresses as users write them: `unix:PATH`, `tcp:HOST:PORT`, `file:PATH`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The address of the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A UNIX socket.
    Unix(PathBuf),
    /// A TCP port. The host is a name or an address, IPv6 without its brackets.
    Tcp(String, u16),
    /// A file.
    File(PathBuf),
}

/// A text that is not an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an address: {why}; expected unix:PATH, tcp:HOST:PORT or file:PATH")]
pub struct AddressError {
    text: String,
    why: &'static str,
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Address, AddressError> {
        let refuse = |why| Err(AddressError { text: text.into(), why });
        let Some((scheme, rest)) = text.split_once(':') else { return refuse("it has no scheme") };
        match scheme {
            "unix" | "file" if rest.is_empty() => refuse("the path is empty"),
            "unix" => Ok(Address::Unix(rest.into())),
            "file" => Ok(Address::File(rest.into())),
            "tcp" => {
                let Some((host, port)) = rest.rsplit_once(':') else { return refuse("the port is missing") };
                let Ok(port) = port.parse() else {
                    return refuse("the port is not a number from 0 to 65535");
                };
                let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
                let host = match bracketed {
                    None if host.contains(':') => return refuse("an IPv6 address needs brackets"),
                    None => host,
                    Some(host) => host,
                };
                if host.is_empty() {
                    return refuse("the host is empty");
                }
                Ok(Address::Tcp(host.into(), port))
            }
            _ => refuse("its scheme is not known"),
        }
    }
}

impl Address {
    /// The same address for processes in other folders: the path of a socket or file is absolute.
    pub fn lasting(&self) -> std::io::Result<Address> {
        Ok(match self {
            Address::Unix(path) => Address::Unix(std::path::absolute(path)?),
            Address::File(path) => Address::File(std::path::absolute(path)?),
            Address::Tcp(..) => self.clone(),
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(host, port) if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Address::Tcp(host, port) => write!(f, "tcp:{host}:{port}"),
            Address::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip() {
        for text in ["unix:/run/a:b", "tcp:host:1", "tcp:[::1]:65535", "tcp:10.0.0.1:0", "file:x"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_text_that_is_not_an_address_is_refused_with_the_reason() {
        for text in [
            "",
            "x",
            "unix:",
            "file:",
            "tcp:host",
            "tcp::1",
            "tcp:h:65536",
            "tcp:h:-1",
            "tcp:::1:5",
            "udp:a:1",
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains("expected unix:PATH"), "{error}");
        }
    }
}
