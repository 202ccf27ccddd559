//! [`TlsError`]: why there is no TLS link, in sentences that name the certificate or the file. The refusing end takes
//! them from its check, the refused end from the alert that it receives (RFC 8446, section 6.2).

use std::path::{Path, PathBuf};
use std::time::Duration;

use limosa_stream::printable;
use rustls::pki_types::UnixTime;
use rustls::{AlertDescription, CertificateError};

/// Why the two ends of a link do not, or no longer, trust each other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file of this end cannot be used.
    #[error("{}: {why}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The name given for the other end is not a valid name.
    #[error("`{name}` is not a name that a certificate can have; expected a host name or an IP address")]
    BadName {
        /// What was given.
        name: String,
    },
    /// The address has no host name, and no name was given.
    #[error("{address} has no host name: give the name in the other side's certificate")]
    NoName {
        /// The address.
        address: String,
    },
    /// This end does not accept the other end's certificate.
    #[error("its certificate is refused: {why}")]
    Refuses {
        /// Why.
        why: String,
    },
    /// The other end does not accept this one's certificate, or gave up.
    #[error("it refuses this side: {why}")]
    Refused {
        /// What its alert means.
        why: String,
    },
    /// The first bytes received are not TLS.
    #[error("it does not speak TLS: give certificates to both sides, or to neither")]
    PlainPeer,
    /// The other end expects TLS, and this one has no certificates.
    #[error("it speaks TLS: give certificates to both sides, or to neither")]
    TlsPeer,
    /// The link was closed before the handshake was complete.
    #[error(
        "it closed the link in the TLS handshake without a reason; does it expect TLS? give certificates to both \
         sides, or to neither"
    )]
    Closed,
    /// The received data violates TLS, or was altered on the way.
    #[error("{why}")]
    Broken {
        /// How.
        why: String,
    },
}

/// Translates an error of the session. `certificate` is this end's file.
pub(super) fn session(error: rustls::Error, ca: &Path, certificate: &Path) -> TlsError {
    use rustls::Error;
    match error {
        Error::InvalidCertificate(error) => TlsError::Refuses { why: self::certificate(&error, ca) },
        Error::NoCertificatesPresented => TlsError::Refuses {
            why: format!("it showed none; expected one from an authority in {}", ca.display()),
        },
        Error::AlertReceived(alert) => TlsError::Refused { why: self::alert(alert, certificate) },
        Error::PeerIncompatible(how) => TlsError::Broken {
            why: format!("it offers no version of TLS that this side accepts (1.3): {how:?}"),
        },
        Error::NoApplicationProtocol => {
            TlsError::Broken { why: "it serves another protocol than the migration of devices (ALPN)".into() }
        }
        Error::DecryptError => {
            TlsError::Broken { why: "a TLS record was altered on the way: it does not decrypt".into() }
        }
        error => TlsError::Broken { why: format!("it violates TLS: {}", printable(&error.to_string())) },
    }
}

/// Describes what is wrong with a certificate.
pub(super) fn certificate(error: &CertificateError, ca: &Path) -> String {
    match error {
        CertificateError::ExpiredContext { time, not_after } => {
            format!("it expired {} ago by this machine's clock", about(*not_after, *time))
        }
        CertificateError::Expired => "it has expired by this machine's clock".into(),
        CertificateError::NotValidYetContext { time, not_before } => {
            format!("it is not valid before {} from now by this machine's clock", about(*time, *not_before))
        }
        CertificateError::NotValidYet => "it is not valid yet by this machine's clock".into(),
        CertificateError::UnknownIssuer | CertificateError::BadSignature => format!(
            "it does not come from an authority in {}: a self-signed one has to be in that file itself, and certificates between \
             the two belong into its own file",
            ca.display()
        ),
        CertificateError::NotValidForNameContext { expected, presented } => {
            let expected = expected.to_str();
            // rustls names them as its own types print: DnsName("host").
            let plainly = |name: &String| match name.split_once("(\"").map(|(_, rest)| rest.trim_end_matches("\")")) {
                Some(dns) => dns.to_owned(),
                None => name.trim_start_matches("IpAddress(").trim_end_matches(')').to_owned(),
            };
            let presented: Vec<_> = presented.iter().map(plainly).collect();
            match presented.is_empty() {
                true => format!("it is issued to no name; expected is {expected} (subjectAltName)"),
                false => format!("it is issued to {}; expected is {expected}", printable(&presented.join(", "))),
            }
        }
        CertificateError::NotValidForName => "it is issued to another name than the expected one".into(),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "it is not for this purpose: its extendedKeyUsage needs serverAuth at a destination and clientAuth at a \
             source, or is left out"
                .into()
        }
        CertificateError::BadEncoding => "it is not a valid certificate: its encoding is damaged".into(),
        CertificateError::Revoked => "it has been revoked".into(),
        // The verifier has no kind of its own for it.
        error if error.to_string().contains("CaUsedAsEndEntity") => {
            "it is the certificate of an authority, perhaps self-signed, and not that of a host: create one for the host, without \
             CA:TRUE, signed by the authority"
                .into()
        }
        error => printable(&error.to_string()),
    }
}

/// Whether the error is about the certificate's validity period.
pub(super) fn is_about_time(error: &CertificateError) -> bool {
    matches!(
        error,
        CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. }
    )
}

/// Translates an alert about this end, whose certificate is in the file `certificate`.
fn alert(alert: AlertDescription, certificate: &Path) -> String {
    let own = certificate.display();
    match alert {
        AlertDescription::CertificateExpired => {
            format!("{own} has expired or is not valid yet, by that machine's clock")
        }
        AlertDescription::UnknownCA => format!("{own} does not come from an authority that it trusts"),
        AlertDescription::CertificateRequired => "it received no certificate".into(),
        AlertDescription::BadCertificate => {
            format!(
                "{own} is refused: it is issued to another name than the one expected there, or is damaged"
            )
        }
        AlertDescription::UnsupportedCertificate => {
            format!("{own} is not for this purpose (extendedKeyUsage)")
        }
        AlertDescription::CertificateRevoked => format!("{own} has been revoked"),
        AlertDescription::CertificateUnknown | AlertDescription::AccessDenied => {
            format!("{own} is not accepted there")
        }
        AlertDescription::ProtocolVersion => "it does not have TLS 1.3".into(),
        AlertDescription::NoApplicationProtocol => {
            "it serves another protocol than the migration of devices (ALPN)".into()
        }
        // A signature does not verify: the cause is an authority of the same name with another key.
        AlertDescription::DecryptError => format!(
            "{own} was not signed by the authority that it trusts, although that has the same name; or it was altered \
             on the way"
        ),
        AlertDescription::BadRecordMac => "what this side sent was altered on the way".into(),
        alert => format!("its TLS alert is {alert:?}"),
    }
}

/// The time between two moments, rounded for people.
fn about(from: UnixTime, to: UnixTime) -> String {
    let seconds = to.as_secs().saturating_sub(from.as_secs());
    match seconds {
        172_800.. => format!("{} days", seconds / 86_400),
        7_200.. => format!("{} hours", seconds / 3_600),
        120.. => format!("{} minutes", seconds / 60),
        _ => format!("{:?}", Duration::from_secs(seconds)),
    }
}
