//! What the server's tests share: a device, a server of it on a thread, and a peer made of bytes.
#![allow(dead_code)]

pub mod device;
pub mod fds;
pub mod lingering;
pub mod raw;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use limosa_device::Machine;
use limosa_vfio_user::server::{Options, Server, ShutdownHandle};

/// A server on a thread, on a socket in a directory of its own.
pub struct Served {
    pub machine: Arc<Machine>,
    path: PathBuf,
    shutdown: ShutdownHandle,
    thread: Option<JoinHandle<std::io::Result<()>>>,
    _directory: tempfile::TempDir,
}

impl Served {
    pub fn new() -> Served {
        Served::with(device::TestDevice::new().machine(), Options::default())
    }

    pub fn device(device: device::TestDevice) -> Served {
        Served::with(device.machine(), Options::default())
    }

    pub fn with(machine: Arc<Machine>, options: Options) -> Served {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("device.sock");
        let server = Server::bind(&path, Arc::clone(&machine), options).unwrap();
        let shutdown = server.shutdown_handle();
        let thread = std::thread::spawn(move || server.serve());
        Served { machine, path, shutdown, thread: Some(thread), _directory: directory }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn peer(&self) -> raw::Raw {
        raw::Raw::negotiated(&self.path)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.shutdown.shut_down();
        if let Some(thread) = self.thread.take() {
            let served = thread.join();
            if !std::thread::panicking() {
                served.expect("the server panicked").expect("the server failed");
                assert!(!self.path.exists(), "the socket was not removed");
            }
        }
    }
}

/// Runs something on a thread whose user is another one.
pub fn as_another<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let another = scope.spawn(|| {
            let other = rustix::fs::Uid::from_raw(65534);
            rustix::thread::set_thread_res_uid(other, other, other).unwrap();
            act()
        });
        another.join().unwrap()
    })
}
