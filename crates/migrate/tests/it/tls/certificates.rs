//! Certificates that are refused: by their time, authority, name or purpose.

use super::{Authority, refuse, says, wait};
use limosa_migrate::link::{SocketLink, Tls, TlsLink};
use rcgen::{ExtendedKeyUsagePurpose, date_time_ymd};
use std::sync::Arc;
use std::time::SystemTime;

#[test]
fn a_certificate_out_of_its_time_is_refused_and_both_sides_say_so() {
    let authority = Authority::new();
    let (source, destination) = (authority.tls("source"), authority.tls("destination"));
    for (year, words) in [(1990, "expired"), (3990, "not valid before")] {
        let issue = |name: &str| {
            authority.issue(name, |params| {
                params.not_before = date_time_ymd(year, 1, 1);
                params.not_after = date_time_ymd(year + 1, 1, 1);
            });
            authority.load(name, None)
        };
        let wrong = issue("wrong");
        let (near, far) = refuse(&wrong, &destination);
        says(&far, &["its certificate is refused", words, "days"]);
        says(
            &near,
            &["refuses this side", &authority.path("wrong").display().to_string(), "expired or is not"],
        );
        let wrong = {
            issue("destination");
            authority.load("destination", None)
        };
        let (near, far) = refuse(&source, &wrong);
        says(&near, &["its certificate is refused", words, "days"]);
        says(&far, &["refuses this side", &authority.path("destination").display().to_string()]);
        let error = wrong.check(SystemTime::now()).unwrap_err().to_string();
        says(&error, &[&authority.path("destination").display().to_string(), words]);
    }
    source.check(SystemTime::now()).unwrap();
}

#[test]
fn a_certificate_of_another_authority_is_refused_and_both_sides_say_so() {
    // One of the same name is what an authority becomes that is made anew.
    for name in ["another authority", "authority"] {
        is_refused_unless_it_issued(&Authority::new(), &Authority::called(name));
    }
}

fn is_refused_unless_it_issued(authority: &Authority, other: &Authority) {
    let (source, destination) = (authority.tls("source"), authority.tls("destination"));
    let strange = |name: &str| {
        other.issue(name, |_| {});
        let key = other.path(&format!("{name}.key"));
        Tls::load(&authority.path("ca"), &other.path(name), &key, None).unwrap()
    };
    let words = format!("does not come from an authority in {}", authority.path("ca").display());
    let (near, far) = refuse(&strange("source"), &destination);
    says(&far, &[&words]);
    says(&near, &["refuses this side", &other.path("source").display().to_string(), "authority"]);
    let (near, far) = refuse(&source, &strange("destination"));
    says(&near, &[&words]);
    says(&far, &["refuses this side", &other.path("destination").display().to_string()]);
    strange("source").check(SystemTime::now()).unwrap();
}

#[test]
fn a_certificate_for_another_name_or_purpose_is_refused_and_both_sides_say_so() {
    let authority = Authority::new();
    let (source, destination) = (authority.tls("source"), authority.tls("destination"));
    let (near, far) = refuse(&source, &authority.tls("elsewhere"));
    says(&near, &["issued to", "elsewhere", "expected is destination"]);
    says(&far, &["refuses this side", "elsewhere", "another name"]);
    let (near, far) = refuse(&source, &authority.load("destination", Some("that.source")));
    says(&far, &["issued to", "expected is that.source"]);
    says(&near, &["refuses this side", "another name"]);
    for (purpose, fits) in
        [(ExtendedKeyUsagePurpose::ServerAuth, false), (ExtendedKeyUsagePurpose::ClientAuth, true)]
    {
        authority.issue("narrow", |params| params.extended_key_usages = vec![purpose]);
        let narrow = authority.load("narrow", None);
        narrow.check(SystemTime::now()).unwrap();
        if !fits {
            let (_, far) = refuse(&narrow, &destination);
            says(&far, &["not for this purpose", "clientAuth at a source"]);
        }
    }
}

/// A source that knows TLS but shows nothing.
#[test]
fn a_source_without_a_certificate_is_refused_and_both_sides_say_so() {
    let authority = Authority::new();
    let destination = authority.tls("destination");
    let mut roots = rustls::RootCertStore::empty();
    let pem = std::fs::read(authority.path("ca")).unwrap();
    for certificate in
        <rustls::pki_types::CertificateDer<'_> as rustls::pki_types::pem::PemObject>::pem_slice_iter(&pem)
    {
        roots.add(certificate.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = "destination".try_into().unwrap();
    let session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    let (near, far) = (near, SocketLink::new(far, "the source"));
    let (refused, told) = std::thread::scope(|scope| {
        let refused = scope.spawn(|| TlsLink::accept(far, &destination, wait()).unwrap_err());
        let mut stream = rustls::StreamOwned::new(session, near);
        let told = std::io::Read::read(&mut stream, &mut [0]).unwrap_err();
        drop(stream);
        (refused.join().unwrap().to_string(), told.to_string())
    });
    says(&refused, &["it showed none", &authority.path("ca").display().to_string()]);
    says(&told, &["CertificateRequired"]);
}
