//! Functions as sysfs shows them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::open;
use crate::os::Shared;

const FUNCTIONS: &str = "/sys/bus/pci/devices";

/// A function of the bus.
pub(crate) struct Function {
    folder: PathBuf,
    config: File,
}

impl Function {
    /// The one with this identity, as configuration space begins with it: answering, and a master of the bus.
    pub(crate) fn find(identity: u32) -> Result<Function, String> {
        let folders = fs::read_dir(FUNCTIONS).map_err(|error| format!("{FUNCTIONS}: {error}"))?;
        for folder in folders.filter_map(Result::ok).map(|entry| entry.path()) {
            let config = open(&format!("{}/config", folder.display()))?;
            let function = Function { folder, config };
            if function.read(0)? == identity {
                let command = function.read(4)? & 0xffff;
                function.write_u16(4, command as u16 | 6)?;
                return Ok(function);
            }
        }
        Err(format!("no PCI function {identity:#010x}"))
    }

    /// Its address on the bus.
    pub(crate) fn address(&self) -> String {
        self.folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// A BAR's registers.
    pub(crate) fn bar(&self, bar: u8, bytes: usize) -> Result<Shared, String> {
        Shared::registers(&open(&format!("{}/resource{bar}", self.folder.display()))?, bytes)
    }

    /// Where a capability is.
    pub(crate) fn capability(&self, id: u8) -> Result<u64, String> {
        let mut at = u64::from(self.read(0x34)? & 0xff);
        while at != 0 {
            let header = self.read(at)?;
            if header & 0xff == u32::from(id) {
                return Ok(at);
            }
            at = u64::from(header >> 8 & 0xff);
        }
        Err(format!("{} has no capability {id:#x}", self.address()))
    }

    pub(crate) fn read(&self, offset: u64) -> Result<u32, String> {
        let mut word = [0; 4];
        self.config.read_exact_at(&mut word, offset).map_err(|error| self.failed(&error))?;
        Ok(u32::from_le_bytes(word))
    }

    pub(crate) fn write(&self, offset: u64, value: u32) -> Result<(), String> {
        self.config.write_all_at(&value.to_le_bytes(), offset).map_err(|error| self.failed(&error))
    }

    pub(crate) fn write_u16(&self, offset: u64, value: u16) -> Result<(), String> {
        self.config.write_all_at(&value.to_le_bytes(), offset).map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &std::io::Error) -> String {
        format!("configuration space of {}: {error}", self.address())
    }
}
