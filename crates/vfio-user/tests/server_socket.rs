//! The server's socket: where it is made, when it is replaced, and that it goes.

#[macro_use]
mod common;

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use common::Served;
use common::device::TestDevice;
use common::raw::*;
use limosa_client::Error;
use limosa_protocol::Errno;
use limosa_vfio_user::client::{self, Client, User};
use limosa_vfio_user::connection::ConnectionError;
use limosa_vfio_user::server::{Options, Server, ShutdownHandle, SocketAccess, serve_connection};

#[test]
fn the_socket_of_a_dead_server_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    let server = Server::bind(&path, TestDevice::new().machine(), Options::default()).unwrap();
    assert_eq!(server.path(), Some(path.as_path()));
    UnixStream::connect(&path).unwrap();
    drop(server);
    assert!(!path.exists());
}

#[test]
fn the_socket_of_a_live_server_is_left_alone() {
    let served = Served::new();
    let mut raw = served.peer();
    let error = Server::bind(served.path(), TestDevice::new().machine(), Options::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    raw.assert_usable();
    drop(raw);
    served.peer().assert_usable();
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    let error = Server::bind(&path, TestDevice::new().machine(), Options::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
}

#[test]
fn a_socket_that_another_server_put_there_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let first = Server::bind(&path, TestDevice::new().machine(), Options::default()).unwrap();
    std::fs::remove_file(&path).unwrap();
    let second = Server::bind(&path, TestDevice::new().machine(), Options::default()).unwrap();
    drop(first);
    assert!(path.exists());
    drop(second);
    assert!(!path.exists());
}

#[test]
fn a_socket_was_open_to_whom_the_umask_let_in() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    for mode in [0o600, 0o660] {
        let socket = SocketAccess { mode, ..SocketAccess::default() };
        let options = Options { socket, ..Options::default() };
        let _server = Server::bind(&path, TestDevice::new().machine(), options).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, mode);
    }
    assert_eq!(Options::default().socket.mode, 0o600);
}

#[test]
fn a_server_of_another_user_is_not_spoken_to() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let options = client::Options { server_users: Some(vec![User(4242)]), ..client::Options::default() };
    let Err(error) = Client::connect(&path, options) else { panic!("it is spoken to") };
    let said = error.to_string();
    assert!(matches!(error, Error::Os { errno: Errno::EPERM, .. }), "{said}");
    assert!(said.contains(&User::current().to_string()) && said.contains("user 4242"), "{said}");
    let (mut accepted, _) = listener.accept().unwrap();
    let mut heard = Vec::new();
    std::io::Read::read_to_end(&mut accepted, &mut heard).unwrap();
    assert_eq!(heard, b"", "nothing is said to it");
    drop(listener);
    let served = Served::new();
    let options = client::Options { server_users: Some(vec![User::current()]), ..client::Options::default() };
    Client::connect(served.path(), options).unwrap();
}

#[test]
fn a_directory_that_is_not_there_is_an_error() {
    let error =
        Server::bind("/nonexistent/limosa/s", TestDevice::new().machine(), Options::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn shutting_down_ends_an_idle_clients_connection() {
    let served = Served::new();
    let mut raw = served.peer();
    raw.assert_usable();
    drop(served);
    raw.expect_end();
}

#[test]
fn a_request_under_way_is_finished_before_the_server_ends() {
    let served = Served::new();
    let mut raw = served.peer();
    let ids: Vec<u16> = (0..200)
        .map(|_| {
            let id = raw.next_id();
            raw.send(&message(id, REGION_READ, 0, &bytes![0u64, 0u32, 4u32]), &[]);
            id
        })
        .collect();
    // What was sent before is answered: the first reply says that the server is at it.
    assert_eq!(raw.receive().ok().id, ids[0]);
    drop(served);
    for id in &ids[1..] {
        assert_eq!(raw.receive().ok().id, *id);
    }
    assert!(raw.try_receive().is_none());
}

#[test]
fn an_accepted_connection_is_served_without_a_socket_in_the_file_system() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let machine = TestDevice::new().machine();
    let shutdown = ShutdownHandle::new().unwrap();
    let thread = {
        let machine = Arc::clone(&machine);
        std::thread::spawn(move || {
            serve_connection(theirs, &machine, &Options::default(), &shutdown).unwrap()
        })
    };
    let mut raw = Raw::new(ours);
    raw.negotiate();
    raw.assert_usable();
    drop(raw);
    assert_eq!(thread.join().unwrap(), ConnectionError::Closed);
}

#[test]
fn a_listener_made_by_somebody_else_is_served_and_left_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let server = Server::from_listener(listener, TestDevice::new().machine(), Options::default()).unwrap();
    let shutdown = server.shutdown_handle();
    let thread = std::thread::spawn(move || server.serve());
    Raw::negotiated(&path).assert_usable();
    shutdown.shut_down();
    thread.join().unwrap().unwrap();
    assert!(path.exists());
}
