//! One serial card, every transport: kernel, process, this process. What moves is mtty's own stream,
//! and the engine does not know it.

mod serial;

use std::os::fd::AsFd;
use std::path::Path;

use limosa_client::{Device, DeviceExt, IrqAction};
use limosa_device::{Loopback, Machine};
use limosa_lab::{Mdev, limosa};
use limosa_migrate::Outcome;
use limosa_models::uart::{Line, Uart};
use limosa_protocol::info::RegionFlags;
use limosa_protocol::{State, pci_index};
use limosa_testing::Process;
use limosa_vfio_kernel::Door;
use rustix::event::{EventfdFlags, eventfd};
use serial::{
    Card, DATA, LINE_STATUS, SCRATCH, Server, TRANSPORTS, Transport, fresh, get, kernel, move_here, moves,
    mtty, peek, receive, registers, send, set, set_up,
};

/// Gives a card something to lose: every register its own, and FIFOs that wrap.
fn fill(card: &Card) {
    for port in 0..card.ports {
        set_up(&**card, port);
        send(&**card, port, b"0123456789ab");
        assert_eq!(receive(&**card, port, 10), b"0123456789");
        send(&**card, port, [b"godwit".as_slice(), b"limosa!"][port as usize]);
    }
}

fn texts(card: &Card) -> Vec<Vec<u8>> {
    (0..card.ports).map(|port| receive(&**card, port, 16)).collect()
}

