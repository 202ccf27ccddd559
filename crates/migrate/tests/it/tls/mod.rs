//! Moves over TLS: both sides are authenticated before anything is moved, and whatever does not fit is named to
//! both; a link that is cut or altered below the encryption leaves one side running.

mod certificates;
mod faults;
mod files;
mod handshakes;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use limosa_migrate::link::{
    Address, Bandwidth, LimitedLink, Link, LinkError, Listener, SocketLink, Tls, TlsLink, Wait, connect,
};
use limosa_migrate::{Error, InDoubt, Mistrust, Outcome, Received};
use limosa_protocol::{MigrationFlags, State};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use tempfile::TempDir;

use crate::common::closures::AtCommit;
use crate::common::{Ends, VecPages, world};

const LIMIT: Duration = Duration::from_secs(30);

/// An authority, in a folder of its own with all that it issued.
struct Authority {
    folder: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        Authority::called("authority")
    }

    fn called(name: &str) -> Authority {
        let (folder, key) = (tempfile::tempdir().unwrap(), KeyPair::generate().unwrap());
        let mut params = CertificateParams::new([]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        std::fs::write(folder.path().join("ca"), params.self_signed(&key).unwrap().pem()).unwrap();
        Authority { folder, issuer: Issuer::new(params, key) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A certificate and key in the files `name` and `name.key`, made out to that name, which is valid always.
    fn issue(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        (params.not_before, params.not_after) = (date_time_ymd(2000, 1, 1), date_time_ymd(4000, 1, 1));
        change(&mut params);
        std::fs::write(self.path(name), params.signed_by(&key, &self.issuer).unwrap().pem()).unwrap();
        let path = self.path(&format!("{name}.key"));
        std::fs::write(&path, key.serialize_pem()).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    }

    fn load(&self, name: &str, expected: Option<&str>) -> Tls {
        Tls::load(&self.path("ca"), &self.path(name), &self.path(&format!("{name}.key")), expected).unwrap()
    }

    fn tls(&self, name: &str) -> Tls {
        self.issue(name, |_| {});
        self.load(name, None)
    }
}

fn wait() -> Wait<'static> {
    Wait::within(LIMIT, None)
}

/// Where the sources of these tests believe that they connect to.
fn address() -> Address {
    Address::Tcp("destination".into(), 1)
}

fn ends() -> Ends {
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 300);
    let mut ends = Ends::new(vec![source], vec![destination]);
    let pages = || {
        let pages = VecPages::new(4 * 4096);
        pages.0.lock().unwrap()[5000] = 1;
        Arc::new(pages)
    };
    ends.memory = Some((pages(), pages(), 4 * 4096));
    ends
}

/// A move whose links may not come about.
fn attempt(
    ends: &Ends,
    near: impl FnOnce() -> Result<Box<dyn Link>, LinkError> + Send,
    far: impl FnOnce() -> Result<Box<dyn Link>, LinkError> + Send,
) -> (Result<Outcome, LinkError>, Result<Received, LinkError>) {
    std::thread::scope(|scope| {
        let received =
            scope.spawn(|| far().map(|link| ends.with_destination(|destination| destination.receive(&link))));
        let outcome = near().map(|link| ends.with_source(|source| source.send(&link)));
        (outcome, received.join().unwrap())
    })
}

fn boxed<L: Link + 'static>(link: Result<TlsLink<L>, LinkError>) -> Result<Box<dyn Link>, LinkError> {
    link.map(|link| Box::new(link) as Box<dyn Link>)
}

/// Nothing was moved or touched; what each side says of it.
fn refused(
    ends: &Ends,
    outcome: Result<Outcome, LinkError>,
    received: Result<Received, LinkError>,
) -> (String, String) {
    assert_eq!(ends.source[0].state(), State::Running);
    assert!(ends.source[0].holds_guest() && !ends.destination[0].holds_guest());
    assert_eq!(ends.destination[0].state(), State::Running, "found so");
    let near = match outcome {
        Ok(Outcome::Undone { why: Error::Link { error, .. }, .. }) => error,
        Ok(outcome) => panic!("{outcome:?}"),
        Err(error) => error,
    };
    let far = match received {
        Ok(Received::Discarded { why: Error::Link { error, .. }, .. }) => error,
        Ok(received) => panic!("{received:?}"),
        Err(error) => error,
    };
    (near.to_string(), far.to_string())
}

