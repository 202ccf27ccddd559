//! What a server logs of its clients: who they are, in which role, and why they have gone.

use crate::support::{Folder, Running, start, start_with};
use limosa_client::DeviceExt;
use limosa_models::synthetic::{REGISTERS_REGION, registers};
use limosa_vfio_user::client::{Client, Options, Role};
use rustix::process::geteuid;
use serde_json::Value;

fn serve(folder: &Folder, args: &[&str]) -> Running {
    let socket = folder.text("device");
    let running = start(&[args, &["serve", "synthetic", "-o", "state=1M", "--socket", &socket]].concat());
    running.line("listening on");
    running
}

fn connect(folder: &Folder, role: Role) -> Client {
    Client::connect(folder.path("device"), Options { role, ..Options::default() }).unwrap()
}

#[test]
fn a_server_says_who_connects_and_why_they_have_gone() {
    let folder = Folder::new();
    let server = serve(&folder, &["-v"]);
    let (pid, user) = (std::process::id(), geteuid().as_raw());
    let vmm = connect(&folder, Role::Vmm);
    let line = server.line("a client is connected");
    for part in ["INFO", "at=", "role=\"vmm\"", &format!("pid={pid}"), &format!("user={user}")] {
        assert!(line.contains(part), "{part}: {line}");
    }
    drop(connect(&folder, Role::Control));
    server.line("role=\"control\"");
    let waits = std::thread::scope(|scope| {
        let waits = scope.spawn(|| connect(&folder, Role::Vmm));
        server.line("a client waits until the device's VMM has gone");
        drop(vmm);
        waits.join().unwrap()
    });
    let line = server.line("a client is disconnected");
    assert!(line.contains("end=the peer closed the connection"), "{line}");
    drop(waits);
}

#[test]
fn log_lines_are_documents_for_collectors_and_rust_log_chooses_them() {
    let folder = Folder::new();
    let server = serve(&folder, &["-v", "--log-json"]);
    drop(connect(&folder, Role::Vmm));
    let line = server.line("a client is disconnected");
    let document: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(document["level"], "INFO");
    let fields = &document["fields"];
    assert_eq!((&fields["role"], &fields["pid"]), (&"vmm".into(), &std::process::id().into()));
    assert_eq!(fields["end"], "the peer closed the connection");
    assert_eq!(document["device"], folder.text("device"));

    let socket = folder.text("other");
    let variables = [("RUST_LOG".into(), "off,limosa_vfio_user=info".into())];
    let args = ["serve", "synthetic", "-o", "state=1M", "--socket", &socket];
    let server = start_with(&variables, &args);
    server.line("listening on");
    drop(Client::connect(&socket, Options::default()).unwrap());
    server.line("a client is disconnected");
}

#[test]
fn a_client_that_was_only_connected_is_not_worth_a_line() {
    let folder = Folder::new();
    let server = serve(&folder, &["-v"]);
    drop(std::os::unix::net::UnixStream::connect(folder.path("device")).unwrap());
    let vmm = connect(&folder, Role::Vmm);
    let mut value = [0; 8];
    limosa_client::Device::region_read(&vmm, REGISTERS_REGION, registers::SCRATCH, &mut value).unwrap();
    vmm.state().unwrap();
    drop(vmm);
    server.line("a client is disconnected");
    assert_eq!(server.err().matches("a client is").count(), 2, "{}", server.err());
}
