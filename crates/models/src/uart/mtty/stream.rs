//! mtty's data stream (Linux' `samples/vfio-mdev/mtty.c: struct mtty_data`, version 1.0): a header of
//! 24 bytes, read in PRE_COPY already, then 36 bytes for each port. Little-endian.
//!
//! It has no checksum and no lengths, so the reader takes nothing that the card could not have
//! written: what contradicts itself was altered, or is something else.

use limosa_device::saved::Refusal;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::port::{FCR_ENABLE, FIFO_BYTES, LCR_DLAB, Port};

const MAGIC: u64 = 0x7e9d_0989_8c3e_2c4e;
const VERSION: (u32, u32) = (1, 0);

pub(super) const HEADER_BYTES: usize = size_of::<Header>();
const PORT_BYTES: usize = size_of::<SavedPort>();

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: U64,
    major: U32,
    minor: U32,
    ports: U32,
    flags: U32,
}

/// `struct serial_port`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SavedPort {
    /// By register. Those that are computed (RX, IIR, LSR, MSR) have nothing here.
    registers: [u8; 8],
    fifo: [u8; FIFO_BYTES as usize],
    head: u8,
    tail: u8,
    count: u8,
    dlab: u8,
    overrun: u8,
    gap: u8,
    divisor: U16,
    fifo_control: u8,
    fifo_bytes: u8,
    trigger: u8,
    end: u8,
}

const _: () = assert!(HEADER_BYTES == 24 && PORT_BYTES == 36);

/// Bytes of the whole stream of a card.
pub(super) fn bytes_of(ports: usize) -> usize {
    HEADER_BYTES + ports * PORT_BYTES
}

/// The stream's first part.
pub(super) fn header(ports: usize) -> Vec<u8> {
    let header = Header {
        magic: MAGIC.into(),
        major: VERSION.0.into(),
        minor: VERSION.1.into(),
        ports: (ports as u32).into(),
        flags: 0.into(),
    };
    header.as_bytes().to_vec()
}

/// Adds the ports.
pub(super) fn push_ports(stream: &mut Vec<u8>, ports: &[Port]) {
    ports.iter().for_each(|port| stream.extend_from_slice(SavedPort::from(port).as_bytes()));
}

impl From<&Port> for SavedPort {
    fn from(port: &Port) -> SavedPort {
        let Port { interrupt_enable, line_control, modem_control, scratch, .. } = *port;
        SavedPort {
            registers: [0, interrupt_enable, 0, line_control, modem_control, 0, 0, scratch],
            fifo: port.fifo,
            head: port.head,
            tail: port.tail,
            count: port.count,
            dlab: (line_control & LCR_DLAB != 0).into(),
            overrun: port.overrun.into(),
            gap: 0,
            divisor: port.divisor.into(),
            fifo_control: port.fifo_control,
            fifo_bytes: port.fifo_bytes,
            trigger: port.trigger,
            end: 0,
        }
    }
}

impl SavedPort {
    /// What is wrong with it, if anything is.
    fn port(&self) -> Result<Port, String> {
        let [data, interrupt_enable, identification, line_control, modem_control, line, modem, scratch] =
            self.registers;
        for (register, kept) in [(0, data), (2, identification), (5, line), (6, modem)] {
            if kept != 0 {
                return Err(format!("register {register} is {kept:#x}, and the card keeps nothing there"));
            }
        }
        if self.gap != 0 || self.end != 0 {
            return Err(format!("its padding is {:#x} and {:#x}, and the card leaves 0", self.gap, self.end));
        }
        let flag = |name: &str, value: u8| match value {
            0 | 1 => Ok(value == 1),
            _ => Err(format!("{name} is {value}, neither 0 nor 1")),
        };
        let overrun = flag("overrun", self.overrun)?;
        if flag("DLAB", self.dlab)? != (line_control & LCR_DLAB != 0) {
            return Err(format!("DLAB is {}, and LCR is {line_control:#x}", self.dlab));
        }
        self.check_fifo()?;
        Ok(Port {
            interrupt_enable,
            line_control,
            modem_control,
            scratch,
            fifo_control: self.fifo_control,
            divisor: self.divisor.get(),
            overrun,
            fifo_bytes: self.fifo_bytes,
            trigger: self.trigger,
            fifo: self.fifo,
            head: self.head,
            tail: self.tail,
            count: self.count,
        })
    }

