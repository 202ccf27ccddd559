//! A serial port: a PCI function with one or two 16550A in an I/O BAR, 8 bytes each, and INTx. The 8250 driver of Linux
//! binds to it by its identity, which is that of QEMU's serial cards, and by its class.
//!
//! [`Mtty`] imitates the Linux sample device, for moves between kernel and process.

mod line;
mod mtty;
mod port;
mod state;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use limosa_device::pci::{Bar, Function, Identity};
use limosa_device::{Bus, Description, Fault, Interrupts, Save, SimpleMigration, SimpleModel};
use limosa_protocol::info::DeviceFlags;
use limosa_protocol::{Errno, MigrationFlags, pci_index};

pub use line::Line;
use line::Wire;
pub use mtty::Mtty;
use port::{Port, REGISTERS};
pub use state::KIND;
use state::Loader;

/// Region of the ports: port *n* at offset 8 *n*.
pub const PORTS_REGION: u32 = pci_index::BAR0;

/// The most ports of one function.
pub const PORTS_MAX: usize = 2;

/// A serial port's function.
pub struct Uart {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    saver: Option<(Vec<u8>, usize)>,
    loader: Option<Loader>,
}

/// Why there is no such serial port.
#[derive(Debug, thiserror::Error)]
pub enum UartError {
    /// A function has 1 or 2 ports.
    #[error("a serial card has 1 or 2 ports, not {0}")]
    Ports(usize),
    /// The line's file descriptors cannot be used.
    #[error("the serial line cannot be used: {0}")]
    Line(#[from] std::io::Error),
}

/// What the model and the threads of its lines share.
struct Shared {
    chip: Mutex<Chip>,
    bus: OnceLock<Bus>,
    /// By port; `None` for an echo.
    wires: Vec<Option<Wire>>,
}

struct Chip {
    ports: Vec<Port>,
    function: Function,
    running: bool,
    quit: bool,
}

fn function(ports: usize) -> Function {
    let identity = Identity {
        vendor: 0x1b36,
        device: if ports == 1 { 0x0002 } else { 0x0003 },
        revision: 1,
        // Communication, serial, 16550-compatible.
        class: 0x07_0002,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    };
    let bytes = REGISTERS * ports as u64;
    Function::builder(identity).bar(PORTS_REGION as usize, Bar::Io { bytes }).interrupt_pin().build()
}

impl Uart {
    /// A serial port for each line, one or two.
    pub fn new(lines: Vec<Line>) -> Result<Uart, UartError> {
        let ports = lines.len();
        if !(1..=PORTS_MAX).contains(&ports) {
            return Err(UartError::Ports(ports));
        }
        let wires = lines.into_iter().map(|line| match line {
            Line::Echo => Ok(None),
            Line::Fds { input, output } => Wire::new(input, output).map(Some),
        });
        let wires = wires.collect::<std::io::Result<_>>()?;
        let chip = Chip {
            ports: vec![Port::default(); ports],
            function: function(ports),
            running: true,
            quit: false,
        };
        let shared = Shared { chip: Mutex::new(chip), bus: OnceLock::new(), wires };
        Ok(Uart { shared: Arc::new(shared), threads: Vec::new(), saver: None, loader: None })
    }

    fn wake_all(&self) {
        self.shared.wires.iter().flatten().for_each(Wire::wake);
    }
}

impl Shared {
    fn chip(&self) -> MutexGuard<'_, Chip> {
        // Nothing that is done under the lock leaves the chip half changed.
        self.chip.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn interrupts(&self) -> Interrupts {
        self.bus.get().map(|bus| bus.interrupts.clone()).unwrap_or_default()
    }

    /// After a change: echoes what is sent, and brings the interrupt up to what the ports say.
    fn settle(&self, chip: &mut Chip) {
        if chip.running {
            for (port, wire) in chip.ports.iter_mut().zip(&self.wires) {
                while wire.is_none() && port.room() > 0 {
                    let Some(byte) = port.send() else { break };
                    port.receive(byte);
                }
            }
        }
        let Some(bus) = self.bus.get() else { return };
        let wanted = chip.ports.iter().any(Port::interrupts);
        match (wanted, chip.function.is_raised(0)) {
            (true, false) => chip.function.raise(0, &bus.interrupts),
            (false, true) => chip.function.lower(0, &bus.interrupts),
            _ => {}
        }
    }

