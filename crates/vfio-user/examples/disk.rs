//! A PCI device with a thread of its own: it reads a file into guest memory, raises an interrupt for each request, and moves
//! live while it works.
use std::collections::VecDeque;
use std::fs::File;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use limosa_device::pci::{Bar, Command, Function, FunctionState, Identity};
use limosa_device::saved::Section;
use limosa_device::{Bus, Description, Fault, Machine, SimpleModel, Whole, WholeState};
use limosa_protocol::info::{DeviceFlags, DmaMapFlags};
use limosa_protocol::{Errno, pci_index};
use limosa_vfio_user::server::{Options, Server};

/// Registers of 8 bytes in BAR 0: the next request's address in guest memory, its offset in the file, its length.
const ADDRESS: u64 = 0x00;
const OFFSET: u64 = 0x08;
/// Writing its lower half submits the request. Reading a register returns the value written last.
const BYTES: u64 = 0x10;
/// Counts of completed and of failed requests. Writing DONE deasserts INTx.
const DONE: u64 = 0x18;
const FAILED: u64 = 0x20;
const MSIX_TABLE: u64 = 0x800;
const MSIX_PENDING: u64 = 0xc00;

/// Limit on pending requests; further ones fail.
const REQUESTS_MAX: usize = 256;
/// Bytes moved at once. `stop` waits for at most one piece.
const PIECE_BYTES: u64 = 64 << 10;

/// A request, or what is left of it.
#[derive(Clone, Copy, PartialEq, prost::Message)]
struct Request {
    #[prost(uint64, tag = "1")]
    address: u64,
    #[prost(uint64, tag = "2")]
    offset: u64,
    #[prost(uint64, tag = "3")]
    bytes: u64,
}

/// The saved state. Field numbers are never reused.
#[derive(Clone, PartialEq, prost::Message)]
struct Saved {
    #[prost(message, optional, tag = "1")]
    function: Option<FunctionState>,
    #[prost(message, optional, tag = "2")]
    next: Option<Request>,
    #[prost(message, repeated, tag = "3")]
    requests: Vec<Request>,
    #[prost(uint64, tag = "4")]
    done: u64,
    #[prost(uint64, tag = "5")]
    failed: u64,
}

struct State {
    function: Function,
    next: Request,
    /// In order. The first request stays here until it is done, so that its remainder is saved with the others.
    requests: VecDeque<Request>,
    done: u64,
    failed: u64,
    runs: bool,
    /// The thread is moving a piece, without the lock.
    is_busy: bool,
    is_over: bool,
}

struct Shared {
    file: File,
    bus: OnceLock<Bus>,
    state: Mutex<State>,
    changed: Condvar,
}

/// The device. Its thread ends with it.
struct Disk(Arc<Shared>);

