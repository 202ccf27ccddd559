//! The command on devices that a VMM is using: it comes beside the VMM, which loses nothing.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use crate::support::{Folder, JsonOutput, Running, Server, limosa, start};
use limosa_client::{Device, DeviceExt, DmaMap, DmaMemory};
use limosa_models::synthetic::{REGISTERS_REGION, registers};
use limosa_protocol::State;
use limosa_protocol::info::DmaMapFlags;
use limosa_vfio_user::client::{Client, Role};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::Signal;

const GUEST: u64 = 0x6775_6573;

/// A VMM that holds a device, with the guest's memory mapped.
struct Vmm {
    client: Client,
    _memory: OwnedFd,
}

impl Vmm {
    fn of(server: &Server) -> Vmm {
        let (client, memory) = (server.client(), memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&memory, 1 << 20).unwrap();
        let map = DmaMap {
            iova: 0,
            size: 1 << 20,
            flags: DmaMapFlags::READ | DmaMapFlags::WRITE,
            memory: DmaMemory::File { fd: memory.as_fd(), offset: 0 },
        };
        client.dma_map(&map).unwrap();
        assert_eq!(client.role(), Role::Vmm);
        Vmm { client, _memory: memory }
    }

    fn mark(&self, guest: u64) {
        self.client.region_write(REGISTERS_REGION, registers::SCRATCH, &guest.to_le_bytes()).unwrap();
    }

    fn guest(&self) -> u64 {
        let mut value = [0; 8];
        self.client.region_read(REGISTERS_REGION, registers::SCRATCH, &mut value).unwrap();
        u64::from_le_bytes(value)
    }
}

#[test]
fn a_device_that_a_vmm_uses_is_probed_driven_and_saved() {
    let folder = Folder::new();
    let (device, other) = (folder.device("device", &[]), folder.device("other", &[]));
    let vmm = Vmm::of(&device);
    vmm.mark(GUEST);
    let probed = limosa(&["--json", "probe", &device.socket]).json();
    assert_eq!((&probed["role"], &probed["migration"]["state"]), (&"control".into(), &"RUNNING".into()));
    assert!(limosa(&["probe", &device.socket]).ok().contains("a VMM uses it"));
    assert_eq!(limosa(&["--json", "probe", &other.socket]).json()["role"], "vmm");
    assert_eq!(limosa(&["state", &device.socket]).ok().trim(), "RUNNING");
    let stopped = limosa(&["state", &device.socket, "set", "STOP"]);
    assert!(stopped.err.contains("it runs again when this command ends"), "{stopped:?}");
    stopped.ok();
    // What is the VMM's is left to it.
    limosa(&["state", &device.socket, "reset"]).fails(3, &["EPERM", "only the VMM may do that"]);
    let file = folder.text("saved.lmsa");
    limosa(&["save", &device.socket, &file]).ok();
    assert_eq!((vmm.guest(), vmm.client.state().unwrap()), (GUEST, State::Running));
    limosa(&["load", &file, &other.socket]).ok();
    assert!(other.runs(GUEST));
    // A state is loaded beside a VMM as well.
    vmm.mark(1);
    limosa(&["load", &file, &device.socket]).ok();
    assert_eq!((vmm.guest(), vmm.client.state().unwrap()), (GUEST, State::Running));
}

#[test]
fn a_device_that_a_vmm_uses_is_moved_and_never_runs_there_again() {
    let folder = Folder::new();
    let (source, destination) = (folder.device("source", &[]), folder.device("destination", &[]));
    let (here, there) = (Vmm::of(&source), Vmm::of(&destination));
    here.mark(GUEST);
    let listen = format!("unix:{}", folder.text("link"));
    let receiver = start(&["receive", &destination.socket, "--listen", &listen]);
    receiver.line("listening on");
    limosa(&["send", &source.socket, "--to", &listen]).ok();
    receiver.end().ok();
    assert_eq!((there.guest(), there.client.state().unwrap()), (GUEST, State::Running));
    let stays = |vmm: &Vmm| {
        assert_eq!(vmm.client.state().unwrap(), State::Stop);
        assert!(vmm.client.set_state(State::Running).is_err() && vmm.client.reset().is_err());
        let set = limosa(&["state", &source.socket, "set", "RUNNING"]);
        set.fails(3, &["given away with move", "--decide undone"]);
    };
    stays(&here);
    drop(here);
    stays(&Vmm::of(&source));
}

