//! A device that holds a guest's state or does not, and fails where its script says.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use limosa_client::{DeviceExt, DmaMap, DmaMemory};
use limosa_device::{Bus, Fault, Loopback, Machine, Save};
use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::{Errno, MigrationFlags, State};

use super::odd::{Odd, Quirks};
use super::scripted::{Contents, Script, Scripted, Step};

/// One guest's device, wherever it is: how many devices run it now, and how many ever did at once.
#[derive(Debug, Default)]
pub struct Guest {
    running: AtomicI64,
    most: AtomicI64,
}

impl Guest {
    pub fn running(&self) -> i64 {
        self.running.load(Ordering::SeqCst)
    }
    pub fn most(&self) -> i64 {
        self.most.load(Ordering::SeqCst)
    }
    fn runs(&self, runs: bool) {
        let now =
            self.running.fetch_add(if runs { 1 } else { -1 }, Ordering::SeqCst) + if runs { 1 } else { -1 };
        self.most.fetch_max(now, Ordering::SeqCst);
    }
}

/// What the tests see of a device, from outside.
struct Shared {
    script: Script,
    holds_guest: AtomicBool,
    data: Mutex<Vec<u8>>,
    saves: AtomicU32,
}

pub struct TestDevice {
    pub client: Odd,
    pub guest: Arc<Guest>,
    shared: Arc<Shared>,
}

/// A source that runs a guest and an idle destination, both with these flags.
pub fn world(name: &str, flags: MigrationFlags, bytes: usize) -> (TestDevice, TestDevice) {
    let guest = Arc::new(Guest::default());
    let data = (0..bytes).map(|at| (at * 7 % 251) as u8).collect();
    let source = TestDevice::new(format!("{name}-source"), flags, Arc::clone(&guest), Some(data));
    let destination = TestDevice::new(format!("{name}-destination"), flags, guest, None);
    (source, destination)
}

impl TestDevice {
    pub fn new(name: String, flags: MigrationFlags, guest: Arc<Guest>, data: Option<Vec<u8>>) -> TestDevice {
        let shared = Arc::new(Shared {
            script: Script::default(),
            holds_guest: AtomicBool::new(data.is_some()),
            data: Mutex::new(data.clone().unwrap_or_default()),
            saves: AtomicU32::new(0),
        });
        let contents = GuestState {
            guest: Arc::clone(&guest),
            shared: Arc::clone(&shared),
            saved: 0,
            precopy_bytes: 0,
            stream: Vec::new(),
            bus: None,
        };
        let model = Scripted::new(flags, contents);
        let machine = Machine::simple(model);
        let client = Odd { inner: Loopback::new(name, machine), quirks: Mutex::default() };
        TestDevice { client, guest, shared }
    }

    pub fn name(&self) -> &str {
        limosa_client::Device::name(&self.client)
    }
    pub fn quirks(&self, quirks: Quirks) {
        *self.client.quirks.lock().unwrap() = quirks;
    }
    pub fn fail(&self, step: Step, after: u32, how: Fault) {
        self.shared.script.fail(step, after, how);
    }
    pub fn state(&self) -> State {
        self.client.state().unwrap()
    }
    pub fn holds_guest(&self) -> bool {
        self.shared.holds_guest.load(Ordering::SeqCst)
    }
    pub fn data(&self) -> Vec<u8> {
        self.shared.data.lock().unwrap().clone()
    }
    pub fn is_logging(&self) -> bool {
        self.client.dma_logging_stop().is_ok()
    }
    /// Maps a file as guest memory at address 0; the device then writes to it while it is saved.
    pub fn map(&self, file: &impl AsFd, size: u64) {
        let memory = DmaMemory::File { fd: file.as_fd(), offset: 0 };
        let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
        limosa_client::Device::dma_map(&self.client, &DmaMap { iova: 0, size, flags, memory }).unwrap();
    }
}

/// The state of the device, as bytes.
struct GuestState {
    guest: Arc<Guest>,
    shared: Arc<Shared>,
    saved: usize,
    precopy_bytes: usize,
    stream: Vec<u8>,
    bus: Option<Bus>,
}

const MAGIC: &[u8; 8] = b"testdev1";

impl GuestState {
    /// While the device runs it writes guest memory: a page that depends on how often it was saved.
    fn dma(&self, running: bool) {
        let saves = self.shared.saves.fetch_add(1, Ordering::SeqCst);
        if let Some(bus) = self.bus.as_ref().filter(|_| running) {
            // Refused where nothing is mapped, which is so in most tests.
            let _ = bus.memory.write(u64::from(saves % 7) * 4096 + 11, &saves.to_le_bytes());
        }
    }
}

impl Contents for GuestState {
    fn step(&mut self, step: Step) -> Result<(), Fault> {
        self.shared.script.step(step)
    }
    fn attach(&mut self, bus: Bus) {
        self.bus = Some(bus);
    }
    fn holds_guest(&self) -> bool {
        self.shared.holds_guest.load(Ordering::SeqCst)
    }
    fn runs(&mut self, runs: bool) {
        self.guest.runs(runs);
    }
    fn clear(&mut self) {
        self.shared.holds_guest.store(false, Ordering::SeqCst);
        self.shared.data.lock().unwrap().clear();
    }
    fn save_begin(&mut self) {
        let data = self.shared.data.lock().unwrap();
        self.stream = MAGIC.to_vec();
        self.stream.extend((data.len() as u64).to_le_bytes());
        self.stream.extend_from_slice(&data);
        self.stream.extend(crc32c::crc32c(&data).to_le_bytes());
        self.saved = 0;
        self.precopy_bytes = self.stream.len() / 2;
    }
    fn save(&mut self, bytes_max: usize, stopped: bool) -> Save<'_> {
        self.dma(!stopped);
        let end = if stopped { self.stream.len() } else { self.precopy_bytes };
        // Short reads, so that a stream has several frames.
        let bytes =
            end.saturating_sub(self.saved).min(bytes_max).min(64 << 10).min(self.stream.len() / 3 + 1);
        let from = self.saved;
        self.saved += bytes;
        match (bytes, stopped) {
            (0, true) => Save::End,
            (0, false) => Save::NothingForNow,
            _ => Save::Data(&self.stream[from..from + bytes]),
        }
    }
    fn precopy_info(&mut self, _v2: bool) -> PrecopyInfo {
        let left = self.precopy_bytes.saturating_sub(self.saved) as u64;
        PrecopyInfo { initial_bytes: left, ..Default::default() }
    }
    fn data_size(&self) -> u64 {
        self.shared.data.lock().unwrap().len() as u64 + 20
    }
    fn load(&mut self, staged: Vec<u8>) -> Result<(), Fault> {
        let refused = Fault::Refused(Errno::EINVAL);
        let rest = staged.strip_prefix(MAGIC).ok_or(refused)?;
        let (length, rest) = rest.split_first_chunk::<8>().ok_or(refused)?;
        let (data, crc) = rest.split_at_checked(u64::from_le_bytes(*length) as usize).ok_or(refused)?;
        if crc != crc32c::crc32c(data).to_le_bytes() {
            return Err(refused);
        }
        *self.shared.data.lock().unwrap() = data.to_vec();
        self.shared.holds_guest.store(true, Ordering::SeqCst);
        Ok(())
    }
}
