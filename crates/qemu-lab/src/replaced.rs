//! A machine served in the process of the test, whose server another one replaces there.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use limosa_device::Machine;
use limosa_switch_over::{GiveOptions, OldServer, TakeOptions, TakeOver, take};
use limosa_vfio_user::server::{Options, Replacing, Server, SwitchOver};
use tempfile::TempDir;

/// The server of a machine that can be replaced. Shut down when it is dropped.
pub struct ReplacedHere {
    servers: Arc<Vec<Server>>,
    serves: Option<JoinHandle<()>>,
    folder: TempDir,
}

fn options() -> Options {
    Options { interruptible: true, ..Options::default() }
}

impl ReplacedHere {
    /// Serves a machine.
    pub fn start(machine: Arc<Machine>) -> ReplacedHere {
        let folder = tempfile::tempdir().expect("a folder for the sockets");
        let server = Server::bind(folder.path().join("device.sock"), machine, options()).expect("a server");
        let servers = Arc::new(vec![server]);
        let serves = Some(Self::serve(&servers));
        ReplacedHere { servers, serves, folder }
    }

    fn serve(servers: &Arc<Vec<Server>>) -> JoinHandle<()> {
        let servers = Arc::clone(servers);
        std::thread::spawn(move || servers[0].serve().expect("it serves"))
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("device.sock")
    }

    /// A server of another machine takes its place.
    pub fn replace(&mut self, machine: Arc<Machine>) {
        let path = self.folder.path().join("takeover.sock");
        let door = TakeOver::listen(&path).expect("a socket for the new server");
        let old = Arc::clone(&self.servers);
        let gives = std::thread::spawn(move || {
            door.serve_one(&SwitchOver::new(&old), &GiveOptions::default(), None).expect("it is replaced");
        });
        let new = Replacing::new([(machine, options())]);
        let taken = take(OldServer::Path(&path), new, &TakeOptions::default()).expect("a switch-over");
        self.servers = Arc::new(taken.server);
        let serves = Self::serve(&self.servers);
        gives.join().expect("the old server gives");
        let before = self.serves.replace(serves);
        before.expect("a server").join().expect("the old server ends");
    }
}

impl Drop for ReplacedHere {
    fn drop(&mut self) {
        self.servers[0].shutdown_handle().shut_down();
        if let Some(serves) = self.serves.take() {
            let _ = serves.join();
        }
    }
}