#[test]
fn migrate_takes_a_device_from_one_vmm_to_another() {
    let folder = Folder::new();
    let (source, destination) = (folder.device("source", &[]), folder.device("destination", &[]));
    let (here, there) = (Vmm::of(&source), Vmm::of(&destination));
    here.mark(GUEST);
    let moves = folder.text("moves");
    limosa(&["migrate", &source.socket, &destination.socket, "--moves", &moves]).ok();
    assert_eq!((there.guest(), there.client.state().unwrap()), (GUEST, State::Running));
    assert_eq!(here.client.state().unwrap(), State::Stop);
    assert!(here.client.set_state(State::Running).is_err());
}

#[test]
fn every_command_sent_the_user_of_a_device_that_was_given_away_to_another_command_that_refused_it() {
    let folder = Folder::new();
    let (device, other) = (folder.device("device", &[]), folder.device("other", &[]));
    let vmm = Vmm::of(&device);
    vmm.mark(GUEST);
    let (file, moves) = (folder.text("file"), folder.text("moves"));
    limosa(&["save", "--stop", &device.socket, &file, "--moves", &moves]).ok();
    drop(vmm);
    let listed = limosa(&["--json", "state", &device.socket]).json();
    assert_eq!(listed["state"], "STOP");
    let note = std::fs::read_dir(&moves).unwrap().map(|note| note.unwrap().path());
    let id = note.into_iter().find_map(|path| path.file_stem()?.to_str().map(str::to_owned)).unwrap();
    let way_back = format!("limosa resolve {} --id {id} --decide undone", device.socket);
    let socket = &device.socket;
    for args in [
        &["state", socket, "set", "RUNNING"][..],
        &["state", socket, "set", "RUNNING", "--force"],
        &["state", socket, "set", "RESUMING"],
        &["state", socket, "reset"],
        &["migrate", socket, &other.socket],
        &["migrate", socket, &other.socket, "--stopped"],
        &["migrate", &other.socket, socket],
        &["resolve", socket],
    ] {
        limosa(&[args, &["--moves", &moves]].concat()).fails(3, &[&way_back, &file]);
    }
    limosa(&["load", &file, socket]).fails(3, &[&way_back]);
    let found = limosa(&["doctor", socket, "--moves", &moves]);
    assert!(found.code == 10 && found.out.contains(&way_back), "{found:?}");
    assert!(other.runs(0));
    // It is the command that does.
    limosa(&way_back.split(' ').skip(1).collect::<Vec<_>>()).ok();
    assert!(device.runs(GUEST));
}

/// A move whose sender is killed at its commit.
fn in_doubt(folder: &Folder, fault: &[&str]) -> (Server, Server, Vmm, Running) {
    let source = folder.device("source", &[]);
    let destination = folder.device("destination", &[&["fault=stall:STOP>RUNNING_P2P:800"], fault].concat());
    let vmm = Vmm::of(&source);
    vmm.mark(GUEST);
    let listen = format!("unix:{}", folder.text("link"));
    let receiver = start(&["receive", &destination.socket, "--listen", &listen, "-vv"]);
    receiver.line("listening on");
    let sender = start(&["send", &source.socket, "--to", &listen, "--moves", &folder.text("moves")]);
    destination.line("stalls as scripted");
    sender.signal(Signal::KILL);
    sender.end();
    assert_eq!(vmm.client.state().unwrap(), State::StopCopy, "its death alone lets nothing run");
    assert!(vmm.client.set_state(State::Running).is_err());
    (source, destination, vmm, receiver)
}

#[test]
fn a_move_in_doubt_is_decided_for_the_source() {
    let folder = Folder::new();
    let (source, destination, vmm, receiver) = in_doubt(&folder, &["fault=fail:RUNNING_P2P>RUNNING"]);
    receiver.end();
    assert!(!destination.runs(GUEST));
    let moves = folder.text("moves");
    limosa(&["resolve", &source.socket, "--moves", &moves, "--decide", "undone"]).ok();
    assert_eq!((vmm.client.state().unwrap(), vmm.guest()), (State::Running, GUEST));
    vmm.client.set_state(State::Stop).unwrap();
}

#[test]
fn a_move_in_doubt_is_decided_for_the_source_after_its_vmm_has_gone() {
    let folder = Folder::new();
    let (source, _destination, vmm, _receiver) = in_doubt(&folder, &["fault=fail:RUNNING_P2P>RUNNING"]);
    drop(vmm);
    let moves = folder.text("moves");
    limosa(&["resolve", &source.socket, "--moves", &moves, "--decide", "undone"]).ok();
    assert!(source.runs(GUEST));
}

