//! `limosa send` and `receive` under TLS and with a bandwidth.

use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use crate::support::pair::Pair;
use crate::support::users::{OTHER, can_be_another, give_away, start_as_other};
use crate::support::{Folder, GUEST, limosa, start};
use limosa_migrate::link::{Link, Listener, Tls, TlsLink, Wait, connect};
use limosa_protocol::State;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use rustix::process::Signal;

/// An authority in the file `ca`, and those that it issues certificates for: `NAME` and `NAME.key`.
fn issue(folder: &Folder, ca: &str, names: &[(&str, i32)]) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new([]).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, ca);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    std::fs::write(folder.path(ca), params.self_signed(&key).unwrap().pem()).unwrap();
    let issuer = Issuer::new(params, key);
    for (name, until) in names {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([(*name).to_owned()]).unwrap();
        (params.not_before, params.not_after) = (date_time_ymd(1990, 1, 1), date_time_ymd(*until, 1, 1));
        std::fs::write(folder.path(name), params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
        let path = folder.path(&format!("{name}.key"));
        std::fs::write(&path, key.serialize_pem()).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    }
}

/// Two devices, and certificates for both sides.
fn pair() -> Pair {
    let folder = Folder::new();
    issue(&folder, "ca", &[("localhost", 4000), ("source", 4000), ("expired", 1991)]);
    issue(&folder, "other-ca", &[("stranger", 4000)]);
    let (source, destination) = (folder.device("a", &[]), folder.device("b", &[]));
    source.mark(GUEST);
    Pair { folder, source, destination }
}

impl Pair {
    /// The options of a side that shows this certificate.
    fn tls(&self, name: &str) -> Vec<String> {
        if name.is_empty() {
            return Vec::new();
        }
        let text = |name: &str| self.folder.text(name);
        let words = ["--tls-ca", &text("ca"), "--tls-cert", &text(name), "--tls-key"];
        words.map(str::to_owned).into_iter().chain([text(&format!("{name}.key"))]).collect()
    }

    /// Sends to where somebody listens on the loopback, with these certificates; how both ended. A receiver that
    /// goes on waiting is ended.
    fn move_with(
        &self,
        source: &str,
        destination: &str,
        more: &[&str],
    ) -> (crate::support::Ended, crate::support::Ended) {
        let listen = ["receive", &self.destination.socket, "--listen", "tcp:127.0.0.1:0", "--moves"];
        let mut args: Vec<String> = listen.map(str::to_owned).into();
        args.push(self.folder.text("moves-there"));
        args.extend(self.tls(destination));
        if !destination.is_empty() {
            args.extend(["--tls-name".to_owned(), "source".to_owned()]);
        }
        let receiver = start(&args);
        let to = receiver.after("listening on ").replace("127.0.0.1", "localhost");
        let mut args: Vec<String> =
            ["send", &self.source.socket, "--to", &to, "--moves"].map(str::to_owned).into();
        args.push(self.folder.text("moves-here"));
        args.extend(self.tls(source));
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        let sent = limosa(&args);
        if sent.code != 0 {
            receiver.line("passed over");
            receiver.signal(Signal::INT);
        }
        (sent, receiver.end())
    }
}

#[test]
fn a_device_moves_under_tls_over_two_links_with_a_bandwidth() {
    let pair = pair();
    let (sent, received) = pair.move_with("source", "localhost", &["--bandwidth", "64M", "--links", "2"]);
    sent.ok();
    received.ok();
    pair.has_moved();
}

#[test]
fn a_move_in_doubt_was_answered_for_by_whoever_had_a_certificate_of_the_authority() {
    let folder = Folder::new();
    issue(&folder, "ca", &[("localhost", 4000), ("source", 4000)]);
    let source = folder.device("a", &[]);
    let destination = folder.device("b", &["fault=stall:STOP>RUNNING_P2P:800"]);
    source.mark(GUEST);
    let pair = Pair { folder, source, destination };
    let (here, there) = (pair.folder.text("here"), pair.folder.text("there"));
    let listening = |args: &[&str], certificate: &str| {
        let args = args.iter().map(|arg| (*arg).to_owned());
        let more = ["--listen", "tcp:127.0.0.1:0", "--moves", &there, "--tls-any-name"].map(str::to_owned);
        let running = start(&args.chain(more).chain(pair.tls(certificate)).collect::<Vec<_>>());
        let to = running.after("listening on ").replace("127.0.0.1", "localhost");
        (running, to)
    };
    let asking = |args: &[&str]| -> Vec<String> {
        let args = args.iter().map(|arg| (*arg).to_owned());
        args.chain(["--moves".to_owned(), here.clone()]).chain(pair.tls("source")).collect()
    };
    let (receiver, to) = listening(&["receive", &pair.destination.socket], "localhost");
    let sender = start(&asking(&["send", &pair.source.socket, "--to", &to]));
    pair.destination.line("stalls as scripted");
    receiver.kill();
    sender.end().fails(5, &["is stopped and in doubt"]);
    let name = pair.source.socket.as_str();
    let (_other, to) = listening(&["answer"], "source");
    let resolved = limosa(&asking(&["resolve", name, "--to", &to, "--tls-name", "source"]));
    resolved.fails(5, &["not the destination to which the COMMIT was sent", "SHA-256", "--decide"]);
    // The right one is heard, and says what it knows.
    let (_same, to) = listening(&["answer"], "localhost");
    let resolved = limosa(&asking(&["resolve", name, "--to", &to]));
    resolved.fails(5, &["its destination does not know either"]);
    assert_eq!(pair.source.state(), State::StopCopy);
}

