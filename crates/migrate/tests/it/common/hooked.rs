//! A device that calls a hook before each call, over a model that checks nothing of what it is given, as an opaque
//! device does. What its streams give and say may be made up instead.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use limosa_client::{Chunk, DataStream, Device, DeviceExt, Error, FeatureReply, FeatureRequest, Result};
use limosa_device::{Fault, Loopback, Machine, Save};
use limosa_migrate::link::SocketLink;
use limosa_migrate::{Destination, Outcome, Received, Source};
use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, MigrationFlags, State};
use limosa_testing::{forward_device, forward_stream};

use super::scripted::{self, Scripted};

/// A call on a device or on its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// SET of a state.
    Set(State),
    /// Any other call of the FEATURE multiplexer.
    Feature(FeatureIndex),
    Read,
    Write,
    PrecopyInfo,
    Reset,
}

impl Call {
    /// GET of the state.
    pub const LOOK: Call = Call::Feature(FeatureIndex::MIG_DEVICE_STATE);
}

/// What happens before a call. An error is the call's answer.
pub type Hook = Arc<dyn Fn(&Loopback, Call) -> Result<()> + Send + Sync>;

/// What a device says of itself, where it is not the truth.
#[derive(Clone, Copy, Debug, Default)]
pub struct Estimates {
    pub initial: Option<u64>,
    pub dirty: Option<u64>,
    pub size: Option<u64>,
}

/// A stream of a saving session that is made up.
pub trait MadeUp: Send + Sync {
    fn read(&self, stopped: bool, into: &mut [u8]) -> Chunk;
    fn info(&self) -> PrecopyInfo;
}

/// What the model and the tests share.
#[derive(Default)]
struct Contents {
    data: Vec<u8>,
    /// What the data was when the last byte of a stop was read.
    given: Option<Vec<u8>>,
}

pub struct Hooked {
    pub inner: Loopback,
    contents: Arc<Mutex<Contents>>,
    lacks: Vec<FeatureIndex>,
    hook: Hook,
    made_up: Option<Arc<dyn MadeUp>>,
}

impl Hooked {
    /// A device with this state, in RUNNING.
    pub fn new(name: &str, flags: MigrationFlags, data: &[u8]) -> Hooked {
        Hooked::with_estimates(name, flags, data, Estimates::default())
    }

    pub fn with_estimates(name: &str, flags: MigrationFlags, data: &[u8], estimates: Estimates) -> Hooked {
        let contents = Arc::new(Mutex::new(Contents { data: data.into(), given: None }));
        let opaque = Opaque { contents: contents.clone(), estimates, stream: Vec::new(), at: 0 };
        let model = Scripted::new(flags, opaque);
        let inner = Loopback::new(name, Machine::simple(model));
        Hooked { inner, contents, lacks: Vec::new(), hook: Arc::new(|_, _| Ok(())), made_up: None }
    }

    #[must_use]
    pub fn hook(self, hook: Hook) -> Hooked {
        Hooked { hook, ..self }
    }

    #[must_use]
    pub fn on(self, act: impl Fn(&Loopback, Call) + Send + Sync + 'static) -> Hooked {
        self.hook(Arc::new(move |device, call| {
            act(device, call);
            Ok(())
        }))
    }

    #[must_use]
    pub fn without(mut self, index: FeatureIndex) -> Hooked {
        self.lacks.push(index);
        self
    }

    #[must_use]
    pub fn making_up(self, stream: Arc<dyn MadeUp>) -> Hooked {
        Hooked { made_up: Some(stream), ..self }
    }

    pub fn state(&self) -> State {
        self.inner.state().unwrap()
    }
    pub fn data(&self) -> Vec<u8> {
        self.contents.lock().unwrap().data.clone()
    }
    /// The state that the device had when it had given its last byte in STOP_COPY.
    pub fn given(&self) -> Option<Vec<u8>> {
        self.contents.lock().unwrap().given.clone()
    }

    fn before(&self, call: Call) -> Result<()> {
        (self.hook)(&self.inner, call)
    }
}

/// Does something before the n-th call, counted from 0, and once only. Whether it did.
pub fn before_call(
    n: usize,
    act: impl Fn(&Loopback, Call) + Send + Sync + 'static,
) -> (Hook, Arc<AtomicBool>) {
    let (calls, done) = (AtomicUsize::new(0), Arc::new(AtomicBool::new(false)));
    let fired = done.clone();
    let hook = move |device: &Loopback, call| {
        if calls.fetch_add(1, Ordering::SeqCst) == n {
            fired.store(true, Ordering::SeqCst);
            act(device, call);
        }
        Ok(())
    };
    (Arc::new(hook), done)
}

/// Does something before the first call of this kind.
pub fn before(when: Call, act: impl Fn(&Loopback) + Send + Sync + 'static) -> Hook {
    let done = AtomicBool::new(false);
    Arc::new(move |device, call| {
        if call == when && !done.swap(true, Ordering::SeqCst) {
            act(device);
        }
        Ok(())
    })
}

