//! The saved state: kind `limosa.uart`; a section `function`, and a section `port` for each port,
//! whose place is the port's number.

use limosa_device::Interrupts;
use limosa_device::pci::{Function, FunctionState};
use limosa_device::saved::{Item, Reader, Refusal, Section, Writer};

use super::port::{FIFO_BYTES, Port};

/// The kind of device in its saved states.
pub const KIND: &str = "limosa.uart";

const FUNCTION: Section = Section::message("function", 1);
const PORT: Section = Section::message("port", 1).repeated();

/// The longest state that is taken.
const STATE_BYTES_MAX: u64 = 64 << 10;

/// A port. Field numbers are never used for anything else.
#[derive(Clone, PartialEq, prost::Message)]
struct PortState {
    #[prost(uint32, tag = "1")]
    interrupt_enable: u32,
    #[prost(uint32, tag = "2")]
    fifo_control: u32,
    #[prost(uint32, tag = "3")]
    line_control: u32,
    #[prost(uint32, tag = "4")]
    modem_control: u32,
    #[prost(uint32, tag = "5")]
    scratch: u32,
    #[prost(uint32, tag = "6")]
    divisor: u32,
    #[prost(bool, tag = "7")]
    overrun: bool,
    #[prost(uint32, tag = "8")]
    modem_status: u32,
    #[prost(bool, tag = "9")]
    empty_pending: bool,
    #[prost(bytes = "vec", tag = "10")]
    received: Vec<u8>,
    #[prost(bytes = "vec", tag = "11")]
    to_send: Vec<u8>,
}

impl From<&Port> for PortState {
    fn from(port: &Port) -> PortState {
        PortState {
            interrupt_enable: port.interrupt_enable.into(),
            fifo_control: port.fifo_control.into(),
            line_control: port.line_control.into(),
            modem_control: port.modem_control.into(),
            scratch: port.scratch.into(),
            divisor: port.divisor.into(),
            overrun: port.overrun,
            modem_status: port.modem_status.into(),
            empty_pending: port.empty_pending,
            received: port.received.iter().copied().collect(),
            to_send: port.to_send.iter().copied().collect(),
        }
    }
}

impl PortState {
    fn port(self) -> Result<Port, Refusal> {
        let register = |name: &str, value: u32, bits: u8| match u8::try_from(value) {
            Ok(value) if value & !bits == 0 => Ok(value),
            _ => Err(Refusal::malformed("port", format!("{name} is {value:#x}"))),
        };
        let port = Port {
            interrupt_enable: register("interrupt enable", self.interrupt_enable, 0x0f)?,
            fifo_control: register("FIFO control", self.fifo_control, 0xc9)?,
            line_control: register("line control", self.line_control, 0xff)?,
            modem_control: register("modem control", self.modem_control, 0x1f)?,
            scratch: register("scratch", self.scratch, 0xff)?,
            divisor: u16::try_from(self.divisor)
                .map_err(|_| Refusal::malformed("port", format!("the divisor is {:#x}", self.divisor)))?,
            overrun: self.overrun,
            modem_status: register("modem status", self.modem_status, 0xff)?,
            empty_pending: self.empty_pending,
            received: self.received.into(),
            to_send: self.to_send.into(),
        };
        for (name, bytes) in [("receiver", port.received.len()), ("transmitter", port.to_send.len())] {
            if bytes > port.fifo_bytes() {
                return Err(Refusal::malformed(
                    "port",
                    format!("{bytes} bytes in the {name}, which has room for {}", port.fifo_bytes()),
                ));
            }
        }
        debug_assert!(port.received.len() <= FIFO_BYTES);
        Ok(port)
    }
}

/// The whole state.
pub(super) fn save(function: &Function, ports: &[Port], interrupts: &Interrupts) -> Vec<u8> {
    let mut writer = Writer::new(KIND);
    writer.message(&FUNCTION, &function.state(interrupts));
    for (place, port) in (0..).zip(ports) {
        let message = prost::Message::encode_to_vec(&PortState::from(port));
        writer.section(&PORT, place, &message);
    }
    writer.finish()
}

/// Takes a state in; the device is touched only by who calls [`Loader::finish`].
pub(super) struct Loader {
    reader: Reader,
    function: Option<FunctionState>,
    ports: Vec<Option<Port>>,
}