/// What each says of the other.
fn refuse(source: &Tls, destination: &Tls) -> (String, String) {
    let (near, far) = SocketLink::pair().unwrap();
    let ends = ends();
    let (outcome, received) = attempt(
        &ends,
        || boxed(TlsLink::connect(near, source, &address(), wait())),
        || boxed(TlsLink::accept(far, destination, wait())),
    );
    refused(&ends, outcome, received)
}

#[track_caller]
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

#[test]
fn devices_and_memory_move_over_tls_also_with_a_limited_bandwidth() {
    let authority = Authority::new();
    let (source, destination) = (authority.tls("source"), authority.tls("destination"));
    for limit in [None, Some(64 << 20)] {
        let folder = tempfile::tempdir().unwrap();
        for at in [Address::Tcp("127.0.0.1".into(), 0), Address::Unix(folder.path().join("socket"))] {
            let listener = Listener::bind(&at).unwrap();
            let ends = ends();
            let near = connect(listener.address(), LIMIT).unwrap();
            let far = listener.accept(wait()).unwrap();
            let near = LimitedLink::new(near, limit.map(Bandwidth::new));
            let (outcome, received) = attempt(
                &ends,
                || boxed(TlsLink::connect(near, &source, &address(), wait())),
                || boxed(TlsLink::accept(far, &destination, wait())),
            );
            assert!(ends.check(outcome.unwrap(), received.unwrap(), "over TLS"));
        }
    }
}

/// Asks a destination with this certificate, or without TLS.
fn resolve(ends: &Ends, doubt: InDoubt, source: &Tls, destination: Option<&Tls>) -> (Outcome, Received) {
    let (near, far) = SocketLink::pair().unwrap();
    std::thread::scope(|scope| {
        let answered = scope.spawn(move || {
            let far = match destination {
                Some(tls) => boxed(TlsLink::accept(far, tls, wait())).unwrap(),
                None => Box::new(far),
            };
            ends.with_destination(|destination| destination.receive(&far))
        });
        let near = match destination {
            Some(_) => boxed(TlsLink::connect(near, source, &address(), wait())).unwrap(),
            None => Box::new(near),
        };
        let outcome = ends.with_source(|source| source.resolve(doubt, &near));
        drop(near);
        (outcome, answered.join().unwrap())
    })
}

#[test]
fn any_destination_of_the_same_authority_could_answer_for_the_one_that_was_sent_to() {
    let authority = Authority::new();
    let (source, destination) = (authority.tls("source"), authority.tls("destination"));
    authority.issue("other", |params| {
        params.subject_alt_names = CertificateParams::new(["destination".into()]).unwrap().subject_alt_names;
    });
    let other = authority.load("other", None);
    let (near, far) = SocketLink::pair().unwrap();
    let near = Arc::new(near);
    let mut ends = ends();
    let cuts = Arc::clone(&near);
    ends.vmm = Arc::new(AtCommit(move |_: &_| cuts.cut()));
    let (outcome, received) = attempt(
        &ends,
        || boxed(TlsLink::connect(near, &source, &address(), wait())),
        || boxed(TlsLink::accept(far, &destination, wait())),
    );
    let Ok(Outcome::InDoubt(doubt)) = outcome else { panic!("{outcome:?}") };
    assert!(matches!(received, Ok(Received::Discarded { .. })), "{received:?}");
    let expected = doubt.note().peer.expect("it has shown a certificate");
    let mut doubt = doubt;
    for tls in [Some(&other), None] {
        let (outcome, received) = resolve(&ends, doubt, &source, tls);
        assert!(!matches!(received, Received::Answered { .. }), "it is not asked: {received:?}");
        let Outcome::InDoubt(still) = outcome else { panic!("{outcome:?}") };
        let said = still.why.to_string();
        says(&said, &["not the destination to which the COMMIT was sent", &expected.to_string(), "--decide"]);
        let Error::Unauthenticated { why: Mistrust::AnotherCertificate { found, .. }, .. } = &still.why
        else {
            panic!("{said}")
        };
        assert!(found.is_some() == tls.is_some() && *found != Some(expected), "{said}");
        assert!(!ends.source[0].state().is_running());
        doubt = still;
    }
    let (outcome, received) = resolve(&ends, doubt, &source, Some(&destination));
    assert!(matches!(outcome, Outcome::Undone { .. }), "{outcome:?}");
    assert!(matches!(received, Received::Answered { .. }), "{received:?}");
    assert_eq!(ends.source[0].state(), State::Running);
}