impl Disk {
    fn new(file: File) -> Disk {
        let identity = Identity { vendor: 0x1b36, device: 0x10, class: 0x01_8000, ..Identity::default() };
        let function = Function::builder(identity)
            .bar(0, Bar::Memory32 { bytes: 4096, prefetchable: false })
            .interrupt_pin()
            .msix(1, (0, MSIX_TABLE), (0, MSIX_PENDING))
            .build();
        let (next, requests) = (Request::default(), VecDeque::new());
        let (runs, is_busy, is_over) = (true, false, false);
        let state = State { function, next, requests, done: 0, failed: 0, runs, is_busy, is_over };
        let (bus, changed) = (OnceLock::new(), Condvar::new());
        Disk(Arc::new(Shared { file, bus, state: Mutex::new(state), changed }))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn bus(&self) -> &Bus {
        self.bus.get().expect("attached before anything else")
    }

    /// The thread. It moves one piece at a time, so that the device stops soon, and holds no lock meanwhile.
    fn work(&self) {
        let mut state = self.lock();
        while !state.is_over {
            let Some(request) = state.requests.front().copied().filter(|_| state.runs) else {
                state = self.wait(state);
                continue;
            };
            state.is_busy = true;
            drop(state);
            let moved = self.move_piece(&request);
            state = self.lock();
            state.is_busy = false;
            state.moved(moved, self.bus());
            self.changed.notify_all();
        }
    }

    /// The pin is dropped before the device reports that it has stopped, so the pages are in the dirty log by then.
    fn move_piece(&self, request: &Request) -> Result<u64, Errno> {
        let bytes = request.bytes.min(PIECE_BYTES);
        let mut pin = match self.bus().memory.pin(request.address, bytes, DmaMapFlags::WRITE) {
            // Memory that the client serves by messages cannot be pinned.
            Err(Errno::ENOTSUP) => return self.copy_piece(request, bytes),
            pin => pin?,
        };
        let read = pin.read_from(&self.file, request.offset)? as u64;
        pin.written(read);
        pin.check()?;
        if read == 0 { Err(Errno::EIO) } else { Ok(read) }
    }

    fn copy_piece(&self, request: &Request, bytes: u64) -> Result<u64, Errno> {
        let mut piece = vec![0; bytes as usize];
        let read = std::os::unix::fs::FileExt::read_exact_at(&self.file, &mut piece, request.offset);
        read.map_err(|_| Errno::EIO)?;
        self.bus().memory.write(request.address, &piece)?;
        Ok(bytes)
    }
}

impl State {
    /// Accounts for a moved piece of the first request, or for its failure.
    fn moved(&mut self, moved: Result<u64, Errno>, bus: &Bus) {
        // A reset has removed all requests.
        let Some(request) = self.requests.front_mut() else { return };
        if let Ok(bytes) = moved {
            request.address += bytes;
            request.offset += bytes;
            request.bytes -= bytes;
            if request.bytes > 0 {
                return;
            }
        }
        self.requests.pop_front();
        self.done += 1;
        self.failed += u64::from(moved.is_err());
        self.function.raise(0, &bus.interrupts);
    }

    fn register(&self, register: u64) -> u64 {
        match register {
            ADDRESS => self.next.address,
            OFFSET => self.next.offset,
            BYTES => self.next.bytes,
            DONE => self.done,
            FAILED => self.failed,
            _ => 0,
        }
    }

    fn request(&mut self, bus: &Bus) {
        let Request { address, offset, bytes } = self.next;
        let may_write_memory = self.function.command().contains(Command::BUS_MASTER);
        let fits = address.checked_add(bytes).is_some() && offset.checked_add(bytes).is_some();
        if may_write_memory && fits && bytes > 0 && self.requests.len() < REQUESTS_MAX {
            self.requests.push_back(self.next);
        } else {
            (self.done, self.failed) = (self.done + 1, self.failed + 1);
            self.function.raise(0, &bus.interrupts);
        }
    }
}

impl SimpleModel for Disk {
    fn description(&self) -> Description {
        let state = self.0.lock();
        let flags = Some(DeviceFlags::PCI | DeviceFlags::RESET);
        Description { flags, regions: state.function.regions(), irqs: state.function.irqs() }
    }

