//! Devices on both machines with something in them that can be known again, and moves between them.

use limosa_lab::{Ended, Kind, Machine, Placed, Running, limosa};
use limosa_testing::beside_the_test;

/// What a serial port can hold and give back. It has room for 16, but when it is full mtty takes it for empty.
const FIFO: usize = 15;
/// A serial port's registers: data, and the one that turns its FIFO on.
const DATA: u32 = 0;
const FIFO_CONTROL: u32 = 2;

/// Runs the command on a machine.
#[track_caller]
pub fn start(machine: &Machine, args: &[&str]) -> Running {
    let program = limosa().get_program().to_str().expect("a path that is text").to_owned();
    machine.start(&[&[program.as_str()], args].concat())
}

/// Runs the command on a machine, to its end.
#[track_caller]
pub fn run(machine: &Machine, args: &[&str]) -> Ended {
    start(machine, args).end()
}

fn agent(machine: &Machine, args: &[&str]) -> String {
    let program = beside_the_test("limosa-lab-agent");
    let program = program.to_str().expect("a path that is text");
    machine.run(&[&[program], args].concat()).ok()
}

/// A device on a machine, and what the guest left in it.
pub struct Guest<'a> {
    pub machine: &'a Machine,
    pub device: Placed<'a>,
    pub kind: Kind,
}

impl<'a> Guest<'a> {
    /// A new device.
    pub fn new(machine: &'a Machine, kind: &Kind) -> Self {
        Self { machine, device: machine.mdev(kind), kind: kind.clone() }
    }

    pub fn is_serial(&self) -> bool {
        self.kind.parent == "mtty"
    }

    /// How it can be known again: a serial device by the bytes in its FIFOs, ours by its check.
    pub fn mark(&self, seed: u8) -> Mark {
        if !self.is_serial() {
            self.device.set("limosa/seed", seed);
            return Mark(vec![self.device.get("limosa/check")]);
        }
        let mut fifos = Vec::new();
        for port in self.ports() {
            let byte = |at: usize| seed.wrapping_mul(31).wrapping_add(port * 64).wrapping_add(at as u8);
            let bytes: Vec<String> = (0..FIFO).map(|at| byte(at).to_string()).collect();
            self.poke(port, FIFO_CONTROL, &["1"]);
            self.poke(port, DATA, &bytes.iter().map(String::as_str).collect::<Vec<_>>());
            fifos.push(bytes.join(" "));
        }
        Mark(fifos)
    }

    /// What it holds. A serial device gives its bytes away with that.
    pub fn taken(&self) -> Mark {
        if !self.is_serial() {
            return Mark(vec![self.device.get("limosa/check")]);
        }
        let port = |port: u8| {
            let (port, offset, count) = (port.to_string(), DATA.to_string(), FIFO.to_string());
            agent(self.machine, &["peek", self.device.uuid(), &port, &offset, &count]).trim_end().to_owned()
        };
        Mark(self.ports().map(port).collect())
    }

    /// The state in which it is when somebody opens it.
    #[track_caller]
    pub fn state(&self) -> String {
        run(self.machine, &["state", self.device.uuid()]).ok().trim_end().to_owned()
    }

    fn ports(&self) -> std::ops::Range<u8> {
        0..if self.kind.name == "mtty-2" { 2 } else { 1 }
    }

    fn poke(&self, port: u8, register: u32, bytes: &[&str]) {
        let (port, register) = (port.to_string(), register.to_string());
        agent(self.machine, &[&["poke", self.device.uuid(), &port, &register], bytes].concat());
    }
}

/// What a device holds, as far as it can be seen from outside.
#[derive(Debug, PartialEq, Eq)]
pub struct Mark(Vec<String>);

/// A receiver over there, and where it listens.
pub fn receiver(to: &Guest<'_>, options: &[&str]) -> (Running, String) {
    let listen = format!("tcp:{}:0", to.machine.address);
    let receiver = start(
        to.machine,
        &[&["-v", "receive", to.device.uuid(), "--listen", &listen, "--insecure"], options].concat(),
    );
    let line = receiver.line("listening on ");
    let address = line.split("listening on ").nth(1).expect("it is in the line").trim().to_owned();
    (receiver, address)
}

/// Moves a device, and gives what both sides said.
#[track_caller]
pub fn moved(from: &Guest<'_>, to: &Guest<'_>, options: &[&str]) -> (Ended, Ended) {
    let (receiver, address) = receiver(to, options);
    let sent = run(
        from.machine,
        &[&["-v", "send", from.device.uuid(), "--to", &address, "--insecure"], options].concat(),
    );
    (sent, receiver.end())
}
