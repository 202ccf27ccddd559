//! Moves over TLS: both sides are authenticated before anything is moved, and whatever does not fit is named to
//! both; a link that is cut or altered below the encryption leaves one side running.

use std::fs::Permissions;
use std::io::IoSlice;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use crate::common::{Ends, Fault, FaultyLink, VecPages, Way, options, world};
use limosa_migrate::link::{
    Address, Bandwidth, LimitedLink, Link, LinkError, Listener, SocketLink, Tls, TlsError, TlsLink, Wait,
    connect,
};
use limosa_migrate::{Cancel, CommitNote, Error, InDoubt, Mistrust, Outcome, Received, Vmm};
use limosa_protocol::{MigrationFlags, State};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, date_time_ymd,
};
use tempfile::TempDir;

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

/// Cuts the link when COMMIT is about to be sent.
struct Cutting(Arc<SocketLink>);

impl Vmm for Cutting {
    fn committing(&self, _: &CommitNote) -> Result<(), String> {
        self.0.cut();
        Ok(())
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
    ends.vmm = Arc::new(Cutting(Arc::clone(&near)));
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
    says(&near, &["made out to", "elsewhere", "expected is destination"]);
    says(&far, &["refuses this side", "elsewhere", "another name"]);
    let (near, far) = refuse(&source, &authority.load("destination", Some("that.source")));
    says(&far, &["made out to", "expected is that.source"]);
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

#[test]
fn a_plain_peer_and_one_with_tls_refuse_each_other_in_sentences() {
    let authority = Authority::new();
    let (source, destination) = (authority.tls("source"), authority.tls("destination"));
    let plain = |link| Ok(Box::new(link) as Box<dyn Link>);
    let (near, far) = SocketLink::pair().unwrap();
    let world = ends();
    let accept = || boxed(TlsLink::accept(far, &destination, wait()));
    let (outcome, received) = attempt(&world, || plain(near), accept);
    let (near, far) = refused(&world, outcome, received);
    says(&far, &["does not speak TLS", "both sides"]);
    says(&near, &["it speaks TLS", "both sides"]);

    let (near, far) = SocketLink::pair().unwrap();
    let world = ends();
    let connect = || boxed(TlsLink::connect(near, &source, &address(), wait()));
    let (outcome, received) = attempt(&world, connect, || plain(far));
    let (near, far) = refused(&world, outcome, received);
    says(&near, &["does not speak TLS", "both sides"]);
    says(&far, &["it speaks TLS", "both sides"]);
}

#[test]
fn garbage_in_place_of_a_handshake_is_refused() {
    let authority = Authority::new();
    let (source, destination) = (authority.tls("source"), authority.tls("destination"));
    let long = [[0x16, 3, 3, 0x40, 0].as_slice(), &[1; 70_000]].concat();
    let noises: [&[u8]; 8] = [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        &[0; 4096],
        &[0xff; 4096],
        &[0x16, 3, 1, 0, 4, 1, 0, 0, 0],
        &[0x16, 3, 3, 0xff, 0xff, 9],
        &[0x15, 3, 3, 0, 2, 2, 40],
        &long,
    ];
    for noise in noises {
        for is_source in [true, false] {
            let (link, other) = SocketLink::pair().unwrap();
            let error = std::thread::scope(|scope| {
                let shaken = scope.spawn(|| match is_source {
                    true => TlsLink::connect(link, &source, &address(), wait()).unwrap_err(),
                    false => TlsLink::accept(link, &destination, wait()).unwrap_err(),
                });
                let mut left = noise;
                // It may have refused before it has all.
                while let (false, Ok(sent)) = (left.is_empty(), other.write(&[IoSlice::new(left)], wait())) {
                    left = &left[sent..];
                }
                other.finish();
                drop(other);
                shaken.join().unwrap()
            });
            assert!(matches!(error, LinkError::Tls(_)), "{error} of {:?}", &noise[..noise.len().min(20)]);
        }
    }
}

#[test]
fn a_peer_that_stalls_in_the_handshake_is_given_up_at_the_deadline_and_at_a_cancel() {
    let authority = Authority::new();
    let (source, destination) = (authority.tls("source"), authority.tls("destination"));
    // Stops at once, and in the middle of a record.
    for said in [&b""[..], &[0x16, 3, 1, 1, 0, 1]] {
        for is_source in [true, false] {
            for cancelled in [true, false] {
                let (link, other) = SocketLink::pair().unwrap();
                if !said.is_empty() {
                    other.write(&[IoSlice::new(said)], wait()).unwrap();
                }
                let cancel = Cancel::new().unwrap();
                let limit = if cancelled { LIMIT } else { Duration::from_millis(20) };
                let wait = Wait::within(limit, Some(&cancel));
                let error = std::thread::scope(|scope| {
                    let shaken = scope.spawn(|| match is_source {
                        true => TlsLink::connect(link, &source, &address(), wait).unwrap_err(),
                        false => TlsLink::accept(link, &destination, wait).unwrap_err(),
                    });
                    if cancelled {
                        cancel.cancel();
                    }
                    shaken.join().unwrap()
                });
                match cancelled {
                    true => assert!(matches!(error, LinkError::Cancelled), "{error}"),
                    false => assert!(matches!(error, LinkError::TimedOut), "{error}"),
                }
            }
        }
    }
}

/// Bytes that each side sends in a whole move, about: signatures differ in length.
fn lengths(source: &Tls, destination: &Tls) -> (u64, u64) {
    let ends = ends();
    let (near, far) = SocketLink::pair().unwrap();
    let near = FaultyLink::new(near, Way::Out, u64::MAX, Fault::Cut);
    let (sent, received) = (Arc::clone(&near.sent), Arc::clone(&near.received));
    let (outcome, there) = attempt(
        &ends,
        || boxed(TlsLink::connect(near, source, &address(), wait())),
        || boxed(TlsLink::accept(far, destination, wait())),
    );
    assert!(ends.check(outcome.unwrap(), there.unwrap(), "no fault"));
    (sent.load(Ordering::SeqCst), received.load(Ordering::SeqCst))
}

/// One move with a fault below TLS; whether it was moved.
fn with_fault(source: &Tls, destination: &Tls, way: Way, at: u64, fault: Fault) -> bool {
    let (mut ends, what) = (ends(), format!("{fault:?} at byte {at}, {way:?}"));
    // A record that has become longer shows by its end that does not come.
    let short = Duration::from_millis(if fault == Fault::Cut { 10_000 } else { 150 });
    ends.options = options().with_silence_max(short).with_load_max(short).with_commit_max(short);
    let wait = || Wait::within(short, None);
    let (near, far) = SocketLink::pair().unwrap();
    let none = |link| FaultyLink::new(link, Way::Out, u64::MAX, Fault::Cut);
    let faulty = |link| FaultyLink::new(link, Way::Out, at, fault);
    let (near, far) = match way {
        Way::Out => (faulty(near), none(far)),
        Way::In => (none(near), faulty(far)),
    };
    let (outcome, received) = attempt(
        &ends,
        || boxed(TlsLink::connect(near, source, &address(), wait())),
        || boxed(TlsLink::accept(far, destination, wait())),
    );
    match (outcome, received) {
        (Ok(Outcome::InDoubt(doubt)), Ok(received)) => {
            assert!(!ends.source[0].state().is_running(), "{what}: in doubt");
            let (outcome, _) = resolve(&ends, doubt, source, Some(destination));
            ends.check(outcome, received, &what)
        }
        (Ok(outcome), Ok(received)) => ends.check(outcome, received, &what),
        (outcome, received) => {
            let moved = matches!(outcome, Ok(Outcome::Moved(_) | Outcome::InDoubt(_)));
            assert!(!moved && !matches!(received, Ok(Received::Runs(_))), "{what}: {outcome:?} {received:?}");
            assert_eq!(ends.source[0].state(), State::Running, "{what}");
            assert!(!ends.destination[0].holds_guest(), "{what}");
            false
        }
    }
}

#[test]
fn a_link_cut_or_altered_at_any_byte_below_tls_leaves_one_side_running() {
    let authority = Authority::new();
    let (source, destination) = (authority.tls("source"), authority.tls("destination"));
    let (out, back) = lengths(&source, &destination);
    let mut moved = 0;
    for (way, bytes) in [(Way::Out, out), (Way::In, back)] {
        // The last records are COMMIT and DONE, or RUNNING.
        let places = (0..bytes).filter(|at| at + 180 > bytes && at % 5 == 0 || at % 67 == 0);
        for at in places {
            for fault in [Fault::Cut, Fault::Flip((at % 8) as u8)] {
                moved += u32::from(with_fault(&source, &destination, way, at, fault));
            }
        }
    }
    assert!(moved > 0, "a cut behind COMMIT");
}

#[test]
fn the_end_is_told_from_nothing_and_what_was_sent_before_it_arrives() {
    let authority = Authority::new();
    let (source, destination) = (authority.tls("source"), authority.tls("destination"));
    for truncated in [false, true] {
        let (near, far) = SocketLink::pair().unwrap();
        let (near, far) = std::thread::scope(|scope| {
            let far = scope.spawn(|| TlsLink::accept(far, &destination, wait()).unwrap());
            (TlsLink::connect(near, &source, &address(), wait()).unwrap(), far.join().unwrap())
        });
        let now = || Wait::within(Duration::from_millis(5), None);
        let mut got = [0; 64];
        assert!(matches!(far.read(&mut got, now()), Err(LinkError::TimedOut)));
        assert_eq!(near.write(&[IoSlice::new(b"a"), IoSlice::new(b"bc")], now()).unwrap(), 3);
        match truncated {
            true => drop(near),
            false => {
                near.finish();
                far.write(&[IoSlice::new(b"still heard")], wait()).unwrap();
                assert_eq!(near.read(&mut got, wait()).unwrap(), 11);
                far.finish();
                assert!(matches!(near.read(&mut got, wait()), Err(LinkError::Closed)));
            }
        }
        assert_eq!(far.read(&mut got, wait()).unwrap(), 3);
        assert!(matches!(far.read(&mut got, wait()), Err(LinkError::Closed)));
        assert!(matches!(far.read(&mut got, wait()), Err(LinkError::Closed)), "and again");
    }
}

#[test]
fn a_peer_that_does_not_read_blocks_no_more_than_a_bounded_buffer() {
    let authority = Authority::new();
    let (source, destination) = (authority.tls("source"), authority.tls("destination"));
    let (near, far) = SocketLink::pair().unwrap();
    let (near, far) = std::thread::scope(|scope| {
        let far = scope.spawn(|| TlsLink::accept(far, &destination, wait()).unwrap());
        (TlsLink::connect(near, &source, &address(), wait()).unwrap(), far.join().unwrap())
    });
    let cancel = Cancel::new().unwrap();
    let bytes: Vec<u8> = (0..1 << 20).map(|at: u32| (at % 251) as u8).collect();
    let mut sent = 0;
    let error = loop {
        let soon = Wait::within(Duration::from_millis(20), Some(&cancel));
        match near.write(&[IoSlice::new(&bytes[sent % 251..][..1 << 16])], soon) {
            Ok(taken) => sent += taken,
            Err(error) => break error,
        }
        assert!(sent < 8 << 20, "nothing holds it up");
    };
    assert!(matches!(error, LinkError::TimedOut), "{error}");
    cancel.cancel();
    let cancelled = near.write(&[IoSlice::new(&bytes)], Wait::within(LIMIT, Some(&cancel)));
    assert!(matches!(cancelled, Err(LinkError::Cancelled)));
    // All that was taken arrives once, in order, and then the end.
    std::thread::scope(|scope| {
        scope.spawn(|| near.finish());
        let (mut got, mut into) = (0, vec![0; 1 << 16]);
        while got < sent {
            let read = far.read(&mut into, wait()).unwrap();
            for (at, byte) in into[..read].iter().enumerate() {
                assert_eq!(*byte, ((got + at) % 251) as u8, "byte {}", got + at);
            }
            got += read;
        }
        assert_eq!(got, sent);
        assert!(matches!(far.read(&mut into, wait()), Err(LinkError::Closed)));
    });
}

#[test]
fn files_that_do_not_fit_are_named_with_what_was_expected() {
    let authority = Authority::new();
    authority.issue("one", |_| {});
    authority.issue("two", |_| {});
    let path = |name: &str| authority.path(name);
    let load = |ca: &str, certificate: &str, key: &str, name: Option<&str>| {
        Tls::load(&path(ca), &path(certificate), &path(key), name).unwrap_err().to_string()
    };
    let named = |name: &str| path(name).display().to_string();
    std::fs::write(path("text"), "no PEM at all").unwrap();
    std::fs::write(path("empty"), "").unwrap();
    let pem = std::fs::read_to_string(path("one")).unwrap();
    std::fs::write(path("cut"), &pem[..pem.len() / 2]).unwrap();
    std::fs::write(path("none"), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    let encrypted = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    std::fs::write(path("encrypted"), encrypted).unwrap();
    std::fs::write(path("large"), vec![b'-'; 2 << 20]).unwrap();
    says(&load("absent", "one", "one.key", None), &[&named("absent"), "cannot be opened", "No such file"]);
    says(&load(".", "one", "one.key", None), &["it is not a regular file"]);
    says(&load("large", "one", "one.key", None), &[&named("large"), "1 MiB"]);
    says(&load("ca", "one", "two.key", None), &[&named("two.key"), "does not belong to", &named("one")]);
    says(&load("ca", "one", "one", None), &[&named("one"), "expected a private key", "holds a certificate"]);
    says(
        &load("ca", "one.key", "one.key", None),
        &[&named("one.key"), "expected certificates", "a private key"],
    );
    says(&load("ca", "one", "encrypted", None), &[&named("encrypted"), "passphrase"]);
    for wrong in ["text", "empty"] {
        says(&load(wrong, "one", "one.key", None), &[&named(wrong), "not a PEM file"]);
        says(&load("ca", wrong, "one.key", None), &[&named(wrong), "not a PEM file"]);
        says(&load("ca", "one", wrong, None), &[&named(wrong), "not a PEM file"]);
    }
    says(&load("none", "one", "one.key", None), &[&named("none"), "certificate 1 is not valid"]);
    says(&load("ca", "none", "one.key", None), &[&named("none")]);
    says(&load("cut", "one", "one.key", None), &[&named("cut"), "damaged"]);
    says(&load("ca", "one", "one.key", Some("no name")), &["`no name`", "host name"]);
    for (mode, is_private) in [(0o640, false), (0o604, false), (0o620, false), (0o400, true), (0o600, true)] {
        std::fs::set_permissions(path("one.key"), Permissions::from_mode(mode)).unwrap();
        match Tls::load(&path("ca"), &path("one"), &path("one.key"), None) {
            Ok(_) => assert!(is_private, "{mode:o}"),
            Err(error) => {
                assert!(!is_private, "{mode:o}: {error}");
                says(&error.to_string(), &[&named("one.key"), &format!("{mode:04o}"), "chmod 600"]);
            }
        }
    }
    let unix = authority.load("one", None).expected_name(&Address::Unix("socket".into()));
    assert!(matches!(unix, Err(TlsError::NoName { .. })), "{unix:?}");
    let named = authority.load("one", Some("::1")).expected_name(&Address::Unix("socket".into()));
    assert_eq!(named.unwrap().to_str(), "::1");
}