    fn attach(&mut self, bus: Bus) {
        let shared = Arc::clone(&self.0);
        if shared.bus.set(bus).is_ok() {
            std::thread::spawn(move || shared.work());
        }
    }

    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let state = self.0.lock();
        if region == pci_index::CONFIG {
            return state.function.config_read(offset, data);
        }
        data.fill(0);
        if state.function.bar_read(0, offset, data, &self.0.bus().interrupts) {
            return Ok(());
        }
        let (register, at) = (offset & !7, (offset & 7) as usize);
        let bytes = data.len().min(8 - at);
        data[..bytes].copy_from_slice(&state.register(register).to_le_bytes()[at..][..bytes]);
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let (mut state, bus) = (self.0.lock(), self.0.bus());
        if region == pci_index::CONFIG {
            return state.function.config_write(offset, data, &bus.interrupts).map(drop);
        }
        if state.function.bar_write(0, offset, data, &bus.interrupts) {
            return Ok(());
        }
        // A guest may write a register in two halves.
        let (register, at) = (offset & !7, (offset & 7) as usize);
        let mut value = state.register(register).to_le_bytes();
        value.get_mut(at..at + data.len()).ok_or(Errno::EINVAL)?.copy_from_slice(data);
        let value = u64::from_le_bytes(value);
        match register {
            ADDRESS => state.next.address = value,
            OFFSET => state.next.offset = value,
            BYTES => {
                state.next.bytes = value;
                if at == 0 {
                    state.request(bus);
                    self.0.changed.notify_all();
                }
            }
            DONE => state.function.lower(0, &bus.interrupts),
            _ => {}
        }
        Ok(())
    }

    /// Waits only for the thread's current piece.
    fn reset(&mut self) -> Result<(), Errno> {
        let mut state = self.0.lock();
        state.requests.clear();
        while state.is_busy {
            state = self.0.wait(state);
        }
        (state.next, state.done, state.failed) = (Request::default(), 0, 0);
        state.function.reset(&self.0.bus().interrupts);
        state.runs = true;
        Ok(())
    }

    /// INTx is deasserted when MSI-X is wired, and pending interrupts are signalled.
    fn rewired(&mut self, _index: u32) {
        self.0.lock().function.settle(&self.0.bus().interrupts);
    }
}

impl WholeState for Disk {
    type Saved = Saved;
    const KIND: &'static str = "example.disk";
    const SECTION: Section = Section::message("disk", 1);

    fn stop(&mut self) -> Result<(), Fault> {
        self.stop_until(Instant::now() + Duration::from_secs(1))
    }

    /// Completes the current piece. The rest of its request, and all others, are part of the state.
    fn stop_until(&mut self, until: Instant) -> Result<(), Fault> {
        let mut state = self.0.lock();
        state.runs = false;
        let left = until.saturating_duration_since(Instant::now());
        let waited = self.0.changed.wait_timeout_while(state, left, |state| state.is_busy);
        state = waited.unwrap_or_else(PoisonError::into_inner).0;
        if state.is_busy {
            state.runs = true;
            return Err(Fault::Refused(Errno::ETIMEDOUT));
        }
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        self.0.lock().runs = true;
        self.0.changed.notify_all();
        Ok(())
    }

    fn to_saved(&self) -> Saved {
        let state = self.0.lock();
        Saved {
            function: Some(state.function.state(&self.0.bus().interrupts)),
            next: Some(state.next),
            requests: state.requests.iter().copied().collect(),
            done: state.done,
            failed: state.failed,
        }
    }

    fn restore(&mut self, saved: Saved) -> Result<(), Errno> {
        let mut state = self.0.lock();
        let function = saved.function.ok_or(Errno::EINVAL)?;
        let function = state.function.loaded("disk", &function).map_err(|refusal| refusal.errno())?;
        let is_request = |request: &Request| {
            request.bytes > 0
                && request.address.checked_add(request.bytes).is_some()
                && request.offset.checked_add(request.bytes).is_some()
        };
        if saved.requests.len() > REQUESTS_MAX || !saved.requests.iter().all(is_request) {
            return Err(Errno::EINVAL);
        }
        // From here on nothing can fail.
        state.function = function;
        (state.next, state.requests) = (saved.next.unwrap_or_default(), saved.requests.into());
        (state.done, state.failed) = (saved.done, saved.failed);
        state.function.settle(&self.0.bus().interrupts);
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.0.lock().is_over = true;
        self.0.changed.notify_all();
    }
}

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().expect("the path of a socket to make");
    let file = File::open(arguments.next().expect("the file to read"))?;
    let machine = Machine::simple(Whole::new(Disk::new(file)));
    Server::bind(path, machine, Options::default())?.serve()
}