    fn check_fifo(&self) -> Result<(), String> {
        let SavedPort { head, tail, count, fifo_control, fifo_bytes, trigger, .. } = *self;
        if head >= FIFO_BYTES || tail >= FIFO_BYTES {
            return Err(format!("FIFO indexes {head} and {tail}, and the FIFO has {FIFO_BYTES} bytes"));
        }
        if count > FIFO_BYTES || (tail + count) % FIFO_BYTES != head {
            return Err(format!("{count} bytes in the FIFO from {tail} on do not end at {head}"));
        }
        // What FCR made of them, or what a card has whose FCR was never written.
        let enabled = fifo_control & FCR_ENABLE != 0;
        let written = fifo_bytes == if enabled { FIFO_BYTES } else { 1 };
        let asked = [1, 4, 8, 14][usize::from(fifo_control >> 6)];
        let set = written && (trigger == 1 || enabled && trigger == asked);
        let unset = (fifo_control, fifo_bytes, trigger) == (0, FIFO_BYTES, 0);
        if !set && !unset {
            return Err(format!(
                "FCR {fifo_control:#x} makes no FIFO of {fifo_bytes} bytes with trigger level {trigger}"
            ));
        }
        Ok(())
    }
}

/// Takes a stream in, and refuses it as early as its bytes allow. The device is touched only by who
/// calls [`Loader::finish`].
#[derive(Debug)]
pub(super) struct Loader {
    stream: Vec<u8>,
    ports: Vec<Port>,
    ports_due: usize,
}

impl Loader {
    pub(super) fn new(ports: usize) -> Loader {
        Loader { stream: Vec::with_capacity(bytes_of(ports)), ports: Vec::new(), ports_due: ports }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let room = bytes_of(self.ports_due) - self.stream.len();
        let (bytes, rest) = bytes.split_at(bytes.len().min(room));
        let had_header = self.stream.len() >= HEADER_BYTES;
        self.stream.extend_from_slice(bytes);
        let Some((header, ports)) = self.stream.split_at_checked(HEADER_BYTES) else { return Ok(()) };
        if !had_header {
            check_header(header, self.ports_due)?;
        }
        for (place, saved) in ports.chunks_exact(PORT_BYTES).enumerate().skip(self.ports.len()) {
            let name = format!("port {place}");
            let saved = SavedPort::read_from_bytes(saved)
                .map_err(|_| Refusal::Truncated { place: name.clone(), bytes: saved.len() as u64 })?;
            self.ports.push(saved.port().map_err(|text| Refusal::malformed(name, text))?);
        }
        if rest.is_empty() { Ok(()) } else { Err(Refusal::AfterEnd) }
    }

    /// The ports, once all are there.
    pub(super) fn finish(&self) -> Result<Vec<Port>, Refusal> {
        if self.ports.len() == self.ports_due {
            return Ok(self.ports.clone());
        }
        let place = if self.stream.len() < HEADER_BYTES {
            "the header".into()
        } else {
            format!("port {}", self.ports.len())
        };
        Err(Refusal::Truncated { place, bytes: self.stream.len() as u64 })
    }
}