/// One move over one link. A move in doubt stays so.
pub fn move_over_a_link(source: Source<'_>, destination: Destination<'_>) -> (Outcome, Received) {
    let (near, far) = SocketLink::pair().unwrap();
    std::thread::scope(|scope| {
        let receiving = scope.spawn(move || destination.receive(&far));
        let outcome = source.send(&near);
        drop(near);
        (outcome, receiving.join().unwrap())
    })
}

/// Runs this in a thread, and fails where it does not end.
pub fn ends_in_time<T: Send + 'static>(what: &str, act: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let _ = done.send(act());
    });
    match result.recv_timeout(Duration::from_secs(60)) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{what}: it hangs"),
        Err(mpsc::RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => {
                eprintln!("{what}: it panics");
                std::panic::resume_unwind(panic)
            }
            Ok(()) => unreachable!(),
        },
    }
}

/// Panics without a word on the screen.
pub fn panic_quietly() -> ! {
    std::panic::resume_unwind(Box::new("a defect of a test's"))
}

impl Device for Hooked {
    fn feature(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        let is_state = request.index == FeatureIndex::MIG_DEVICE_STATE && request.op == FeatureOp::SET;
        let state = request.payload.first_chunk().map(|raw| u32::from_ne_bytes(*raw));
        self.before(match state.and_then(State::from_raw) {
            Some(state) if is_state => Call::Set(state),
            _ => Call::Feature(request.index),
        })?;
        if self.lacks.contains(&request.index) {
            let (device, request) = (self.name().into(), "a feature".into());
            return Err(Error::Refused { device, request, errno: Errno::ENOTTY, hint: "".into() });
        }
        let mut reply = self.inner.feature(request)?;
        reply.stream = reply.stream.map(|inner| {
            let (hook, made_up) = (self.hook.clone(), self.made_up.clone());
            Box::new(HookedStream { inner, device: self.inner.clone(), hook, made_up }) as Box<dyn DataStream>
        });
        Ok(reply)
    }
    fn reset(&self) -> Result<()> {
        self.before(Call::Reset)?;
        self.inner.reset()
    }
    forward_device!(|this| this.inner; name, identity, info, registers);
}

struct HookedStream {
    inner: Box<dyn DataStream>,
    device: Loopback,
    hook: Hook,
    made_up: Option<Arc<dyn MadeUp>>,
}

impl DataStream for HookedStream {
    fn read(&mut self, data: &mut [u8]) -> Result<Chunk> {
        (self.hook)(&self.device, Call::Read)?;
        match &self.made_up {
            Some(stream) => Ok(stream.read(self.device.machine().state() == State::StopCopy, data)),
            None => self.inner.read(data),
        }
    }
    fn write(&mut self, data: &[u8]) -> Result<()> {
        (self.hook)(&self.device, Call::Write)?;
        self.inner.write(data)
    }
    fn precopy_info(&mut self) -> Result<PrecopyInfo> {
        (self.hook)(&self.device, Call::PrecopyInfo)?;
        match &self.made_up {
            Some(stream) => Ok(stream.info()),
            None => self.inner.precopy_info(),
        }
    }
    forward_stream!(|this| this.inner; transfer_bytes_max);
}

/// Contents that give half of themselves before the stop, and take whatever they are given.
struct Opaque {
    contents: Arc<Mutex<Contents>>,
    estimates: Estimates,
    stream: Vec<u8>,
    at: usize,
}

impl scripted::Contents for Opaque {
    fn clear(&mut self) {
        self.contents.lock().unwrap().data.fill(0);
    }
    fn save_begin(&mut self) {
        self.stream = self.contents.lock().unwrap().data.clone();
        self.at = 0;
    }
    fn save(&mut self, bytes_max: usize, stopped: bool) -> Save<'_> {
        let end = if stopped { self.stream.len() } else { self.stream.len() / 2 };
        let bytes = end.saturating_sub(self.at).min(bytes_max).min(self.stream.len() / 5 + 1);
        let from = self.at;
        self.at += bytes;
        if stopped && bytes == 0 {
            let mut contents = self.contents.lock().unwrap();
            contents.given = Some(contents.data.clone());
            return Save::End;
        }
        if bytes == 0 { Save::NothingForNow } else { Save::Data(&self.stream[from..from + bytes]) }
    }
    fn precopy_info(&mut self, _: bool) -> PrecopyInfo {
        let left = (self.stream.len() / 2).saturating_sub(self.at) as u64;
        PrecopyInfo {
            initial_bytes: self.estimates.initial.unwrap_or(left),
            dirty_bytes: self.estimates.dirty.unwrap_or(0),
            ..Default::default()
        }
    }
    fn data_size(&self) -> u64 {
        self.estimates.size.unwrap_or(self.contents.lock().unwrap().data.len() as u64)
    }
    fn load(&mut self, staged: Vec<u8>) -> Result<(), Fault> {
        self.contents.lock().unwrap().data = staged;
        Ok(())
    }
}
