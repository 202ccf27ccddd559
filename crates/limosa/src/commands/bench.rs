//! `limosa bench`: a device beside the floor.

use std::path::Path;

use std::os::fd::AsFd;

use crate::args;
use crate::exit::{self, Code};
use crate::open::Opening;
use crate::output::Output;

pub fn run(args: &args::Bench, opening: Opening<'_>, out: &Output) -> anyhow::Result<()> {
    if args.one_core {
        limosa_bench::pin_to_one_core()?;
    }
    let mut figures = Vec::new();
    let mut printed = Ok(());
    // People read what is done while the next figure is measured.
    let done = |figure: limosa_bench::Figure| {
        if printed.is_ok() {
            printed = out.text(|to| match figures.is_empty() {
                true => limosa_bench::print_head(to).and_then(|()| figure.print(to)),
                false => figure.print(to),
            });
        }
        figures.push(figure);
    };
    let device = opening.open(&args.device)?;
    if device.is_borrowed() {
        let why = "another process has it open, and a measurement stops and resets it";
        let what = format!("{}: {why}; end that process and name the device itself", args.device);
        return Err(exit::error(Code::Usage, what));
    }
    if let Some(kernel) = device.kernel() {
        limosa_bench::run_kernel(kernel, kernel.as_fd(), args.seconds, done)?;
    } else {
        // A server takes one client at a time, and others are measured too.
        drop(device);
        let socket = Path::new(&args.device);
        let connect = || Ok(opening.open(&args.device)?.into_device());
        let subject = limosa_bench::Subject::Device { socket, connect: &connect };
        limosa_bench::run(subject, args.seconds, done)?;
    }
    printed?;
    out.result(&figures, |_| Ok(()))
}
