//! A traced server, and a sink that keeps events.
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use limosa_device::Machine;
use limosa_models::synthetic::{Synthetic, SyntheticConfig};
use limosa_trace::event::Event;
use limosa_trace::proxy::{Options, Proxy, StopHandle};
use limosa_trace::recorder::{Recorder, Sink};
use limosa_vfio_user::client::{self, Client};
use limosa_vfio_user::server::{self, Server, ShutdownHandle};

/// Keeps what it gets.
struct Keep(Arc<Mutex<Vec<Event>>>);

impl Sink for Keep {
    fn name(&self) -> String {
        "test".into()
    }

    fn event(&mut self, event: &Event) -> io::Result<()> {
        self.0.lock().unwrap().push(event.clone());
        Ok(())
    }
}

pub struct Collected {
    pub recorder: Recorder,
    pub events: Box<dyn FnOnce() -> Vec<Event>>,
}

/// A recorder whose events are kept.
pub fn collect() -> Collected {
    let kept = Arc::new(Mutex::new(Vec::new()));
    let recorder =
        Recorder::start(vec![Box::new(Keep(Arc::clone(&kept)))], |failure| panic!("{failure}")).unwrap();
    let events = Box::new(move || std::mem::take(&mut *kept.lock().unwrap()));
    Collected { recorder, events }
}

/// A synthetic device of 1 MiB.
pub fn machine() -> Arc<Machine> {
    let config = SyntheticConfig { state_bytes: 1 << 20, block_bytes: 1 << 16, ..SyntheticConfig::default() };
    Machine::simple(Synthetic::new(config).unwrap())
}

/// A server with a proxy in front of it.
pub struct Traced {
    collected: Collected,
    folder: tempfile::TempDir,
    shutdown: ShutdownHandle,
    stop: StopHandle,
    threads: [JoinHandle<io::Result<()>>; 2],
}

impl Traced {
    pub fn start() -> Traced {
        let folder = tempfile::tempdir().unwrap();
        let (front, back) = (folder.path().join("front"), folder.path().join("device"));
        let server = Server::bind(&back, machine(), server::Options::default()).unwrap();
        let shutdown = server.shutdown_handle();
        let collected = collect();
        let proxy = Proxy::bind(&front, &back, Options::default(), collected.recorder.handle()).unwrap();
        let stop = proxy.stop_handle();
        let threads = [std::thread::spawn(move || server.serve()), std::thread::spawn(move || proxy.serve())];
        Traced { collected, folder, shutdown, stop, threads }
    }

    pub fn front(&self) -> PathBuf {
        self.folder.path().join("front")
    }

    pub fn back(&self) -> PathBuf {
        self.folder.path().join("device")
    }

    pub fn client(&self) -> Client {
        Client::connect(self.front(), client::Options::default()).unwrap()
    }

    /// Ends both, and returns what was traced.
    pub fn end(self) -> Vec<Event> {
        self.stop.stop();
        self.shutdown.shut_down();
        for thread in self.threads {
            thread.join().unwrap().unwrap();
        }
        assert!(self.collected.recorder.finish().is_empty());
        (self.collected.events)()
    }
}
