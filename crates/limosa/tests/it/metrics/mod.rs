//! `--metrics` of `serve` and `receive`: what a scraper gets over a real socket, and what others can do there.

mod openmetrics;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;

use crate::support::{Folder, GUEST, JsonOutput, LIMIT, Running, limosa, start};
use limosa_client::{Device, DeviceExt, DmaMap, DmaMemory};
use limosa_models::synthetic::{REGISTERS_REGION, registers};
use limosa_protocol::State;
use limosa_protocol::info::DmaMapFlags;
use limosa_vfio_user::client::{Client, Options, Role};
use openmetrics::{Exposition, parse};
use rustix::process::Signal;

const REQUEST: &str = "GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n";

/// The host and port of `http://HOST:PORT/metrics`.
fn port_of(address: &str) -> &str {
    address.strip_prefix("http://").unwrap().strip_suffix("/metrics").unwrap()
}

/// All that is answered.
fn ask(mut stream: impl Read + Write, request: &[u8]) -> String {
    // It may have been answered, and ended, before the end.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).unwrap()
}

fn dial(port: &str) -> TcpStream {
    let stream = TcpStream::connect(port).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

#[track_caller]
fn body(answer: &str) -> &str {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer}"));
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(
        head.contains("Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8"),
        "{head}"
    );
    assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
    body
}

#[track_caller]
fn scrape(port: &str) -> Exposition {
    parse(body(&ask(dial(port), REQUEST.as_bytes())))
}

/// Scrapes until this is so: what a client has done is counted a moment later than it has its reply.
#[track_caller]
fn scrape_until(port: &str, is: impl Fn(&Exposition) -> bool) -> Exposition {
    let began = std::time::Instant::now();
    loop {
        let exposition = scrape(port);
        if is(&exposition) {
            return exposition;
        }
        assert!(began.elapsed() < LIMIT, "it never came to that: {exposition:#?}");
    }
}

struct Served {
    running: Running,
    socket: String,
    port: String,
}

fn serve(folder: &Folder, metrics: &str, more: &[&str]) -> Served {
    let socket = folder.text("device");
    let args = ["serve", "synthetic", "-o", "state=1M", "--socket", &socket, "--metrics", metrics];
    let running = start(&[&args, more].concat());
    let port = port_of(&running.after("metrics on ")).to_owned();
    running.line("listening on");
    Served { running, socket, port }
}

fn client(socket: &str) -> Client {
    Client::connect(socket, Options::default()).unwrap()
}

#[test]
fn a_server_tells_what_its_clients_do() {
    let folder = Folder::new();
    let Served { running, socket, port } = serve(&folder, "127.0.0.1:0", &[]);
    let device = ("device", socket.as_str());
    let before = scrape(&port);
    assert_eq!(
        before.get("limosa_build_info", &[("version", env!("CARGO_PKG_VERSION")), ("command", "serve")]),
        1.0
    );
    assert!(before.get("limosa_start_time_seconds", &[]) > 1e9);
    assert_eq!(before.get("limosa_device_state", &[device, ("state", "RUNNING")]), 1.0);
    assert_eq!(before.get("limosa_device_clients", &[device, ("role", "vmm")]), 0.0);

    let vmm = client(&socket);
    let memory = limosa_testing::memfd(4096);
    let map = DmaMap {
        iova: 0,
        size: 4096,
        flags: DmaMapFlags::READ | DmaMapFlags::WRITE,
        memory: DmaMemory::File { fd: std::os::fd::AsFd::as_fd(&memory), offset: 0 },
    };
    vmm.dma_map(&map).unwrap();
    for _ in 0..10 {
        let mut value = [0; 8];
        vmm.region_read(REGISTERS_REGION, registers::SCRATCH, &mut value).unwrap();
    }
    vmm.region_read(REGISTERS_REGION, u64::MAX, &mut [0; 8]).unwrap_err();
    let control = Client::connect(&socket, Options { role: Role::Control, ..Options::default() }).unwrap();
    let during =
        scrape_until(&port, |got| got.get("limosa_device_clients", &[device, ("role", "control")]) == 1.0);
    assert_eq!(during.get("limosa_device_clients", &[device, ("role", "vmm")]), 1.0);
    assert_eq!(during.get("limosa_device_dma_mappings", &[device]), 1.0);
    assert_eq!(during.get("limosa_device_dirty_log", &[device]), 0.0);
    assert!(during.get("limosa_device_requests_total", &[device, ("command", "REGION_READ")]) >= 10.0);
    assert_eq!(during.get("limosa_device_requests_total", &[device, ("command", "DMA_MAP")]), 1.0);
    assert!(during.get("limosa_device_connections_total", &[device]) >= 2.0);
    drop(control);

    vmm.dma_logging_start(4096, &[]).unwrap();
    assert_eq!(scrape(&port).get("limosa_device_dirty_log", &[device]), 1.0);
    vmm.dma_logging_stop().unwrap();
    drop(vmm);

    let (file, resets) = (folder.text("saved"), "limosa_device_resets_total");
    limosa(&["save", &socket, &file]).ok();
    limosa(&["state", &socket, "reset"]).ok();
    limosa(&["load", &file, &socket]).ok();
    let after = scrape_until(&port, |got| got.get("limosa_device_dma_mappings", &[device]) == 0.0);
    for direction in ["save", "load"] {
        let bytes = after.get("limosa_device_session_bytes_total", &[device, ("direction", direction)]);
        assert!(bytes >= f64::from(1 << 20), "{direction}: {bytes}");
    }
    let arc = [device, ("from", "RESUMING"), ("to", "STOP")];
    let walked =
        |outcome| after.get("limosa_device_arcs_total", &[&arc[..], &[("outcome", outcome)]].concat());
    assert_eq!((walked("walked"), walked("failed")), (1.0, 0.0));
    assert!(after.get("limosa_device_arcs_duration_seconds_total", &arc) > 0.0);
    assert!(after.get(resets, &[device]) > before.get(resets, &[device]));
    assert_eq!(after.get("limosa_switch_overs_total", &[("outcome", "failed")]), 0.0);
    running.signal(Signal::TERM);
    running.end().ok();
}

