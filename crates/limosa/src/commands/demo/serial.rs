//! The demo's guest, its serial part: a thread that sends numbered bytes through a 16550A in loopback
//! mode and checks each that comes back. It can be parked like a vCPU, and continue with another device.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, anyhow, ensure};
use limosa_client::Device;
use limosa_models::uart::PORTS_REGION;

/// Registers of a 16550A, by offset.
const DATA: u64 = 0;
const FIFO_CONTROL: u64 = 2;
const LINE_CONTROL: u64 = 3;
const MODEM_CONTROL: u64 = 4;
const LINE_STATUS: u64 = 5;

const FIFO_ENABLE_AND_CLEAR: u8 = 0b111;
const EIGHT_BITS: u8 = 0b11;
const LOOPBACK: u8 = 1 << 4;
const DATA_READY: u8 = 1;

/// Bytes that the receive FIFO holds.
const FIFO_BYTES: u64 = 16;

/// State shared between the thread and the others.
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    device: Arc<dyn Device>,
    park: bool,
    parked: bool,
    end: bool,
    sent: u64,
    received: u64,
    failed: Option<anyhow::Error>,
}

/// The thread.
pub struct Serial {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// The bytes that went through.
#[derive(Clone, Copy, Debug)]
pub struct Count {
    /// Bytes sent.
    pub sent: u64,
    /// Bytes that came back, each checked.
    pub received: u64,
}

impl Serial {
    /// Sets the port up and begins.
    pub fn start(device: Arc<dyn Device>) -> anyhow::Result<Serial> {
        let set = |register, value: u8| device.region_write(PORTS_REGION, register, &[value]);
        set(FIFO_CONTROL, FIFO_ENABLE_AND_CLEAR)?;
        set(LINE_CONTROL, EIGHT_BITS)?;
        set(MODEM_CONTROL, LOOPBACK)?;
        let state =
            State { device, park: false, parked: false, end: false, sent: 0, received: 0, failed: None };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let worker = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("guest-serial".into()).spawn(move || worker.run())?;
        Ok(Serial { shared, thread: Some(thread) })
    }

    /// Stops using the device; it is left with bytes in its FIFO.
    pub fn park(&self) -> Count {
        let mut state = self.shared.lock();
        state.park = true;
        state = self.shared.wait(state, |state| state.parked || state.failed.is_some());
        Count { sent: state.sent, received: state.received }
    }

    /// Continues, with another device if one is given.
    pub fn unpark(&self, device: Option<Arc<dyn Device>>) {
        let mut state = self.shared.lock();
        if let Some(device) = device {
            state.device = device;
        }
        state.park = false;
        self.shared.changed.notify_all();
    }

    /// Waits until this many more bytes have come back.
    pub fn wait_for(&self, more: u64) -> anyhow::Result<()> {
        let state = self.shared.lock();
        let target = state.received + more;
        let mut state = self.shared.wait(state, |state| state.received >= target || state.failed.is_some());
        state.failed.take().map_or(Ok(()), Err)
    }

    /// Ends the thread, once all that was sent has come back.
    pub fn finish(mut self) -> anyhow::Result<Count> {
        self.shared.lock().end = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| anyhow!("the serial thread panicked"))?;
        }
        let mut state = self.shared.lock();
        let count = Count { sent: state.sent, received: state.received };
        state.failed.take().map_or(Ok(count), Err)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        until: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        while !until(&state) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    fn run(&self) {
        loop {
            let mut state = self.lock();
            let (device, sent, received) = (Arc::clone(&state.device), state.sent, state.received);
            if state.end && sent == received {
                return;
            }
            let send = if state.end { 0 } else { FIFO_BYTES - (sent - received) };
            // Parked only with bytes in the FIFO, so that a move has some to carry.
            if state.park && sent > received {
                state.parked = true;
                self.changed.notify_all();
                state = self.wait(state, |state| !state.park);
                state.parked = false;
                continue;
            }
            let park = state.park;
            drop(state);
            let done = transmit(&*device, sent, send).and_then(|()| {
                // About to be parked: leave what was sent where it is.
                if park { Ok(0) } else { receive(&*device, received, sent + send) }
            });
            let mut state = self.lock();
            match done {
                Ok(bytes) => {
                    state.sent += send;
                    state.received += bytes;
                }
                Err(error) => state.failed = Some(error),
            }
            self.changed.notify_all();
            if state.failed.is_some() {
                return;
            }
        }
    }
}

fn transmit(device: &dyn Device, from: u64, bytes: u64) -> anyhow::Result<()> {
    (from..from + bytes)
        .try_for_each(|number| device.region_write(PORTS_REGION, DATA, &[numbered(number)]))
        .context("sending a byte")
}

/// Takes what has come back, at least one byte and at most half of what can be there, so that the FIFO
/// is seldom empty.
fn receive(device: &dyn Device, from: u64, sent: u64) -> anyhow::Result<u64> {
    let most = (sent - from).div_ceil(2);
    let mut taken = 0;
    while taken < most {
        let mut byte = [0];
        device.region_read(PORTS_REGION, LINE_STATUS, &mut byte).context("reading the line status")?;
        ensure!(byte[0] & DATA_READY != 0, "byte {} was lost: the FIFO is empty", from + taken);
        device.region_read(PORTS_REGION, DATA, &mut byte).context("receiving a byte")?;
        let (number, want) = (from + taken, numbered(from + taken));
        ensure!(byte[0] == want, "byte {number} came back as {:#04x}, sent was {want:#04x}", byte[0]);
        taken += 1;
    }
    Ok(taken)
}

/// The contents of a byte: its number, scattered, so that none can be mistaken for its neighbour.
fn numbered(number: u64) -> u8 {
    (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}
