//! The serial card as a driver sees it, and its moves in mid-transfer.

mod common;

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use common::{device, load, refused, save};
use limosa_client::{Device, DeviceExt, Error, IrqAction};
use limosa_device::Loopback;
use limosa_models::uart::{Line, PORTS_REGION, Uart};
use limosa_protocol::{Errno, State, pci_index};
use rustix::event::{EventfdFlags, eventfd};

const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const FIFO_CONTROL: u64 = 2;
const LINE_CONTROL: u64 = 3;
const MODEM_CONTROL: u64 = 4;
const LINE_STATUS: u64 = 5;
const SCRATCH: u64 = 7;
const READY: u8 = 1;
const EMPTY: u8 = 0x20;

fn echo() -> Loopback {
    device("uart", Uart::new(vec![Line::Echo]).unwrap())
}

fn wired(socket: &UnixStream) -> Loopback {
    let fd = || OwnedFd::from(socket.try_clone().unwrap());
    device("uart", Uart::new(vec![Line::Fds { input: fd(), output: fd() }]).unwrap())
}

fn get(device: &dyn Device, register: u64) -> u8 {
    let mut value = [0];
    device.region_read(PORTS_REGION, register, &mut value).unwrap();
    value[0]
}

fn set(device: &dyn Device, register: u64, value: u8) {
    device.region_write(PORTS_REGION, register, &[value]).unwrap();
}

/// As a driver sets a port up: 8 bits, FIFOs, interrupts for bytes received.
fn set_up(device: &dyn Device) {
    set(device, LINE_CONTROL, 3);
    set(device, FIFO_CONTROL, 0xc7);
    set(device, INTERRUPT_ENABLE, 1);
}

/// A driver that waits for interrupts.
struct Driver<'a> {
    device: &'a dyn Device,
    line: OwnedFd,
}

impl Driver<'_> {
    fn new(device: &dyn Device) -> Driver<'_> {
        let line = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        device.set_irqs(pci_index::IRQ_INTX, 0, IrqAction::Wire(&[Some(line.as_fd())])).unwrap();
        Driver { device, line }
    }

    fn wait(&self) {
        rustix::io::read(&self.line, &mut [0; 8]).unwrap();
    }

    fn receive(&self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < count {
            if get(self.device, LINE_STATUS) & READY != 0 {
                bytes.push(get(self.device, DATA));
            } else {
                self.wait();
                self.device.set_irqs(pci_index::IRQ_INTX, 0, IrqAction::Unmask(1)).unwrap();
            }
        }
        bytes
    }
}

/// What a state looks like from outside, without changing it.
fn fingerprint(device: &dyn Device) -> Vec<u8> {
    assert_ne!(device.state().unwrap(), State::Running);
    let mut registers = vec![0; 8];
    device.region_read(PORTS_REGION, 0, &mut registers).unwrap();
    registers
}

#[test]
fn it_is_the_card_that_linux_knows() {
    for (ports, id, bytes) in [(1, 0x0002_1b36_u32, 8), (2, 0x0003_1b36, 16)] {
        let lines = (0..ports).map(|_| Line::Echo).collect();
        let device = device("uart", Uart::new(lines).unwrap());
        let config = |offset| {
            let mut value = [0; 4];
            device.region_read(pci_index::CONFIG, offset, &mut value).unwrap();
            u32::from_le_bytes(value)
        };
        assert_eq!(config(0), id);
        assert_eq!(config(8) >> 8, 0x07_0002, "serial, 16550");
        assert_eq!(config(0x10) & 1, 1, "I/O space");
        assert_eq!(config(0x3c) >> 8 & 0xff, 1, "pin A");
        assert_eq!(device.region(PORTS_REGION).unwrap().info.size, bytes);
        // Each port has its own registers.
        for port in 0..ports as u8 {
            set(&device, SCRATCH + 8 * u64::from(port), 0x50 + port);
        }
        for port in 0..ports as u8 {
            assert_eq!(get(&device, SCRATCH + 8 * u64::from(port)), 0x50 + port);
        }
    }
    assert!(Uart::new(vec![]).is_err());
    assert!(Uart::new(vec![Line::Echo, Line::Echo, Line::Echo]).is_err());
}

