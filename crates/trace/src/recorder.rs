//! Passes records from sources to sinks on a thread of its own, so that a source does not wait for sinks.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::decode::Decoder;
use crate::event::Event;
use crate::seen::{Clock, Seen};

/// Limit on the records that wait for the sinks. Beyond it, sources wait.
const WAITING_MAX: usize = 1024;

/// Where a trace goes.
pub trait Sink: Send {
    /// What it is, for messages: `trace.pcapng`, `standard output`.
    fn name(&self) -> String;

    /// Receives a record before it is decoded.
    fn seen(&mut self, _: &Seen) -> io::Result<()> {
        Ok(())
    }

    /// Receives a request with its answer.
    fn event(&mut self, _: &Event) -> io::Result<()> {
        Ok(())
    }

    /// No further record waits at the moment: write what is buffered.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// The trace is over.
    fn end(&mut self) -> io::Result<()> {
        self.flush()
    }
}

/// A sink that failed. The trace continues without it.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {error}")]
pub struct Failure {
    /// The sink.
    pub name: String,
    /// Why.
    #[source]
    pub error: io::Error,
}

/// The thread of the sinks.
pub struct Recorder {
    handle: RecorderHandle,
    thread: JoinHandle<Vec<Failure>>,
}

/// The sources' end of the recorder.
#[derive(Clone)]
pub struct RecorderHandle {
    to: SyncSender<Order>,
    shared: Arc<Shared>,
    clock: Clock,
}

enum Order {
    Seen(Seen),
    End,
}

struct Shared {
    /// No sink is left.
    is_deaf: AtomicBool,
    when_deaf: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Recorder {
    /// Starts the thread. `on_failure` is called there when a sink fails.
    pub fn start(
        sinks: Vec<Box<dyn Sink>>,
        on_failure: impl FnMut(&Failure) + Send + 'static,
    ) -> io::Result<Recorder> {
        let (to, from) = sync_channel(WAITING_MAX);
        let shared = Arc::new(Shared { is_deaf: AtomicBool::new(false), when_deaf: Mutex::new(None) });
        let sinks = Sinks {
            sinks,
            failures: Vec::new(),
            on_failure: Box::new(on_failure),
            shared: Arc::clone(&shared),
        };
        let clock = Clock::start();
        let thread =
            std::thread::Builder::new().name("trace sinks".into()).spawn(move || sinks.run(&from, clock))?;
        Ok(Recorder { handle: RecorderHandle { to, shared, clock }, thread })
    }

    /// The end for sources.
    pub fn handle(&self) -> RecorderHandle {
        self.handle.clone()
    }

    /// Ends the trace: everything that was recorded before is written. Returns the sinks that failed.
    pub fn finish(self) -> Vec<Failure> {
        // A thread that is gone has panicked.
        let _ = self.handle.to.send(Order::End);
        self.thread.join().unwrap_or_else(|_| {
            let error = io::Error::other("the thread of the sinks panicked");
            vec![Failure { name: "trace".into(), error }]
        })
    }
}

impl RecorderHandle {
    /// Records something. Waits while too many records are still to be written.
    pub fn record(&self, seen: Seen) {
        if !self.is_deaf() {
            // After the end of the trace there is no receiver.
            let _ = self.to.send(Order::Seen(seen));
        }
    }

    /// Whether no sink is left, so that records are lost.
    pub fn is_deaf(&self) -> bool {
        self.shared.is_deaf.load(Ordering::Relaxed)
    }

    /// Calls this once no sink is left.
    pub fn when_deaf(&self, then: impl FnOnce() + Send + 'static) {
        let mut waits = self.shared.when_deaf.lock().unwrap_or_else(PoisonError::into_inner);
        match self.is_deaf() {
            true => then(),
            false => *waits = Some(Box::new(then)),
        }
    }

    /// The clock of the trace.
    pub fn now_ns(&self) -> u64 {
        self.clock.now_ns()
    }
}

struct Sinks {
    sinks: Vec<Box<dyn Sink>>,
    failures: Vec<Failure>,
    on_failure: Box<dyn FnMut(&Failure) + Send>,
    shared: Arc<Shared>,
}

impl Sinks {
    fn run(mut self, from: &Receiver<Order>, clock: Clock) -> Vec<Failure> {
        let mut decoder = Decoder::default();
        loop {
            let order = match from.try_recv() {
                Ok(order) => order,
                Err(TryRecvError::Empty) => {
                    self.each(|sink| sink.flush());
                    let Ok(order) = from.recv() else { break };
                    order
                }
                Err(TryRecvError::Disconnected) => break,
            };
            let Order::Seen(seen) = order else { break };
            self.each(|sink| sink.seen(&seen));
            decoder.decode(&seen, &mut |event| self.each(|sink| sink.event(&event)));
        }
        decoder.finish(clock.now_ns(), &mut |event| self.each(|sink| sink.event(&event)));
        self.each(|sink| sink.end());
        self.failures
    }

    /// Passes something to each sink, and drops sinks that fail.
    fn each(&mut self, mut give: impl FnMut(&mut dyn Sink) -> io::Result<()>) {
        let mut at = 0;
        while let Some(sink) = self.sinks.get_mut(at) {
            let Err(error) = give(&mut **sink) else {
                at += 1;
                continue;
            };
            let failure = Failure { name: sink.name(), error };
            self.sinks.remove(at);
            (self.on_failure)(&failure);
            self.failures.push(failure);
            if self.sinks.is_empty() {
                self.shared.is_deaf.store(true, Ordering::Relaxed);
                let then = self.shared.when_deaf.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(then) = then {
                    then();
                }
            }
        }
    }
}