#[test]
fn a_peer_that_cannot_be_authenticated_is_refused_by_name_and_nothing_is_touched() {
    let pair = pair();
    let (ca, stranger) = (pair.folder.text("ca"), pair.folder.text("stranger"));
    let (sent, received) = pair.move_with("stranger", "localhost", &[]);
    received.fails(7, &["its certificate is refused", &ca, "authority"]);
    sent.fails(4, &["refuses this side", &stranger]);
    pair.is_as_before();
    let (sent, received) = pair.move_with("source", "localhost", &["--tls-name", "else.where"]);
    sent.fails(4, &["its certificate is refused", "localhost", "expected is else.where"]);
    received.fails(7, &["refuses this side", &pair.folder.text("localhost"), "another name"]);
    pair.is_as_before();
}

/// What a side shows that does not look at its own certificate before it is used, as a clock that is wrong would have it.
fn expired(pair: &Pair, expects: Option<&str>) -> Tls {
    let path = |name: &str| pair.folder.path(name);
    Tls::load(&path("ca"), &path("expired"), &path("expired.key"), expects).unwrap()
}

fn wait() -> Wait<'static> {
    Wait::within(crate::support::LIMIT, None)
}

#[test]
fn a_receiver_whose_certificate_has_expired_is_refused_and_the_source_runs_on() {
    let pair = pair();
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let to = listener.address().to_string();
    let (sent, taken) = std::thread::scope(|scope| {
        let tls = expired(&pair, None);
        let taken = scope.spawn(move || TlsLink::accept(listener.accept(wait()).unwrap(), &tls, wait()));
        let args = ["send", &pair.source.socket, "--to", &to, "--tls-name", "expired"].map(str::to_owned);
        (limosa(&[&args[..], &pair.tls("source")].concat()), taken.join().unwrap())
    });
    sent.fails(4, &[&to, "its certificate is refused: it expired", "days ago by this machine's clock"]);
    let told = taken.err().unwrap().to_string();
    let own = pair.folder.text("expired");
    assert!(told.contains("refuses this side") && told.contains(&own) && told.contains("expired or is not"));
    pair.is_as_before();
    // Nothing of the move is left at the source: the next one moves it.
    let (sent, received) = pair.move_with("source", "localhost", &[]);
    sent.ok();
    received.ok();
    pair.has_moved();
}

#[test]
fn a_sender_whose_certificate_has_expired_is_refused_and_the_receiver_waits_on() {
    let pair = pair();
    let listen = ["receive", &pair.destination.socket, "--listen", "tcp:127.0.0.1:0"].map(str::to_owned);
    let any = ["--tls-any-name".to_owned()];
    let receiver = start(&[&listen[..], &pair.tls("localhost"), &any].concat());
    let to = receiver.after("listening on ").replace("127.0.0.1", "localhost");
    // The sender by itself does not even connect.
    let send = |name: &str| {
        let args = ["send", &pair.source.socket, "--to", &to].map(str::to_owned);
        limosa(&[&args[..], &pair.tls(name)].concat())
    };
    send("expired").fails(4, &[&pair.folder.text("expired"), "it expired", "days ago"]);
    let address = to.parse().unwrap();
    let link = connect(&address, crate::support::LIMIT).unwrap();
    let refused = TlsLink::connect(link, &expired(&pair, Some("localhost")), &address, wait())
        .and_then(|link| link.read(&mut [0], wait()))
        .unwrap_err();
    assert!(refused.to_string().contains("refuses this side"), "{refused}");
    let said = receiver.line("its certificate is refused: it expired");
    assert!(said.contains("days ago by this machine's clock; passed over"), "{said}");
    assert!(pair.source.runs(GUEST));
    send("source").ok();
    receiver.end().ok();
    pair.has_moved();
}

#[test]
fn a_plain_side_and_one_with_tls_say_so() {
    let pair = pair();
    let (sent, received) = pair.move_with("", "localhost", &[]);
    sent.fails(4, &["it speaks TLS", "both sides"]);
    received.fails(7, &["does not speak TLS", "both sides"]);
    pair.is_as_before();
    let (sent, received) = pair.move_with("source", "", &[]);
    sent.fails(4, &["does not speak TLS", "both sides"]);
    received.fails(7, &["it speaks TLS", "both sides"]);
    pair.is_as_before();
}