#[test]
fn an_echo_gives_back_what_is_sent_and_loses_nothing() {
    let device = echo();
    set_up(&device);
    (0..26).for_each(|byte| set(&device, DATA, byte));
    assert_eq!(get(&device, LINE_STATUS) & EMPTY, 0, "ten wait for room");
    assert_eq!(Driver::new(&device).receive(26), (0..26).collect::<Vec<_>>());
    assert_eq!(get(&device, LINE_STATUS), 0x60);
}

#[test]
fn a_move_in_mid_transfer_keeps_every_byte_in_its_place() {
    let (source, destination) = (echo(), echo());
    set_up(&source);
    set(&source, SCRATCH, 0x77);
    (0..26).for_each(|byte| set(&source, DATA, byte));
    assert_eq!(get(&source, DATA), 0);
    let state = save(&source);
    assert_eq!(source.mig_data_size().unwrap(), Some(state.len() as u64));
    load(&destination, &state, 7).unwrap();
    assert_eq!(fingerprint(&destination), fingerprint(&source));
    let driver = Driver::new(&destination);
    destination.set_state(State::Running).unwrap();
    // The interrupt that was up is up.
    driver.wait();
    assert_eq!(get(&destination, SCRATCH), 0x77);
    (26..30).for_each(|byte| set(&destination, DATA, byte));
    destination.set_irqs(pci_index::IRQ_INTX, 0, IrqAction::Unmask(1)).unwrap();
    assert_eq!(driver.receive(29), (1..30).collect::<Vec<_>>());
}

#[test]
fn a_rollback_keeps_every_byte_too() {
    let source = echo();
    set_up(&source);
    (0..20).for_each(|byte| set(&source, DATA, byte));
    save(&source);
    // Whoever looks at a stopped device changes nothing.
    assert_eq!((get(&source, DATA), get(&source, DATA)), (0, 0));
    assert_eq!(refused(source.region_write(PORTS_REGION, DATA, b"x")), Errno::EBUSY);
    source.set_state(State::Running).unwrap();
    assert_eq!(Driver::new(&source).receive(20), (0..20).collect::<Vec<_>>());
}

#[test]
fn a_line_goes_on_at_the_destination_where_the_source_left_it() {
    let (near, mut far) = UnixStream::pair().unwrap();
    let source = wired(&near);
    let destination = wired(&near);
    // Until it runs for the guest the destination must leave the line alone.
    destination.set_state(State::Stop).unwrap();
    set_up(&source);
    let sent: Vec<u8> = (0..200).collect();
    far.write_all(&sent).unwrap();
    let mut received = Driver::new(&source).receive(70);
    (b"from the source").iter().for_each(|byte| {
        while get(&source, LINE_STATUS) & EMPTY == 0 {
            std::thread::yield_now();
        }
        set(&source, DATA, *byte);
    });
    load(&destination, &save(&source), 1 << 20).unwrap();
    let driver = Driver::new(&destination);
    destination.set_state(State::Running).unwrap();
    received.extend(driver.receive(130));
    assert_eq!(received, sent);
    b" and on".iter().for_each(|byte| {
        while get(&destination, LINE_STATUS) & EMPTY == 0 {
            std::thread::yield_now();
        }
        set(&destination, DATA, *byte);
    });
    let mut heard = [0; 22];
    far.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"from the source and on");
}

#[test]
fn a_line_that_is_gone_does_not_hold_the_guest_up() {
    let (near, far) = UnixStream::pair().unwrap();
    let device = wired(&near);
    drop((near, far));
    set(&device, INTERRUPT_ENABLE, 2);
    let driver = Driver::new(&device);
    driver.wait();
    for byte in 0..40 {
        assert_eq!(get(&device, FIFO_CONTROL) & 0x0f, 2, "the transmitter is empty");
        device.set_irqs(pci_index::IRQ_INTX, 0, IrqAction::Unmask(1)).unwrap();
        set(&device, DATA, byte);
        driver.wait();
    }
}

