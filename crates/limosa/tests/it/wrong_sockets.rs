//! Sockets that are given to a command which is not for them: each is named at once.

use crate::support::users::{can_be_another, start_as_other};
use crate::support::{Folder, Running, limosa, start};
use limosa_protocol::State;
use limosa_vfio_user::client::{Client, Options};

/// One of each: a device with a VMM, its control socket, its take-over path and its metrics, and a receiver.
struct Scene {
    folder: Folder,
    server: Running,
    receiver: Running,
    _other: crate::support::Server,
    metrics: String,
}

impl Scene {
    fn new() -> Scene {
        let folder = Folder::new();
        let [device, control, takeover] = ["device", "control", "takeover"].map(|name| folder.text(name));
        let args = ["serve", "synthetic", "-o", "state=1M", "--socket", &device];
        let more = ["--control", &control, "--takeover", &takeover, "--metrics", "127.0.0.1:0"];
        let server = start(&[&args[..], &more].concat());
        let metrics = server.after("metrics on http://").trim_end_matches("/metrics").to_owned();
        server.line("listening on");
        let other = folder.device("other", &[]);
        let listen = format!("unix:{}", folder.text("receiver"));
        let receiver = start(&["receive", &other.socket, "--listen", &listen]);
        receiver.line("listening on");
        Scene { folder, server, receiver, _other: other, metrics }
    }
}

#[test]
fn a_socket_of_another_kind_is_named_at_once() {
    let scene = Scene::new();
    let [device, control, takeover, receiver] =
        ["device", "control", "takeover", "receiver"].map(|name| scene.folder.text(name));
    // A request may take far longer than the test has time: nothing waits for a limit.
    let patient = ["--timeout", "1000"];
    let fails = |args: &[&str], words: &[&str]| {
        limosa(&[&patient[..], args].concat()).fails(4, words);
    };
    fails(&["probe", &takeover], &[&takeover, "a new server takes over", "`limosa switch-over "]);
    fails(&["state", &receiver], &[&receiver, "a receiver of moves", "`limosa send DEVICE --to unix:"]);
    let vmm = Client::connect(&device, Options::default()).unwrap();
    for (to, words) in [
        (&device, "the vfio-user socket of a device"),
        (&control, "the vfio-user socket of a device"),
        (&takeover, "a new server takes over"),
    ] {
        let to = format!("unix:{to}");
        let sent = ["send", &device, "--to", &to, "--silence", "1000"];
        fails(&sent, &[words, "`limosa receive --listen` is expected"]);
    }
    let to = format!("tcp:{}", scene.metrics);
    fails(&["send", &device, "--to", &to, "--silence", "1000"], &["HTTP is answered, as with --metrics"]);
    for (path, words) in [(&device, "the vfio-user socket of a device"), (&receiver, "a receiver of moves")] {
        let words = [words, "--takeover path of a server is expected", "nothing was started"];
        limosa(&["switch-over", path, "--", "true"]).fails(4, &words);
    }
    // None of it was disturbed.
    assert_eq!(limosa_client::DeviceExt::state(&vmm).unwrap(), State::Running);
    drop(vmm);
    limosa(&["send", &device, "--to", &format!("unix:{receiver}")]).ok();
    scene.receiver.end().ok();
    scene.server.signal(rustix::process::Signal::TERM);
    scene.server.end().ok();
}

#[test]
fn a_metrics_socket_that_is_asked_for_a_device_is_named_at_once() {
    let folder = Folder::new();
    let [device, metrics] = ["device", "metrics"].map(|name| folder.text(name));
    let address = format!("unix:{metrics}");
    let server = start(&["serve", "synthetic", "--socket", &device, "--metrics", &address]);
    server.line("listening on");
    let words = [&metrics, "HTTP is answered, as with --metrics", "a device's socket is expected"];
    limosa(&["--timeout", "1000", "probe", &metrics]).fails(4, &words);
    server.kill();
}

#[test]
fn a_device_whose_socket_lets_a_user_not_in_says_how_its_server_lets_others_in() {
    if !can_be_another("a_device_whose_socket_lets_a_user_not_in_says_how_its_server_lets_others_in") {
        return;
    }
    let folder = Folder::new().open_to_all();
    let device = folder.device("device", &[]);
    let probed = start_as_other(&["probe", &device.socket]).end();
    probed.fails(4, &[&device.socket, "--mode and --group", "--control"]);
    // The advice about servers is only for sockets.
    let file = folder.text("file");
    std::fs::write(&file, "").unwrap();
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let probed = start_as_other(&["probe", &file]).end();
    assert!(!probed.err.contains("--mode"), "{probed:?}");
}