#[test]
fn what_is_missing_or_unusable_is_said_before_anybody_is_connected_to() {
    let pair = pair();
    let socket = &pair.source.socket;
    let send = |more: &[String]| {
        let args = ["send", socket, "--to", "unix:/nowhere"].map(str::to_owned);
        limosa(&[&args, more].concat())
    };
    let tls = pair.tls("source");
    for missing in [0, 2, 4] {
        let without: Vec<String> = [&tls[..missing], &tls[missing + 2..]].concat();
        send(&without).fails(2, &[&tls[missing]]);
    }
    send(&["--tls-name".into(), "x".into()]).fails(2, &["--tls-ca"]);
    send(&tls).fails(2, &["unix:/nowhere has no host name", "--tls-name"]);
    let (mut wrong, mut none) = (tls.clone(), tls.clone());
    wrong[5] = pair.folder.text("localhost.key");
    send(&wrong).fails(2, &["localhost.key", "does not belong to", &tls[3]]);
    none[1] = pair.folder.text("none");
    send(&none).fails(4, &["--tls-ca", "none", "No such file"]);
    send(&pair.tls("expired")).fails(4, &["expired", "it expired", "days ago"]);
    let key = pair.folder.path("source.key");
    std::fs::set_permissions(&key, Permissions::from_mode(0o644)).unwrap();
    send(&tls).fails(2, &["source.key", "0644", "chmod 600"]);
    std::fs::set_permissions(&key, Permissions::from_mode(0o600)).unwrap();
    for listening in [&["receive", &pair.destination.socket][..], &["answer"]] {
        let args = [listening, &["--listen", "unix:/nowhere"]].concat().into_iter().map(str::to_owned);
        let args: Vec<String> = args.chain(tls.iter().cloned()).collect();
        limosa(&args).fails(2, &["every certificate", "--tls-name NAME", "--tls-any-name"]);
    }
    send(&["--bandwidth".into(), "1K".into()]).fails(2, &["--bandwidth 1024", "at least 69906 bytes"]);
    pair.is_as_before();
}

#[test]
fn a_process_that_has_a_key_could_be_dumped() {
    if !can_be_another("a_process_that_has_a_key_could_be_dumped") {
        return;
    }
    let folder = Folder::new().open_to_all();
    issue(&folder, "ca", &[("localhost", 4000)]);
    let moves = folder.others("moves");
    let mut args: Vec<String> =
        ["answer", "--listen", "tcp:127.0.0.1:0", "--moves", &moves].map(str::to_owned).into();
    let owner = |args: &[String]| {
        let running = start_as_other(args);
        running.line("listening on");
        let owner = std::fs::metadata(format!("/proc/{}/io", running.pid())).unwrap().uid();
        // Root goes on to borrow what it holds, as a device that is held.
        limosa(&["probe", &format!("/proc/{}/fd/0", running.pid())])
            .fails(4, &["no VFIO device but /dev/null"]);
        running.kill();
        owner
    };
    assert_eq!(owner(&args), OTHER, "the kernel gives root what belongs to a process that is not dumped");
    for (option, file) in [("--tls-ca", "ca"), ("--tls-cert", "localhost"), ("--tls-key", "localhost.key")] {
        give_away(&folder.path(file));
        args.extend([option.to_owned(), folder.text(file)]);
    }
    args.push("--tls-any-name".into());
    assert_eq!(owner(&args), 0);
}

#[test]
fn plain_tcp_to_or_from_another_host_is_refused_before_anybody_is_connected_to() {
    let folder = Folder::new();
    let device = folder.device("a", &[]);
    let socket = device.socket.as_str();
    let means = "anyone on the path to another host can read and alter guest memory";
    let parts = |address| [address, means, "take the devices over", "--tls-ca", "--insecure"];
    for address in ["tcp:192.0.2.1:7000", "tcp:[2001:db8::1]:7000", "tcp:0.0.0.0:7000"] {
        limosa(&["send", socket, "--to", address]).fails(2, &parts(address));
        let id = "0123456789abcdef0123456789abcdef";
        limosa(&["resolve", socket, "--id", id, "--to", address]).fails(2, &parts(address));
    }
    for address in ["tcp:0.0.0.0:0", "tcp:[::]:0"] {
        limosa(&["receive", socket, "--listen", address]).fails(2, &parts(address));
        limosa(&["answer", "--listen", address]).fails(2, &parts(address));
    }
    device.is_usable(&folder);
    // A user who accepts the consequences may listen, and connect.
    let receiver = start(&["receive", socket, "--listen", "tcp:0.0.0.0:0", "--insecure", "--wait", "0.01"]);
    receiver.line("listening on tcp:0.0.0.0:");
    receiver.end().fails(4, &["nobody connected"]);
    limosa(&["send", socket, "--to", "tcp:0.0.0.0:1", "--insecure"]).fails(4, &["cannot connect to"]);
}
