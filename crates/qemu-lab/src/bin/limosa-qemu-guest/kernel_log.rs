//! What the kernel complains of (`Documentation/ABI/testing/dev-kmsg`).

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

/// The level of a warning; what is worse has a lower one.
const WARNING: u32 = 4;

pub(crate) struct KernelLog {
    records: File,
    complaints: Vec<String>,
}

impl KernelLog {
    /// The log from here on.
    pub(crate) fn from_now() -> Result<KernelLog, String> {
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg");
        let mut records = opened.map_err(|error| format!("/dev/kmsg: {error}"))?;
        records.seek(SeekFrom::End(0)).map_err(|error| format!("/dev/kmsg: {error}"))?;
        Ok(KernelLog { records, complaints: Vec::new() })
    }

    /// All warnings and worse until now.
    pub(crate) fn complaints(&mut self) -> Result<Vec<String>, String> {
        let mut record = [0; 8192];
        loop {
            match self.records.read(&mut record) {
                Ok(bytes) => {
                    let text = String::from_utf8_lossy(&record[..bytes]).into_owned();
                    let number = text.split(',').next().and_then(|number| number.parse::<u32>().ok());
                    if number.is_some_and(|number| number & 7 <= WARNING) {
                        self.complaints
                            .push(text.split_once(';').map_or("", |(_, said)| said).trim().to_owned());
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(self.complaints.clone()),
                // A record was overwritten before it was read.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                Err(error) => return Err(format!("/dev/kmsg: {error}")),
            }
        }
    }
}