#[test]
fn a_move_in_doubt_is_decided_for_the_destination() {
    let folder = Folder::new();
    let (source, destination, vmm, receiver) = in_doubt(&folder, &[]);
    receiver.line("the source may be in doubt");
    receiver.kill();
    assert!(destination.runs(GUEST));
    let moves = folder.text("moves");
    limosa(&["resolve", &source.socket, "--moves", &moves, "--decide", "moved"]).ok();
    assert_eq!(vmm.client.state().unwrap(), State::Stop);
    assert!(vmm.client.set_state(State::Running).is_err() && vmm.client.reset().is_err());
}

#[test]
fn a_move_that_is_refused_at_its_commit_is_undone_beside_a_vmm() {
    let folder = Folder::new();
    let source = folder.device("source", &[]);
    let destination = folder.device("destination", &["fault=fail:RUNNING_P2P>RUNNING"]);
    let vmm = Vmm::of(&source);
    vmm.mark(GUEST);
    let listen = format!("unix:{}", folder.text("link"));
    let receiver = start(&["receive", &destination.socket, "--listen", &listen]);
    receiver.line("listening on");
    let sent = limosa(&["send", &source.socket, "--to", &listen]);
    assert!(sent.code != 0 && sent.err.contains("the source is as it was before"), "{sent:?}");
    assert_eq!((vmm.client.state().unwrap(), vmm.guest()), (State::Running, GUEST));
    vmm.client.reset().unwrap();
}

#[test]
fn a_vm_that_uses_its_device_gets_it_back_and_the_move_is_undone() {
    let folder = Folder::new();
    let source = folder.device("source", &[]);
    // The source stands still for that long.
    let destination = folder.device("destination", &["fault=stall:RESUMING>STOP:7000"]);
    let vmm = Vmm::of(&source);
    vmm.mark(GUEST);
    let listen = format!("unix:{}", folder.text("link"));
    let receiver = start(&["receive", &destination.socket, "--listen", &listen]);
    receiver.line("listening on");
    let sender = start(&["send", &source.socket, "--to", &listen]);
    destination.line("stalls as scripted");
    assert_eq!((vmm.guest(), vmm.client.state().unwrap()), (GUEST, State::Running));
    let sent = sender.end();
    sent.fails(
        3,
        &["the source is as it was before", "SET STAY", "used its device for longer than its accesses wait"],
    );
    assert_eq!((vmm.guest(), vmm.client.state().unwrap()), (GUEST, State::Running));
}

#[test]
fn the_socket_for_control_clients_is_its_users_alone() {
    let folder = Folder::new();
    let (socket, control) = (folder.text("socket"), folder.text("control"));
    let server = start(&["serve", "synthetic", "--socket", &socket, "--control", &control, "--mode", "666"]);
    server.line("listening on");
    assert_eq!(std::fs::metadata(&control).unwrap().mode() & 0o7777, 0o600);
    assert_eq!(limosa(&["--json", "probe", &control]).json()["role"], "control");
    assert_eq!(limosa(&["--json", "probe", &socket]).json()["role"], "vmm");
    server.signal(Signal::TERM);
    server.end().ok();
    assert!(!std::path::Path::new(&control).exists());
    let nowhere = folder.text("nowhere/control");
    let refused = limosa(&["serve", "synthetic", "--socket", &socket, "--control", &nowhere]);
    refused.fails(4, &[&nowhere, "make its folder first"]);
}

#[test]
fn an_operator_names_the_vmm_that_takes_a_device_over() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    limosa(&["state", &device.socket, "next"]).fails(3, &["no VMM uses it"]);
    let vmm = Vmm::of(&device);
    vmm.mark(GUEST);
    assert!(limosa(&["state", &device.socket, "next"]).ok().contains("nobody is named"));
    let this = std::process::id().to_string();
    assert!(limosa(&["state", &device.socket, "next", &this]).ok().contains("has not come"));
    let next = Vmm::of(&device);
    let told = limosa(&["--json", "state", &device.socket, "next"]).json();
    assert_eq!((told["next"].to_string(), &told["is_there"]), (this.clone(), &true.into()));
    limosa(&["state", &device.socket, "next", &this]).fails(3, &["EBUSY", "is connected"]);
    drop(vmm);
    assert_eq!(next.guest(), GUEST);
    limosa(&["state", &device.socket, "next", "2147483647"]).fails(3, &["no such process"]);
    limosa(&["state", &device.socket, "next", &this]).ok();
    assert!(limosa(&["state", &device.socket, "next", "--nobody"]).ok().contains("nobody is named"));
    limosa(&["state", &device.socket, "next", "0"]).fails(2, &["expected the number of a process"]);
}
