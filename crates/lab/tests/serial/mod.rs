//! Serial cards of the kernel's mtty and of the model that is like it, behind every transport, and what
//! a driver does with one.
#![allow(dead_code, reason = "every suite uses a part of it")]

pub mod gate;

use std::ops::Deref;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use limosa_client::{Chunk, Device, DeviceExt};
use limosa_device::{Loopback, Machine};
use limosa_lab::{Mdev, limosa};
use limosa_migrate::{Destination, Ledger, MovedDevice, Options, Outcome, Received, Source};
use limosa_models::uart::Mtty;
use limosa_protocol::State;
use limosa_testing::Process;
use limosa_vfio_kernel::{Door, KernelDevice};
use limosa_vfio_user::client::Client;

/// What carries the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// mtty through its cdev.
    Cdev,
    /// mtty through its group.
    Group,
    /// A process of `limosa serve`.
    VfioUser,
    /// The model in this process.
    Loopback,
}

pub const TRANSPORTS: [Transport; 4] =
    [Transport::Cdev, Transport::Group, Transport::VfioUser, Transport::Loopback];

/// A card, and what it lives in.
pub struct Card {
    // Closed before what it lives in goes.
    device: Box<dyn Device>,
    pub ports: u32,
    _home: Home,
}

enum Home {
    Kernel { _mdev: Mdev },
    Server { _server: Server },
    Here,
}

impl Deref for Card {
    type Target = dyn Device;

    fn deref(&self) -> &(dyn Device + 'static) {
        &*self.device
    }
}

impl Card {
    pub fn new(transport: Transport, ports: u32) -> Card {
        let (device, home): (Box<dyn Device>, _) = match transport {
            Transport::Cdev | Transport::Group => {
                let mdev = mtty(ports);
                let door = if transport == Transport::Cdev { Door::Cdev } else { Door::Group };
                (Box::new(kernel(&mdev, door)), Home::Kernel { _mdev: mdev })
            }
            Transport::VfioUser => {
                let server = Server::new(ports);
                (Box::new(server.client()), Home::Server { _server: server })
            }
            Transport::Loopback => {
                let machine = Machine::simple(Mtty::new(ports as usize).unwrap());
                (Box::new(Loopback::new("loopback", machine)), Home::Here)
            }
        };
        Card { device, ports, _home: home }
    }
}

/// A device of the kernel's that is like a card with so many ports.
pub fn mtty(ports: u32) -> Mdev {
    Mdev::create("mtty", &format!("mtty-{ports}"))
}

pub fn kernel(mdev: &Mdev, door: Door) -> KernelDevice {
    let options = limosa_vfio_kernel::Options { door: Some(door), ..Default::default() };
    KernelDevice::open(mdev.uuid(), &options).unwrap()
}

/// A path for a file or socket, new each time.
pub fn fresh(name: &str) -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("{name}-{}-{number}", std::process::id());
    std::env::temp_dir().join(name).to_str().unwrap().to_owned()
}

/// `limosa serve uart -o as=mtty`; ends with this object.
pub struct Server {
    _process: Process,
    pub socket: PathBuf,
}

impl Server {
    pub fn new(ports: u32) -> Server {
        let socket = PathBuf::from(fresh("socket"));
        let mut command = limosa();
        command.args(["serve", "uart", "--with-parent", "-o", "as=mtty", "--socket"]).arg(&socket);
        (0..ports).for_each(|_| _ = command.args(["-o", "line=echo"]));
        let process = Process::start(&mut command);
        process.line("listening on ");
        Server { _process: process, socket }
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.socket, Default::default()).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

pub const DATA: u64 = 0;
pub const LINE_STATUS: u64 = 5;
pub const SCRATCH: u64 = 7;
const READY: u8 = 1;

pub fn get(card: &dyn Device, port: u32, register: u64) -> u8 {
    let mut value = [0];
    card.region_read(port, register, &mut value).unwrap();
    value[0]
}

pub fn set(card: &dyn Device, port: u32, register: u64, value: u8) {
    card.region_write(port, register, &[value]).unwrap();
}

/// Sets a port up as a driver does, each differently: divisor, 8 bits, FIFO, interrupts, modem lines.
pub fn set_up(card: &dyn Device, port: u32) {
    let n = port as u8;
    for (register, value) in
        [(3, 0x83), (0, 0x0c + n), (1, 1), (3, 3), (2, 0xc7), (1, 5), (4, 0x0b), (7, 0x5a + n)]
    {
        set(card, port, register, value);
    }
}

pub fn send(card: &dyn Device, port: u32, text: &[u8]) {
    text.iter().for_each(|byte| set(card, port, DATA, *byte));
}

pub fn receive(card: &dyn Device, port: u32, bytes_max: usize) -> Vec<u8> {
    let mut text = Vec::new();
    while text.len() < bytes_max && get(card, port, LINE_STATUS) & READY != 0 {
        text.push(get(card, port, DATA));
    }
    text
}

/// All registers whose reading changes nothing.
pub fn registers(card: &dyn Device, port: u32) -> [u8; 7] {
    std::array::from_fn(|at| get(card, port, at as u64 + 1))
}

/// Reads all there is of a stream.
pub fn drain(stream: &mut dyn limosa_client::DataStream) -> Vec<u8> {
    let (mut all, mut data) = (Vec::new(), [0; 4096]);
    while let Chunk::Data(bytes) = stream.read(&mut data).unwrap() {
        all.extend_from_slice(&data[..bytes]);
    }
    all
}

/// The state of a card, which goes back to the state that it was in.
pub fn peek(card: &dyn Device) -> Vec<u8> {
    let was = card.state().unwrap();
    let state = drain(card.set_state(State::StopCopy).unwrap().unwrap().as_mut());
    card.set_state(was).unwrap();
    state
}

pub fn options() -> Options {
    // Nothing here takes a second; whoever waits so long hangs.
    let limit = Duration::from_secs(30);
    Options::default().with_silence_max(limit).with_load_max(limit).with_commit_max(limit)
}

/// Runs `act` with a source of this device.
pub fn with_source<R>(device: &dyn Device, options: &Options, act: impl FnOnce(Source<'_>) -> R) -> R {
    act(Source::new(&[MovedDevice::new(device)], options))
}

/// Runs `act` with a destination of this device.
pub fn with_destination<R>(
    device: &dyn Device,
    ledger: &Ledger,
    options: &Options,
    act: impl FnOnce(Destination<'_>) -> R,
) -> R {
    act(Destination::new(&[MovedDevice::new(device)], ledger, options))
}

/// Moves a device within this process.
pub fn move_here(from: &dyn Device, to: &dyn Device) -> (Outcome, Received) {
    let (ledger, options) = (Ledger::new(), options());
    with_source(from, &options, |source| {
        with_destination(to, &ledger, &options, |destination| limosa_migrate::move_local(source, destination))
    })
}

/// The same, which must work.
#[track_caller]
pub fn moves(from: &dyn Device, to: &dyn Device) {
    let (outcome, received) = move_here(from, to);
    assert!(
        matches!((&outcome, &received), (Outcome::Moved(_), Received::Runs(_))),
        "{} -> {}: {outcome:?}, {received:?}",
        from.name(),
        to.name()
    );
    assert_eq!((from.state().unwrap(), to.state().unwrap()), (State::Stop, State::Running));
}