fn all_registers(card: &Card) -> Vec<[u8; 7]> {
    (0..card.ports).map(|port| registers(&**card, port)).collect()
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn between_every_two_transports_a_card_keeps_its_registers_and_the_bytes_in_its_fifo_there_and_back() {
    for ports in [1, 2] {
        for from in TRANSPORTS {
            for to in TRANSPORTS {
                let (here, there) = (Card::new(from, ports), Card::new(to, ports));
                fill(&here);
                let (state, registers) = (peek(&*here), all_registers(&here));
                assert_eq!(state.len(), 24 + 36 * ports as usize);
                let hop = format!("{from:?} -> {to:?}, {ports} ports");
                moves(&*here, &*there);
                assert_eq!((peek(&*there), all_registers(&there)), (state, registers), "{hop}");
                // One byte less, one more, and back to where it came from.
                for port in 0..ports {
                    assert_eq!(receive(&*there, port, 1), b"a", "{hop}");
                    send(&*there, port, b".");
                }
                let state = peek(&*there);
                moves(&*there, &*here);
                assert_eq!(peek(&*here), state, "{hop} and back");
                let all: [&[u8]; 2] = [b"bgodwit.", b"blimosa!."];
                assert_eq!(texts(&here), all[..ports as usize], "{hop} and back");
            }
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_card_goes_the_rounds_of_all_transports_and_loses_no_byte() {
    use Transport::{Cdev, Group, Loopback, VfioUser};
    let mut card = Card::new(Cdev, 2);
    fill(&card);
    let (mut expected, mut seen) = (b"abgodwit".to_vec(), Vec::new());
    for (hop, to) in [VfioUser, Group, Loopback, Cdev, Cdev, Loopback, VfioUser, VfioUser, Group, Group]
        .into_iter()
        .enumerate()
    {
        let next = Card::new(to, 2);
        moves(&*card, &*next);
        card = next;
        // On each hop two bytes out, two in.
        seen.extend(receive(&*card, 0, 2));
        let more = [b'A' + hop as u8, b'a' + hop as u8];
        send(&*card, 0, &more);
        expected.extend(more);
    }
    seen.extend(receive(&*card, 0, 16));
    assert_eq!(seen, expected);
    assert_eq!(receive(&*card, 1, 16), b"ablimosa!", "the port that nobody touched");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_full_fifo_moves_with_all_its_bytes_though_mtty_reads_it_as_empty() {
    for to in TRANSPORTS {
        let (from, there) = (Card::new(Transport::Cdev, 1), Card::new(to, 1));
        send(&*from, 0, b"0123456789abcdefgh");
        assert_eq!(get(&*from, 0, LINE_STATUS), 0x62, "empty, and an overrun");
        moves(&*from, &*there);
        assert_eq!(get(&*there, 0, LINE_STATUS), 0x62, "{to:?}");
        let state = peek(&*there);
        assert_eq!(&state[32..48], b"0123456789abcdef");
        assert_eq!(state[24 + 26], 16, "bytes");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn what_the_kernel_says_of_its_card_the_model_says_of_its_own() {
    for ports in [1, 2] {
        let cards = TRANSPORTS.map(|transport| Card::new(transport, ports));
        let said = cards.each_ref().map(|card| {
            let info = card.info().unwrap();
            let regions: Vec<_> = (0..info.num_regions)
                .map(|index| {
                    let region = card.region(index).unwrap().info;
                    (region.size, region.flags & (RegionFlags::READ | RegionFlags::WRITE).bits())
                })
                .collect();
            let irqs: Vec<_> = [pci_index::IRQ_INTX, pci_index::IRQ_MSI]
                .map(|index| card.irq(index).unwrap())
                .map(|irq| (irq.flags, irq.count))
                .into();
            let mut config = vec![0; 255];
            card.region_read(pci_index::CONFIG, 0, &mut config).unwrap();
            let migration = (card.migration_flags().unwrap(), card.mig_data_size().unwrap());
            (regions, info.num_irqs, irqs, config, migration, peek(&**card))
        });
        assert_eq!(said[0].4.1, Some(24 + 36 * u64::from(ports)));
        for (transport, says) in TRANSPORTS.iter().zip(&said) {
            assert_eq!(says, &said[0], "{transport:?}");
        }
    }
}

/// A small generator of numbers (xorshift), so that a walk can be walked again.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn the_model_answers_every_access_as_the_kernel_does() {
    for (ports, seed) in [(1, 11), (2, 22), (2, 33)] {
        let (theirs, ours) = (Card::new(Transport::Cdev, ports), Card::new(Transport::Loopback, ports));
        // mtty sets interrupts up only for those who asked what the device is.
        let events = [&theirs, &ours].map(|card| {
            card.info().unwrap();
            let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
            card.set_irqs(pci_index::IRQ_MSI, 0, IrqAction::Wire(&[Some(event.as_fd())])).unwrap();
            event
        });
        let mut numbers = Numbers(seed);
        for step in 0..3000 {
            let port = numbers.below(ports.into()) as u32;
            // Mostly bytes in and out, so that the FIFO fills and wraps.
            let register = if numbers.below(2) == 0 { DATA } else { numbers.below(8) };
            let write = numbers.below(2) == 0;
            let mut value = numbers.below(256) as u8;
            if register == 2 {
                // Without the bits that clear it, more often than not.
                value &= if numbers.below(4) == 0 { 0xff } else { 0xf9 };
            }
            if register == 3 && numbers.below(4) != 0 {
                value &= 0x7f;
            }
            let at = format!("seed {seed}, step {step}: port {port} register {register} {write} {value:#x}");
            // What mtty gives for a byte that is not there is what its stack held.
            let reads_nothing = !write
                && register == DATA
                && get(&*theirs, port, 3) & 0x80 == 0
                && get(&*theirs, port, LINE_STATUS) & 1 == 0;
            if reads_nothing {
                continue;
            }
            if write {
                [&theirs, &ours].iter().for_each(|card| set(&***card, port, register, value));
            } else {
                assert_eq!(get(&*theirs, port, register), get(&*ours, port, register), "{at}");
            }
            let [signal, our_signal] =
                events.each_ref().map(|event| rustix::io::read(event, &mut [0; 8]).is_ok());
            assert_eq!(signal, our_signal, "{at}");
            if step % 100 == 0 {
                assert_eq!(peek(&*theirs), peek(&*ours), "{at}");
            }
        }
        assert_eq!(peek(&*theirs), peek(&*ours));
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn traces_of_an_older_kernels_answers_are_those_of_this_one() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/golden");
    for ports in [1, 2] {
        let card = Card::new(Transport::Cdev, ports);
        let trace = std::fs::read_to_string(folder.join(format!("mtty-{ports}.trace"))).unwrap();
        for (number, line) in trace.lines().enumerate() {
            let words: Vec<_> = line.split(' ').collect();
            let hex = |at: usize| u8::from_str_radix(words[at], 16).unwrap();
            match words[0] {
                "s" => {
                    let state: String = peek(&*card).iter().map(|byte| format!("{byte:02x}")).collect();
                    assert_eq!(state, words[1], "line {}", number + 1);
                }
                "w" => set(&*card, hex(1).into(), hex(2).into(), hex(3)),
                _ => assert_eq!(get(&*card, hex(1).into(), hex(2).into()), hex(3), "line {}", number + 1),
            }
        }
        for name in ["fresh", "bytes", "full"] {
            let state = std::fs::read(folder.join(format!("mtty-{ports}-{name}.stream"))).unwrap();
            let mut stream = card.set_state(State::Resuming).unwrap().unwrap();
            stream.write(&state).unwrap();
            card.set_state(State::Running).unwrap();
            assert_eq!(peek(&*card), state, "{name}");
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_card_of_another_kind_is_refused_by_what_differs_and_the_source_runs_on() {
    let ordinary = || {
        let uart = Uart::new(vec![Line::Echo]).unwrap();
        Loopback::new("16550", Machine::simple(uart))
    };
    for kernel in [Transport::Cdev, Transport::Group] {
        let mtty = Card::new(kernel, 1);
        set(&*mtty, 0, SCRATCH, 0x77);
        send(&*mtty, 0, b"stay");
        let two = Card::new(Transport::Loopback, 2);
        for (other, reason) in [
            (&ordinary() as &dyn Device, "PCI identification is 4348:3253"),
            (&*two, "list of region sizes is [8, 0, 0, 0, 0, 0, 0, 255, 0]"),
        ] {
            let (outcome, _) = move_here(&*mtty, other);
            let Outcome::Undone { why, .. } = outcome else { panic!("{outcome:?}") };
            assert!(why.to_string().contains(reason), "{why}");
            assert_eq!(mtty.state().unwrap(), State::Running);
            // The other way round too, and nothing was done to the card.
            let (outcome, _) = move_here(other, &*mtty);
            let Outcome::Undone { why, .. } = outcome else { panic!("{outcome:?}") };
            assert!(why.to_string().contains(reason.split(" is ").next().unwrap()), "{why}");
            assert_eq!((mtty.state().unwrap(), other.state().unwrap()), (State::Running, State::Running));
            assert_eq!(get(&*mtty, 0, SCRATCH), 0x77);
        }
        assert_eq!(receive(&*mtty, 0, 16), b"stay");
    }
}

/// A card that the command is to move: a device of the kernel's by one of its names, or a server's socket.
enum Named {
    Kernel(Mdev, String),
    Socket(Server),
}

impl Named {
    fn new(transport: Transport, ports: u32) -> Named {
        if transport == Transport::VfioUser {
            return Named::Socket(Server::new(ports));
        }
        let mdev = mtty(ports);
        let name = match transport {
            Transport::Cdev => mdev.cdev().display().to_string(),
            _ => format!("/dev/vfio/{}", mdev.group()),
        };
        Named::Kernel(mdev, name)
    }

    fn name(&self) -> &str {
        match self {
            Named::Kernel(_, name) => name,
            Named::Socket(server) => server.socket.to_str().unwrap(),
        }
    }

    /// Looks at the card while no command has it.
    fn with<R>(&self, act: impl FnOnce(&dyn Device) -> R) -> R {
        match self {
            Named::Kernel(mdev, name) => {
                let door = if name.contains("devices") { Door::Cdev } else { Door::Group };
                act(&kernel(mdev, door))
            }
            Named::Socket(server) => act(&server.client()),
        }
    }

    fn fill(&self, ports: u32, text: &[u8]) {
        self.with(|card| {
            card.reset().unwrap();
            for port in 0..ports {
                set_up(card, port);
                send(card, port, b"wraps");
                receive(card, port, 5);
                send(card, port, text);
            }
        });
    }

    /// The card runs with all it had.
    #[track_caller]
    fn has(&self, ports: u32, text: &[u8], what: &str) {
        self.with(|card| {
            assert_eq!(card.state().unwrap(), State::Running, "{what}");
            for port in 0..ports {
                assert_eq!(get(card, port, SCRATCH), 0x5a + port as u8, "{what}");
                assert_eq!(receive(card, port, 16), text, "{what}");
                send(card, port, text);
            }
        });
    }
}

/// Runs the command, which must do what it is asked.
#[track_caller]
fn run(args: &[&str]) -> String {
    let output = limosa().args(args).output().unwrap();
    assert!(output.status.success(), "limosa {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

const NAMED: [Transport; 3] = [Transport::Cdev, Transport::Group, Transport::VfioUser];

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn limosa_migrate_moves_a_card_between_every_two_transports_and_back() {
    for (from, to) in NAMED.into_iter().flat_map(|from| NAMED.map(|to| (from, to))) {
        let ports = if from == to { 2 } else { 1 };
        let (here, there) = (Named::new(from, ports), Named::new(to, ports));
        let what = format!("{from:?} -> {to:?}");
        here.fill(ports, b"by command");
        run(&["migrate", here.name(), there.name()]);
        assert_eq!(here.with(|card| card.state().unwrap()), State::Stop, "{what}");
        there.has(ports, b"by command", &what);
        run(&["migrate", there.name(), here.name()]);
        here.has(ports, b"by command", &format!("{what} and back"));
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_card_saved_from_one_transport_is_loaded_into_every_other() {
    for from in NAMED {
        let (source, file) = (Named::new(from, 2), fresh("saved"));
        source.fill(2, b"in a file");
        run(&["save", source.name(), &file]);
        source.has(2, b"in a file", "it runs on");
        run(&["inspect", &file]);
        for to in NAMED {
            let destination = Named::new(to, 2);
            run(&["load", &file, destination.name()]);
            destination.has(2, b"in a file", &format!("{from:?} -> file -> {to:?}"));
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_card_sent_by_one_process_is_received_by_another() {
    for (from, to) in NAMED.into_iter().flat_map(|from| NAMED.map(|to| (from, to))) {
        let (source, destination) = (Named::new(from, 1), Named::new(to, 1));
        source.fill(1, b"on the wire");
        let address = format!("unix:{}", fresh("link"));
        let receiver = Process::start(limosa().args(["receive", destination.name(), "--listen", &address]));
        receiver.line("listening on ");
        run(&["send", source.name(), "--to", &address]);
        receiver.end().ok();
        let what = format!("{from:?} -> {to:?}");
        assert_eq!(source.with(|card| card.state().unwrap()), State::Stop, "{what}");
        destination.has(1, b"on the wire", &what);
    }
}
