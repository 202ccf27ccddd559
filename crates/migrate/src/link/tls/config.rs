//! [`Tls`]: one end's certificate and key, and the authorities that it trusts. They are read from PEM files (RFC 7468)
//! and checked before any connection is made.

use std::fmt;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::client::{Resumption, verify_server_name};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, InconsistentKeys, RootCertStore, ServerConfig};

use super::error::{self, TlsError};
use crate::link::Address;

/// The size limit for PEM files, more than any chain or list of authorities needs.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// The protocol name in ALPN (RFC 7301): a service that has a certificate of the same authority for another purpose is
/// refused.
const ALPN: &[u8] = b"limosa";

/// One end's certificate and key, and the authorities that may have issued the other end's certificate.
#[derive(Clone)]
pub struct Tls(Arc<Inner>);

struct Inner {
    pub(super) client: Arc<ClientConfig>,
    pub(super) server: Arc<ServerConfig>,
    verifier: Arc<dyn ClientCertVerifier>,
    chain: Vec<CertificateDer<'static>>,
    name: Option<ServerName<'static>>,
    ca: PathBuf,
    certificate: PathBuf,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (f.debug_struct("Tls"))
            .field("ca", &self.0.ca)
            .field("certificate", &self.0.certificate)
            .field("name", &self.0.name)
            .finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads PEM files: the authorities that may have issued the other end's certificate; this end's certificate,
    /// followed by the intermediate ones up to its authority; and its key, which only its owner may be able to read.
    ///
    /// `name` is the name in the other end's certificate, a host name or an IP address. Without it a source expects the
    /// host that it connects to, and a destination accepts any certificate of the authorities.
    ///
    /// The validity period of this end's certificate is not checked here: see [`Tls::check`].
    ///
    /// The key stays in this process's memory. A program that is nothing but a part of a move sees to it that the process is
    /// not dumped (PR_SET_DUMPABLE), as the command `limosa` does.
    pub fn load(ca: &Path, certificate: &Path, key: &Path, name: Option<&str>) -> Result<Tls, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let name = name.map(|name| server_name(name, name)).transpose()?;
        let roots = Arc::new(authorities(ca)?);
        let chain = certificates(certificate)?;
        let own = certified(certificate, &chain, key, &provider)?;
        let resolver = Arc::new(SingleCertAndKey::from(own));
        let unusable = |error: &dyn fmt::Display| TlsError::File {
            path: ca.into(),
            why: format!("its certificates cannot be used: {error}"),
        };
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| unusable(&error))?;
        let verifier: Arc<dyn ClientCertVerifier> = Arc::new(Named { inner: verifier, name: name.clone() });
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| unusable(&error))?
            .with_root_certificates(roots)
            .with_client_cert_resolver(Arc::clone(&resolver) as _);
        client.alpn_protocols = vec![ALPN.into()];
        client.resumption = Resumption::disabled();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| unusable(&error))?
            .with_client_cert_verifier(Arc::clone(&verifier))
            .with_cert_resolver(resolver);
        server.alpn_protocols = vec![ALPN.into()];
        // Sessions are not resumed, and an unread ticket would reset the connection when it is closed.
        server.send_tls13_tickets = 0;
        Ok(Tls(Arc::new(Inner {
            client: Arc::new(client),
            server: Arc::new(server),
            verifier,
            chain,
            name,
            ca: ca.into(),
            certificate: certificate.into(),
        })))
    }

    /// Checks the validity period of this end's own certificate, before the other end refuses it.
    pub fn check(&self, now: SystemTime) -> Result<(), TlsError> {
        let Some((own, between)) = self.0.chain.split_first() else { return Ok(()) };
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let verified = self.0.verifier.verify_client_cert(own, between, UnixTime::since_unix_epoch(now));
        match verified {
            // The other end may trust another authority.
            Err(rustls::Error::InvalidCertificate(error)) if error::is_about_time(&error) => {
                Err(TlsError::File {
                    path: self.0.certificate.clone(),
                    why: error::certificate(&error, &self.0.ca),
                })
            }
            _ => Ok(()),
        }
    }

    /// The name that the certificate of the destination at this address must have.
    /// [`TlsError::NoName`] for a UNIX socket when none was given.
    pub fn expected_name(&self, address: &Address) -> Result<ServerName<'static>, TlsError> {
        match (&self.0.name, address) {
            (Some(name), _) => Ok(name.clone()),
            (None, Address::Tcp(host, _)) => server_name(host, host),
            (None, _) => Err(TlsError::NoName { address: address.to_string() }),
        }
    }

    pub(super) fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.0.client)
    }

    pub(super) fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.0.server)
    }

    pub(super) fn ca(&self) -> &Path {
        &self.0.ca
    }

    pub(super) fn certificate(&self) -> &Path {
        &self.0.certificate
    }
}

