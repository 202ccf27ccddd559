//! The model of a device that is served: its name and options.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use limosa_device::{SimpleMigration, SimpleModel};
use limosa_host::Named;
use limosa_models::synthetic::{Synthetic, SyntheticConfig};
use limosa_models::uart::{Line, Mtty, Uart};
use rustix::fs::{FileType, OFlags};

use super::config::Device;
use crate::args;
use crate::exit::{self, Code};

/// The model of this device. A model that `waits` accepts no input before it is started.
pub fn model(device: &Device, waits: bool, limit: Duration) -> anyhow::Result<Box<dyn SimpleModel>> {
    let Device { model, options: all, origin, .. } = device;
    let options = all.join(",");
    let usage_of =
        |origin: &str, error: &dyn std::fmt::Display| exit::error(Code::Usage, format!("{origin}: {error}"));
    let usage = |error: &dyn std::fmt::Display| usage_of(origin, error);
    Ok(match model {
        args::Model::Uart => {
            let (persona, lines): (Vec<_>, Vec<_>) =
                all.iter().partition(|option| option.as_str() == "as=mtty");
            let lines = lines
                .into_iter()
                .map(|option| line(device.origin_of(|own| own == option), option, limit))
                .collect::<anyhow::Result<Vec<_>>>()?;
            let lines = if lines.is_empty() { vec![Line::Echo] } else { lines };
            if persona.is_empty() {
                let mut uart = Uart::new(lines).map_err(|error| usage(&error))?;
                if waits {
                    // Input on the lines belongs to the old server until this one replaces it, which starts the model.
                    uart.stop().context("the serial port cannot be stopped")?;
                }
                Box::new(uart)
            } else if lines.iter().all(|line| matches!(line, Line::Echo)) {
                Box::new(Mtty::new(lines.len()).map_err(|error| usage(&error))?)
            } else {
                return Err(usage(&"as=mtty: its ports have nothing but line=echo at the other end"));
            }
        }
        args::Model::Synthetic => {
            let is_wrong = |option: &String| option.parse::<SyntheticConfig>().is_err();
            let config: SyntheticConfig =
                options.parse().map_err(|error| usage_of(device.origin_of(is_wrong), &error))?;
            Box::new(
                Synthetic::new(config)
                    .map_err(|error| exit::error(Code::Refused, format!("{origin}: {error}")))?,
            )
        }
    })
}

/// The other end of a serial port: `line=echo`, or a path.
fn line(origin: &str, option: &str, limit: Duration) -> anyhow::Result<Line> {
    let path = match option.split_once('=') {
        Some(("line", "echo")) => return Ok(Line::Echo),
        Some(("line", path)) if !path.is_empty() => path,
        _ => {
            return Err(exit::error(
                Code::Usage,
                format!("{origin} {option}: expected line=echo or line=PATH for each port, or as=mtty"),
            ));
        }
    };
    let failed = |error: std::io::Error| {
        let what = "expected a terminal, or a UNIX socket that somebody listens on";
        exit::error(Code::Unreachable, format!("{origin} {option}: {error}; {what}"))
    };
    let input = match limosa_host::resolve(Path::new(path)).map_err(failed)? {
        Named::Descriptor(descriptor) => {
            let borrowed = descriptor.borrow().map_err(failed)?;
            if !borrowed.readable || !borrowed.writable {
                return Err(failed(std::io::Error::other(
                    "its process does not hold it for reading and writing",
                )));
            }
            OwnedFd::from(borrowed)
        }
        Named::Entry(entry) => {
            let kind = FileType::from_raw_mode(entry.stat().map_err(failed)?.st_mode);
            match kind {
                FileType::Socket => match limosa_host::connect(Path::new(path), limit) {
                    Ok(socket) => socket.into_inner().into(),
                    Err(rustix::io::Errno::AGAIN) => {
                        let what = format!("its server has taken no connection within {limit:?}");
                        return Err(failed(std::io::Error::other(what)));
                    }
                    Err(error) => return Err(failed(error.into())),
                },
                // A terminal must not become this process's own, and its carrier is not waited for.
                _ => entry.open(OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK).map_err(failed)?.into(),
            }
        }
    };
    let output = input.try_clone().map_err(failed)?;
    Ok(Line::Fds { input, output })
}
