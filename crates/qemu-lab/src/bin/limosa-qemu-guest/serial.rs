//! A serial port that echoes, through Linux' driver.

use std::fs::{self, File};
use std::io::{Read, Write};

use crate::jobs::{Job, look_until};
use crate::pci::Function;
use crate::{open, os};

/// The card of `limosa serve uart`.
const IDENTITY: u32 = 0x0002_1b36;

pub(crate) struct Serial(File);

impl Serial {
    pub(crate) fn find() -> Result<Serial, String> {
        let address = Function::find(IDENTITY)?.address();
        let ports = fs::read_dir("/sys/class/tty").map_err(|error| format!("/sys/class/tty: {error}"))?;
        for port in ports.filter_map(Result::ok).map(|entry| entry.path()) {
            let is_ours = port
                .canonicalize()
                .is_ok_and(|path| path.components().any(|part| part.as_os_str() == address.as_str()));
            if is_ours {
                let name = port.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let terminal = open(&format!("/dev/{name}"))?;
                os::make_raw(&terminal)?;
                return Ok(Serial(terminal));
            }
        }
        Err(format!("Linux has no serial port of {address}"))
    }

    /// The bytes that came within the patience that a device is given.
    fn receive(&mut self, bytes: usize) -> Result<Vec<u8>, String> {
        let mut data = vec![0; bytes];
        let mut filled = 0;
        while filled < bytes {
            let terminal = &mut self.0;
            look_until("an echo", || is_readable(terminal))?;
            filled += terminal.read(&mut data[filled..]).map_err(|error| error.to_string())?;
        }
        Ok(data)
    }
}

impl Job for Serial {
    fn round(&mut self, round: u64) -> Result<(), String> {
        let sent = format!("round {round} of the quick brown fox\n").into_bytes();
        self.0.write_all(&sent).map_err(|error| error.to_string())?;
        let received = self.receive(sent.len())?;
        if received == sent {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&received).into_owned();
        // What is left of this round must not be taken for the next one's.
        while is_readable(&self.0) {
            let _ = self.0.read(&mut [0; 256]);
        }
        Err(format!("received {text:?}"))
    }
}

fn is_readable(terminal: &File) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let moment = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
    matches!(poll(&mut [PollFd::new(terminal, PollFlags::IN)], Some(&moment)), Ok(1))
}
