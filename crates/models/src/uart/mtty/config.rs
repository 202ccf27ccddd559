//! mtty's configuration space: 255 bytes, no capability, of which the addresses of the BARs and the
//! interrupt line can be written. Neither is part of the migration stream: a VMM keeps its own.

use limosa_protocol::Errno;

pub(super) const CONFIG_BYTES: usize = 255;

const BAR0: usize = 0x10;
const INTERRUPT_LINE: usize = 0x3c;

#[derive(Clone, Debug)]
pub(super) struct Config {
    now: [u8; CONFIG_BYTES],
    ports: usize,
}

impl Config {
    pub(super) fn new(ports: usize) -> Config {
        let mut now = [0; CONFIG_BYTES];
        let mut set = |at: usize, bytes: &[u8]| now[at..at + bytes.len()].copy_from_slice(bytes);
        // Vendor 4348 and device 3253 spell a name; so do the subsystem's.
        set(0x00, b"HCS2");
        // I/O space is on and DEVSEL# of medium speed, whatever is written.
        set(0x04, &[0x01, 0x00, 0x00, 0x02]);
        // Revision 10, class 070002: communication, serial, 16550-compatible.
        set(0x08, &[0x10, 0x02, 0x00, 0x07]);
        (0..ports).for_each(|port| set(BAR0 + 4 * port, &[1]));
        set(0x2c, b"HCS2");
        // Pin A.
        set(0x3d, &[1]);
        // The vendor's own.
        set(0x40, &[0x23, 0, 0, 0x80, 0x23, 0, 0, 0, 0x23, 0, 0, 0, 0x23]);
        set(0x60, b"PCI Serial/UART");
        Config { now, ports }
    }

    fn range(&self, offset: u64, bytes: usize) -> Result<std::ops::Range<usize>, Errno> {
        let start = usize::try_from(offset).map_err(|_| Errno::EINVAL)?;
        let end = start.checked_add(bytes).filter(|end| *end <= CONFIG_BYTES).ok_or(Errno::EINVAL)?;
        Ok(start..end)
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.copy_from_slice(&self.now[self.range(offset, data.len())?]);
        Ok(())
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        for (at, byte) in self.range(offset, data.len())?.zip(data) {
            let writable = self.writable(at);
            self.now[at] = self.now[at] & !writable | byte & writable;
        }
        Ok(())
    }

    fn writable(&self, at: usize) -> u8 {
        let bars = BAR0..BAR0 + 4 * self.ports;
        match at {
            INTERRUPT_LINE => 0xff,
            // A BAR addresses 8 bytes.
            _ if bars.contains(&at) && at.is_multiple_of(4) => 0xf8,
            _ if bars.contains(&at) => 0xff,
            _ => 0,
        }
    }
}
