//! Init of the lab's guests: takes requests over the second serial port and runs jobs that use served devices.

mod dma;
mod jobs;
mod kernel_log;
mod memory;
mod messages;
mod os;
mod pci;
mod serial;

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::process::ExitCode;

use limosa_qemu_lab::{Counts, Request};
use serde::Serialize;

use jobs::Jobs;
use kernel_log::KernelLog;

/// The port that QEMU connects to the test.
const PORT: &str = "/dev/ttyS1";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("limosa-qemu-guest: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    os::mount("proc", "/proc")?;
    os::mount("sysfs", "/sys")?;
    os::mount("devtmpfs", "/dev")?;
    let port = open(PORT)?;
    os::make_raw(&port)?;
    let mut writer = port.try_clone().map_err(|error| format!("{PORT}: {error}"))?;
    let mut log = KernelLog::from_now()?;
    let mut jobs = Jobs::default();
    answer(&mut writer, &Ok("ready"))?;
    for line in BufReader::new(port).lines() {
        let line = line.map_err(|error| format!("{PORT}: {error}"))?;
        let request = serde_json::from_str(&line).map_err(|error| format!("{error}: {line}"))?;
        match request {
            Request::Start(job) => answer(&mut writer, &jobs.start(job))?,
            Request::Advance(rounds) => {
                let jobs = jobs.advance(rounds);
                answer(&mut writer, &log.complaints().map(|complaints| Counts { jobs, complaints }))?;
            }
        }
    }
    Ok(())
}

fn answer<T: Serialize>(writer: &mut File, answer: &Result<T, String>) -> Result<(), String> {
    let line = serde_json::to_string(answer).map_err(|error| error.to_string())?;
    writeln!(writer, "{line}").map_err(|error| format!("{PORT}: {error}"))
}

/// Opens a file for reading and writing.
fn open(path: &str) -> Result<File, String> {
    OpenOptions::new().read(true).write(true).open(path).map_err(|error| format!("{path}: {error}"))
}