fn check_header(header: &[u8], ports: usize) -> Result<(), Refusal> {
    let header = Header::read_from_bytes(header).map_err(|_| Refusal::NotAState)?;
    let Header { magic, major, minor, ports: theirs, flags } = header;
    if magic.get() != MAGIC {
        return Err(Refusal::NotAState);
    }
    if (major.get(), minor.get()) != VERSION {
        let text = format!("it has version {major}.{minor}, and version {}.{} is read", VERSION.0, VERSION.1);
        return Err(Refusal::unfit("header", text));
    }
    if flags.get() != 0 {
        return Err(Refusal::unfit("header", format!("it has flags {flags:#x}, and none is known")));
    }
    if theirs.get() as usize != ports {
        let text = format!("it is of a card with {theirs} ports, this one has {ports}");
        return Err(Refusal::unfit("header", text));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(stream: &[u8], ports: usize) -> Result<Vec<Port>, Refusal> {
        let mut loader = Loader::new(ports);
        loader.push(stream)?;
        loader.finish()
    }

    fn stream(ports: &[Port]) -> Vec<u8> {
        let mut stream = header(ports.len());
        push_ports(&mut stream, ports);
        stream
    }

    /// What is said of a stream of one port with these bytes changed.
    fn said(changes: &[(usize, u8)]) -> String {
        let mut stream = stream(&[Port::default()]);
        changes.iter().for_each(|(at, byte)| stream[*at] = *byte);
        load(&stream, 1).unwrap_err().to_string()
    }

    #[test]
    fn streams_that_are_no_mttys_or_not_for_this_card_are_refused_by_name() {
        assert!(load(&stream(&[Port::default()]), 1).is_ok());
        assert!(said(&[(7, 0)]).contains("not a saved device state"));
        assert!(said(&[(8, 2)]).contains("version 2.0, and version 1.0 is read"));
        assert!(said(&[(12, 1)]).contains("version 1.1"));
        assert!(said(&[(20, 4)]).contains("flags 0x4"));
        assert!(said(&[(16, 2)]).contains("2 ports, this one has 1"));
        assert!(said(&[(16, 0)]).contains("0 ports"));
        let two = stream(&[Port::default(), Port::default()]);
        assert!(load(&two, 1).unwrap_err().to_string().contains("2 ports"));
        let truncated = |bytes| load(&two[..bytes], 2).unwrap_err().to_string();
        assert!(truncated(23).contains("23 bytes in the header"));
        assert!(truncated(24).contains("24 bytes in port 0"));
        assert!(truncated(95).contains("95 bytes in port 1"));
        let long = load(&[&two[..], &[0]].concat(), 2).unwrap_err();
        assert_eq!(long, Refusal::AfterEnd);
    }

    #[test]
    fn ports_that_contradict_themselves_are_refused_by_name() {
        const PORT: usize = HEADER_BYTES;
        for register in [0, 2, 5, 6] {
            assert!(said(&[(PORT + register, 1)]).contains(&format!("register {register} is 0x1")));
        }
        assert!(said(&[(PORT + 24, 16)]).contains("FIFO indexes 16 and 0"));
        assert!(said(&[(PORT + 25, 0xff)]).contains("FIFO indexes 0 and 255"));
        assert!(said(&[(PORT + 26, 17)]).contains("17 bytes in the FIFO"));
        assert!(said(&[(PORT + 26, 1)]).contains("1 bytes in the FIFO from 0 on do not end at 0"));
        assert!(said(&[(PORT + 24, 3), (PORT + 25, 12), (PORT + 26, 8)]).contains("8 bytes"));
        assert!(said(&[(PORT + 27, 1)]).contains("DLAB is 1, and LCR is 0x0"));
        assert!(said(&[(PORT + 3, 0x80)]).contains("DLAB is 0, and LCR is 0x80"));
        assert!(said(&[(PORT + 27, 2)]).contains("DLAB is 2"));
        assert!(said(&[(PORT + 28, 2)]).contains("overrun is 2"));
        assert!(said(&[(PORT + 29, 1)]).contains("padding"));
        assert!(said(&[(PORT + 35, 1)]).contains("padding"));
        assert!(said(&[(PORT + 32, 1)]).contains("FCR 0x1 makes no FIFO of 16 bytes with trigger level 0"));
        assert!(said(&[(PORT + 33, 1)]).contains("FIFO of 1 bytes"));
        assert!(said(&[(PORT + 33, 200)]).contains("FIFO of 200 bytes"));
        assert!(said(&[(PORT + 32, 0x41), (PORT + 34, 8)]).contains("trigger level 8"));
        // A FIFO that wraps, and a full one, do not.
        let mut port = Port { head: 3, tail: 12, count: 7, ..Port::default() };
        assert!(load(&stream(&[port.clone()]), 1).is_ok());
        (port.head, port.count) = (12, 16);
        assert!(load(&stream(&[port]), 1).is_ok());
    }

    #[test]
    fn what_contradicts_itself_is_refused_before_the_rest_has_come() {
        let mut loader = Loader::new(2);
        let mut bytes = stream(&[Port::default(), Port::default()]);
        bytes[HEADER_BYTES + 24] = 99;
        loader.push(&bytes[..HEADER_BYTES + PORT_BYTES - 1]).unwrap();
        assert!(loader.push(&bytes[HEADER_BYTES + PORT_BYTES - 1..][..1]).is_err());
        assert!(loader.finish().is_err());
    }
}