/// Accepts the certificates of the authorities; if a name is expected, only those with that name.
#[derive(Debug)]
struct Named {
    inner: Arc<dyn ClientCertVerifier>,
    name: Option<ServerName<'static>>,
}

impl ClientCertVerifier for Named {
    fn root_hint_subjects(&self) -> &[rustls::DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        if let Some(name) = &self.name {
            verify_server_name(&ParsedCertificate::try_from(end_entity)?, name)?;
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

fn server_name(name: &str, shown: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(name.to_owned()).map_err(|_| TlsError::BadName { name: shown.into() })
}

/// Reads a file. Returns its mode as well.
fn read(path: &Path) -> Result<(Vec<u8>, u32), TlsError> {
    let failed = |why: String| TlsError::File { path: path.into(), why };
    let mut bytes = Vec::new();
    let file =
        limosa_host::open_regular(path, "expected a PEM file").map_err(|error| match error.kind() {
            ErrorKind::InvalidInput => failed(error.to_string()),
            _ => failed(format!("cannot be opened: {error}")),
        })?;
    let metadata =
        file.metadata().map_err(|error| failed(format!("its metadata cannot be read: {error}")))?;
    // A descriptor of a process may be a pipe or a device, which may never end.
    if !metadata.is_file() {
        return Err(failed("it is not a regular file; expected a PEM file".into()));
    }
    (file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes))
        .map_err(|error| failed(format!("cannot be read: {error}")))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(failed(
            "it is larger than 1 MiB, the limit for a PEM file of certificates or a key".into(),
        ));
    }
    Ok((bytes, metadata.permissions().mode() & 0o7777))
}

/// Describes the content of a file that is not the expected one.
fn instead(bytes: &[u8]) -> &'static str {
    let has = |what: &str| bytes.windows(what.len()).any(|window| window == what.as_bytes());
    if has("-----BEGIN ENCRYPTED PRIVATE KEY-----") || has("Proc-Type: 4,ENCRYPTED") {
        "it holds a key that is encrypted with a passphrase; decrypt it into a file that only its user can read"
    } else if has("PRIVATE KEY-----") {
        "it holds a private key"
    } else if has("-----BEGIN CERTIFICATE-----") {
        "it holds a certificate"
    } else if has("-----BEGIN ") {
        "it holds something else"
    } else {
        "it is not a PEM file"
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let (bytes, _) = read(path)?;
    let failed = |why: String| TlsError::File { path: path.into(), why };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<_, _>>()
        .map_err(|error| failed(format!("its PEM is damaged: {error:?}")))?;
    if chain.is_empty() {
        return Err(failed(format!(
            "expected certificates in PEM (BEGIN CERTIFICATE), but {}",
            instead(&bytes)
        )));
    }
    Ok(chain)
}

fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for (at, certificate) in certificates(path)?.into_iter().enumerate() {
        roots.add(certificate).map_err(|error| TlsError::File {
            path: path.into(),
            why: format!("its certificate {} is not valid: {error}", at + 1),
        })?;
    }
    Ok(roots)
}

fn certified(
    certificate: &Path,
    chain: &[CertificateDer<'static>],
    key: &Path,
    provider: &CryptoProvider,
) -> Result<CertifiedKey, TlsError> {
    let (bytes, mode) = read(key)?;
    let failed = |why: String| TlsError::File { path: key.into(), why };
    let der = PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| match error {
        rustls::pki_types::pem::Error::NoItemsFound => {
            failed(format!("expected a private key in PEM (BEGIN PRIVATE KEY), but {}", instead(&bytes)))
        }
        error => failed(format!("its PEM is damaged: {error:?}")),
    })?;
    if mode & 0o077 != 0 {
        return Err(failed(format!(
            "its mode {mode:04o} lets other users than its owner read a private key; run `chmod 600 {}`, and create a new key \
             if somebody may have read this one",
            key.display()
        )));
    }
    CertifiedKey::from_der(chain.to_vec(), der, provider).map_err(|error| match error {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            failed(format!("the key does not belong to the certificate in {}", certificate.display()))
        }
        rustls::Error::InvalidCertificate(error) => TlsError::File {
            path: certificate.into(),
            why: format!("its first certificate is not valid: {error}"),
        },
        error => failed(format!("expected an ECDSA, Ed25519 or RSA key: {error}")),
    })
}