#[test]
fn an_arc_that_fails_is_counted_and_the_state_told() {
    let folder = Folder::new();
    let fault = ["-o", "fault=fail:RUNNING_P2P>STOP:1"];
    let Served { running: _running, socket, port } = serve(&folder, "127.0.0.1:0", &fault);
    let vmm = client(&socket);
    let device = ("device", socket.as_str());
    assert!(vmm.set_state(State::Stop).is_err());
    vmm.set_state(State::Stop).unwrap();
    let got = scrape(&port);
    for outcome in ["walked", "failed"] {
        let labels = [device, ("from", "RUNNING_P2P"), ("to", "STOP"), ("outcome", outcome)];
        assert_eq!(got.get("limosa_device_arcs_total", &labels), 1.0, "{outcome}");
    }
    let state = |state| got.get("limosa_device_state", &[device, ("state", state)]);
    assert_eq!((state("STOP"), state("RUNNING")), (1.0, 0.0));
}

#[test]
fn garbage_and_silence_and_endless_requests_keep_nobody_from_the_metrics() {
    let folder = Folder::new();
    let Served { running, socket, port } = serve(&folder, "127.0.0.1:0", &[]);
    // More than have a place, and none of them says a word.
    let silent: Vec<_> = (0..40).map(|_| dial(&port)).collect();
    scrape(&port);
    for garbage in
        [&b"\x16\x03\x01\x00\xff\r\n\r\n"[..], b"\0\0\0\0\n\n", b"GET\r\n\r\n", b"\xff\xfe GET\r\n\r\n"]
    {
        let answer = ask(dial(&port), garbage);
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    }
    let answer = ask(dial(&port), b"DELETE /metrics HTTP/1.1\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains("Allow: GET, HEAD"), "{answer}");
    assert!(ask(dial(&port), b"GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404 "));
    // A request without an end is answered long before it could need room.
    let endless = [b"GET /metrics HTTP/1.1\r\nX: ", &[b'x'; 60_000][..]].concat();
    assert!(ask(dial(&port), &endless).starts_with("HTTP/1.1 431 "));
    let mut flood = dial(&port);
    let stopped = (0..100_000).find(|_| flood.write_all(&[b'x'; 4096]).is_err());
    assert!(stopped.is_some(), "400 MB were taken");
    // Clients that ask, and take nothing.
    let deaf: Vec<_> = (0..40)
        .map(|_| {
            let mut stream = dial(&port);
            stream.write_all(REQUEST.as_bytes()).unwrap();
            stream
        })
        .collect();
    scrape(&port);
    // The device was served meanwhile.
    assert_eq!(client(&socket).state().unwrap(), State::Running);
    drop((silent, deaf));
    running.signal(Signal::TERM);
    running.end().ok();
}

#[test]
fn a_port_in_use_ends_the_command_before_it_listens() {
    let folder = Folder::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (socket, link) = (folder.text("device"), format!("unix:{}", folder.text("link")));
    let ended = limosa(&["serve", "synthetic", "--socket", &socket, "--metrics", &address]);
    ended.fails(4, &["--metrics", &address, "something else listens there"]);
    assert!(!folder.path("device").exists());
    let device = folder.device("here", &[]);
    let args = ["receive", &device.socket, "--listen", &link, "--metrics", &address];
    limosa(&args).fails(4, &["--metrics", &address]);
    limosa(&["serve", "synthetic", "--socket", &socket, "--metrics", "9100"])
        .fails(2, &["--metrics", "127.0.0.1:9100"]);
}

#[test]
fn a_unix_socket_answers_too_and_is_removed() {
    let folder = Folder::new();
    let (socket, path) = (folder.text("device"), folder.text("metrics"));
    let metrics = format!("unix:{path}");
    let args = ["--json", "serve", "synthetic", "--socket", &socket, "--metrics", &metrics];
    let running = start(&args);
    running.line("listening on");
    let got = parse(body(&ask(UnixStream::connect(&path).unwrap(), REQUEST.as_bytes())));
    assert_eq!(got.get("limosa_device_clients", &[("device", &socket), ("role", "vmm")]), 0.0);
    running.signal(Signal::TERM);
    let document = running.end().json();
    assert_eq!(document["metrics"], metrics.as_str());
    assert!(!folder.path("metrics").exists());
}

#[test]
fn after_a_switch_over_the_new_server_answers_on_the_same_port() {
    let folder = Folder::new();
    let takeover = folder.text("takeover");
    let old = serve(&folder, "127.0.0.1:0", &["--takeover", &takeover]);
    let device = ("device", old.socket.as_str());
    let vmm = client(&old.socket);
    // One that does not fit.
    let take = ["--takeover", &takeover, "--take-from", &takeover];
    let args = ["serve", "synthetic", "-o", "state=2M", "--socket", &old.socket];
    limosa(&[&args[..], &take].concat()).fails(3, &["region 2"]);
    let failed = |got: &Exposition| got.get("limosa_switch_overs_total", &[("outcome", "failed")]);
    scrape_until(&old.port, |got| failed(got) == 1.0);
    let new = serve(&folder, &old.port, &take);
    assert_eq!(new.port, old.port);
    old.running.end().ok();
    let got = scrape(&new.port);
    assert_eq!(got.get("limosa_switch_overs_total", &[("outcome", "took_over")]), 1.0);
    assert!(got.get("limosa_switch_over_standstill_seconds", &[]) > 0.0);
    assert_eq!(got.get("limosa_device_clients", &[device, ("role", "vmm")]), 1.0);
    assert_eq!(vmm.state().unwrap(), State::Running);
}

#[test]
fn a_receiver_tells_of_the_moves_so_far_and_of_the_one_under_way() {
    let folder = Folder::new();
    let [one, two] = ["one", "two"].map(|name| folder.device(name, &[]));
    let unfit = folder.device("unfit", &["state=2M"]);
    // It loads for a while, in which a scrape sees it.
    let here = folder.device("here", &["fault=stall:RESUMING>STOP:800"]);
    one.mark(GUEST);
    let link = format!("unix:{}", folder.text("link"));
    let args = ["receive", &here.socket, "--listen", &link, "--forever", "--metrics", "127.0.0.1:0"];
    let receiver = start(&args);
    let port = port_of(&receiver.after("metrics on ")).to_owned();
    receiver.line("listening on");
    let nothing = scrape(&port);
    let of = |got: &Exposition, outcome| got.get("limosa_receiver_moves_total", &[("outcome", outcome)]);
    assert_eq!((of(&nothing, "runs"), nothing.get("limosa_receiver_move_active", &[])), (0.0, 0.0));
    limosa(&["send", &unfit.socket, "--to", &link]).fails(3, &["region sizes"]);
    let sender = start(&["send", &one.socket, "--to", &link]);
    here.line("stalls as scripted");
    let during = scrape(&port);
    assert_eq!(during.get("limosa_receiver_move_active", &[]), 1.0);
    assert!(during.get("limosa_receiver_move_start_time_seconds", &[]) > 1e9);
    assert!(during.get("limosa_receiver_move_received_bytes", &[("kind", "device")]) >= f64::from(1 << 20));
    sender.end().ok();
    limosa(&["send", &two.socket, "--to", &link]).fails(4, &["not free here"]);
    let after = scrape_until(&port, |got| of(got, "refused") == 1.0);
    assert_eq!((of(&after, "runs"), of(&after, "discarded"), of(&after, "broken")), (1.0, 1.0, 0.0));
    assert_eq!(after.get("limosa_receiver_move_active", &[]), 0.0);
    assert!(after.get("limosa_receiver_received_bytes_total", &[("kind", "device")]) >= f64::from(1 << 20));
    assert_eq!(after.get("limosa_receiver_downtime_seconds_count", &[]), 1.0);
    assert_eq!(after.get("limosa_receiver_downtime_seconds_bucket", &[("le", "+Inf")]), 1.0);
    assert!(after.names().len() > 10);
    receiver.signal(Signal::TERM);
    receiver.end().ok();
}

#[test]
fn metrics_at_the_socket_of_the_server_itself_were_said_to_be_at_that_of_another_one() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let (socket, other) = (folder.text("socket"), folder.text("other"));
    let metrics = format!("unix:{socket}");
    let serve = |more: &[&str]| limosa(&[&["serve", "synthetic", "--metrics", &metrics], more].concat());
    for more in [
        &["--socket", &socket][..],
        &["--socket", &other, "--control", &socket],
        &["--socket", &other, "--takeover", &socket],
    ] {
        serve(more).fails(2, &["--metrics", &socket, "expected a path of its own"]);
    }
    let listen = ["receive", &device.socket, "--listen", &metrics, "--metrics", &metrics];
    limosa(&listen).fails(2, &["--metrics", "that of --listen"]);
    assert!(!folder.path("socket").exists() && !folder.path("other").exists());
}