    /// Accesses registers one by one, as a bus does that is 8 bits wide.
    fn access(&self, offset: u64, count: usize, mut access: impl FnMut(&mut Port, u64, usize)) {
        let mut chip = self.chip();
        for at in 0..count {
            let offset = offset + at as u64;
            let index = (offset / REGISTERS) as usize;
            let Some(port) = chip.ports.get_mut(index) else { continue };
            let (full, silent) = (port.room() == 0, port.to_send.is_empty());
            access(port, offset % REGISTERS, at);
            let more = (full && port.room() > 0) || (silent && !port.to_send.is_empty());
            if let Some(wire) = self.wires[index].as_ref().filter(|_| more) {
                wire.wake();
            }
        }
        self.settle(&mut chip);
    }
}

impl Drop for Uart {
    fn drop(&mut self) {
        self.shared.chip().quit = true;
        self.wake_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl SimpleModel for Uart {
    fn description(&self) -> Description {
        let chip = self.shared.chip();
        Description {
            flags: Some(DeviceFlags::RESET | DeviceFlags::PCI),
            regions: chip.function.regions(),
            irqs: chip.function.irqs(),
        }
    }

    fn attach(&mut self, bus: Bus) {
        let _ = self.shared.bus.set(bus);
        for port in (0..self.shared.wires.len()).filter(|port| self.shared.wires[*port].is_some()) {
            let shared = Arc::clone(&self.shared);
            let run = move || {
                if let Some(wire) = &shared.wires[port] {
                    wire.run(&shared, port);
                }
            };
            match std::thread::Builder::new().name(format!("uart-line-{port}")).spawn(run) {
                Ok(thread) => self.threads.push(thread),
                Err(error) => tracing::error!(%error, port, "no thread for a serial line: it is dead"),
            }
        }
    }

    /// A device that does not run is not changed by what is read of it.
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        if region == pci_index::CONFIG {
            return self.shared.chip().function.config_read(offset, data);
        }
        if self.shared.chip().running {
            self.shared.access(offset, data.len(), |port, register, at| data[at] = port.read(register));
            return Ok(());
        }
        // A read that takes a byte or clears a cause changes the device, and now nothing may.
        let mut ports = self.shared.chip().ports.clone();
        for (offset, byte) in (offset..).zip(data) {
            let port = ports.get_mut((offset / REGISTERS) as usize);
            *byte = port.map_or(0, |port| port.read(offset % REGISTERS));
        }
        Ok(())
    }

    /// EBUSY for a port of a device that does not run.
    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        if region == pci_index::CONFIG {
            let bus = self.shared.bus.get().ok_or(Errno::EIO)?;
            self.shared.chip().function.config_write(offset, data, &bus.interrupts)?;
            return Ok(());
        }
        if !self.shared.chip().running {
            return Err(Errno::EBUSY);
        }
        self.shared.access(offset, data.len(), |port, register, at| port.write(register, data[at]));
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Errno> {
        {
            let mut chip = self.shared.chip();
            chip.ports.fill(Port::default());
            chip.running = true;
            if let Some(bus) = self.shared.bus.get() {
                chip.function.reset(&bus.interrupts);
            }
        }
        (self.saver, self.loader) = (None, None);
        self.wake_all();
        Ok(())
    }

    fn rewired(&mut self, _index: u32) {
        self.shared.chip().function.settle(&self.shared.interrupts());
    }

    fn migration(&mut self) -> Option<&mut dyn SimpleMigration> {
        Some(self)
    }
}

impl SimpleMigration for Uart {
    /// It does no DMA, so it is quiesced whenever it is asked to be; its state is too small for
    /// pre-copy.
    fn flags(&self) -> MigrationFlags {
        MigrationFlags::STOP_COPY | MigrationFlags::P2P
    }

    fn stop(&mut self) -> Result<(), Fault> {
        self.shared.chip().running = false;
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        {
            let mut chip = self.shared.chip();
            chip.running = true;
            self.shared.settle(&mut chip);
        }
        self.wake_all();
        Ok(())
    }

    fn save_begin(&mut self) -> Result<(), Fault> {
        let chip = self.shared.chip();
        self.saver = Some((state::save(&chip.function, &chip.ports, &self.shared.interrupts()), 0));
        Ok(())
    }

    fn save(&mut self, bytes_max: usize, _stopped: bool) -> Result<Save<'_>, Errno> {
        let (state, at) = self.saver.as_mut().ok_or(Errno::EIO)?;
        let from = *at;
        *at = state.len().min(from.saturating_add(bytes_max));
        Ok(if from == *at { Save::End } else { Save::Data(&state[from..*at]) })
    }

    fn save_end(&mut self) {
        self.saver = None;
    }

    fn data_size(&self) -> u64 {
        let chip = self.shared.chip();
        state::save(&chip.function, &chip.ports, &self.shared.interrupts()).len() as u64
    }

    fn load_begin(&mut self) -> Result<(), Fault> {
        self.loader = Some(Loader::new(self.shared.wires.len()));
        Ok(())
    }

    fn load(&mut self, chunk: &[u8]) -> Result<(), Errno> {
        self.loader.as_mut().ok_or(Errno::EIO)?.push(chunk).map_err(|refusal| refusal.log())
    }

    fn load_finish(&mut self) -> Result<(), Fault> {
        let loader = self.loader.as_ref().ok_or(Fault::Broken(Errno::EIO))?;
        let bus = self.shared.bus.get().ok_or(Fault::Broken(Errno::EIO))?;
        let mut chip = self.shared.chip();
        let loaded = loader.finish(&chip.function).map_err(|refusal| Fault::Refused(refusal.log()))?;
        (chip.function, chip.ports) = loaded;
        chip.function.settle(&bus.interrupts);
        drop(chip);
        self.loader = None;
        Ok(())
    }

    fn load_abort(&mut self) {
        self.loader = None;
    }
}