#[test]
fn loopback_mode_is_cut_off_from_the_line() {
    let device = echo();
    set_up(&device);
    set(&device, MODEM_CONTROL, 0x10);
    set(&device, DATA, b'x');
    assert_eq!((get(&device, DATA), get(&device, LINE_STATUS)), (b'x', 0x60));
    device.reset().unwrap();
    assert_eq!((get(&device, MODEM_CONTROL), get(&device, INTERRUPT_ENABLE)), (0, 0));
}

fn busy() -> Loopback {
    let device = echo();
    set_up(&device);
    set(&device, SCRATCH, 0x5a);
    set(&device, LINE_CONTROL, 0x83);
    set(&device, DATA, 3);
    set(&device, LINE_CONTROL, 3);
    b"received 16 byte; to send".iter().for_each(|byte| set(&device, DATA, *byte));
    device.region_write(pci_index::CONFIG, 0x10, &0xc100_u32.to_le_bytes()).unwrap();
    device
}

#[test]
fn states_cut_or_altered_anywhere_are_refused_and_leave_the_device_untouched() {
    let state = save(&busy());
    let destination = busy();
    let refuse = |state: &[u8]| {
        destination.set_state(State::Stop).unwrap();
        let before = fingerprint(&destination);
        let result = load(&destination, state, 1 << 20);
        assert!(matches!(result, Err(Error::Refused { errno: Errno::EBADMSG | Errno::EINVAL, .. })));
        assert_eq!(destination.state().unwrap(), State::Resuming);
        assert_eq!(fingerprint(&destination), before);
        destination.reset().unwrap();
    };
    (0..state.len()).for_each(|bytes| refuse(&state[..bytes]));
    for at in 0..state.len() {
        let mut altered = state.clone();
        altered[at] ^= 0x04;
        refuse(&altered);
    }
    refuse(&[&state[..], &[0]].concat());
    load(&destination, &state, 1 << 20).unwrap();
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

#[test]
fn states_of_every_version_that_was_ever_written_can_be_loaded() {
    // Names are uart-VERSION-of-the-port-section.state; a new version adds a file, none ever goes.
    let destination = echo();
    load(&destination, &std::fs::read(golden("uart-1.state")).unwrap(), 1 << 20).unwrap();
    let source = busy();
    source.set_state(State::Stop).unwrap();
    assert_eq!(fingerprint(&destination), fingerprint(&source));
    destination.set_state(State::Running).unwrap();
    assert_eq!(Driver::new(&destination).receive(25), b"received 16 byte; to send");
    set(&destination, LINE_CONTROL, 0x83);
    assert_eq!(get(&destination, DATA), 3, "the divisor");
    let mut bar = [0; 4];
    destination.region_read(pci_index::CONFIG, 0x10, &mut bar).unwrap();
    assert_eq!(u32::from_le_bytes(bar), 0xc101);
}

#[test]
fn what_is_written_today_is_the_newest_golden_state() {
    assert_eq!(save(&busy()), std::fs::read(golden("uart-1.state")).unwrap());
}

/// Writes the golden state of the newest version: run it once when a version is added.
#[test]
#[ignore = "it writes a file of the source tree"]
fn write_the_newest_golden_state() {
    std::fs::write(golden("uart-1.state"), save(&busy())).unwrap();
}

#[test]
fn fds_that_the_other_end_of_the_line_sends_hold_up_nothing() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sockopt};
    let (ours, theirs) = UnixStream::pair().unwrap();
    // A socket whose last close waits for an hour, or until its other end is gone.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let lingering = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let _unread = listener.accept().unwrap();
    lingering.set_nonblocking(true).unwrap();
    while rustix::net::send(&lingering, &[0; 65536], SendFlags::NOSIGNAL).is_ok() {}
    sockopt::set_socket_linger(&lingering, Some(std::time::Duration::from_secs(3600))).unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [lingering.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let parts = [std::io::IoSlice::new(b"a")];
    rustix::net::sendmsg(&theirs, &parts, &mut control, SendFlags::NOSIGNAL).unwrap();
    drop(lingering);
    let device = wired(&ours);
    drop(ours);
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // The line is gone; the device is not.
        set_up(&device);
        device.set_state(State::Stop).unwrap();
        device.set_state(State::Running).unwrap();
        drop(device);
        done.send(()).unwrap();
    });
    ended.recv_timeout(std::time::Duration::from_secs(60)).expect("the device hangs");
}