impl Loader {
    pub(super) fn new(ports: usize) -> Loader {
        Loader {
            reader: Reader::new(KIND, &[FUNCTION, PORT], STATE_BYTES_MAX),
            function: None,
            ports: vec![None; ports],
        }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let (function, ports) = (&mut self.function, &mut self.ports);
        self.reader.push(bytes, |item: Item<'_>| {
            if item.section.name() == FUNCTION.name() {
                *function = Some(item.decode()?);
                return Ok(());
            }
            let has = ports.len();
            let slot = usize::try_from(item.place).ok().and_then(|place| ports.get_mut(place));
            let slot = slot.ok_or_else(|| {
                Refusal::unfit("port", format!("it is of port {}, this device has {has}", item.place))
            })?;
            if slot.is_some() {
                return Err(Refusal::malformed("port", format!("port {} comes twice", item.place)));
            }
            *slot = Some(item.decode::<PortState>()?.port()?);
            Ok(())
        })
    }

    /// What was loaded, once it is whole and fits a device with this function.
    pub(super) fn finish(&self, function: &Function) -> Result<(Function, Vec<Port>), Refusal> {
        self.reader.finish()?;
        let missing = |name: &str| Refusal::Missing { name: name.into() };
        let state = self.function.as_ref().ok_or_else(|| missing("function"))?;
        let function = function.loaded("function", state)?;
        let ports: Option<Vec<Port>> = self.ports.iter().cloned().collect();
        Ok((function, ports.ok_or_else(|| missing("port"))?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(state: &[u8], ports: usize) -> Result<Vec<Port>, Refusal> {
        let mut loader = Loader::new(ports);
        loader.push(state)?;
        Ok(loader.finish(&super::super::function(ports))?.1)
    }

    fn with(change: impl FnOnce(&mut PortState)) -> Vec<u8> {
        let mut port = PortState::from(&Port::default());
        change(&mut port);
        let mut writer = Writer::new(KIND);
        writer.message(&FUNCTION, &super::super::function(1).state(&Interrupts::default()));
        writer.section(&PORT, 0, &prost::Message::encode_to_vec(&port));
        writer.finish()
    }

    #[test]
    fn a_port_comes_back_as_it_was() {
        let mut port = Port::default();
        for (register, value) in [(2, 0xc1), (3, 0x83), (0, 1), (1, 2), (3, 3), (1, 5), (4, 0x0b), (7, 9)] {
            port.write(register, value);
        }
        (0..20).for_each(|byte| port.receive(byte));
        (0..5).for_each(|byte| port.write(0, byte));
        let ports = [port, Port::default()];
        assert_eq!(
            load(&save(&super::super::function(2), &ports, &Interrupts::default()), 2).unwrap(),
            ports
        );
    }

    #[test]
    fn states_that_contradict_themselves_are_refused_by_name() {
        assert!(load(&with(|_| ()), 1).is_ok());
        let said = |change: fn(&mut PortState)| load(&with(change), 1).unwrap_err().to_string();
        assert!(said(|port| port.interrupt_enable = 0x10).contains("interrupt enable is 0x10"));
        assert!(said(|port| port.scratch = 0x100).contains("scratch is 0x100"));
        assert!(said(|port| port.divisor = 0x10000).contains("divisor is 0x10000"));
        assert!(said(|port| port.received = vec![0; 2]).contains("2 bytes in the receiver"));
        let full = said(|port| {
            port.fifo_control = 1;
            port.to_send = vec![0; 17];
        });
        assert!(full.contains("17 bytes in the transmitter, which has room for 16"), "{full}");
    }

    #[test]
    fn states_of_other_devices_are_refused_by_name() {
        let one = with(|_| ());
        let two =
            save(&super::super::function(2), &[Port::default(), Port::default()], &Interrupts::default());
        assert!(load(&one, 2).unwrap_err().to_string().contains("does not fit"));
        assert!(load(&two, 1).unwrap_err().to_string().contains("port 1, this device has 1"));
        let foreign = Writer::new("limosa.nvme").finish();
        assert!(load(&foreign, 1).unwrap_err().to_string().contains("limosa.nvme"));
        let mut newer = Writer::new(KIND);
        newer.section(&Section::message("port", 2), 0, &[]);
        assert!(load(&newer.finish(), 1).unwrap_err().to_string().contains("version 2"));
        let mut twice = Writer::new(KIND);
        (0..2).for_each(|_| twice.section(&PORT, 0, &[]));
        assert!(load(&twice.finish(), 1).unwrap_err().to_string().contains("port"));
        let mut none = Writer::new(KIND);
        none.message(&FUNCTION, &super::super::function(1).state(&Interrupts::default()));
        assert!(load(&none.finish(), 1).unwrap_err().to_string().contains("\"port\" is missing"));
    }
}
