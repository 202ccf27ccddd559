//! `limosa bench`: a device beside the floor.

use std::path::Path;
use std::time::Duration;

use crate::args;
use crate::open;
use crate::output::Output;

pub fn run(args: &args::Bench, limit: Duration, out: &Output) -> anyhow::Result<()> {
    if args.one_core {
        limosa_bench::pin_to_one_core()?;
    }
    let socket = Path::new(&args.device);
    let mut figures = Vec::new();
    let connect = || open::device(&args.device, limit);
    let subject = limosa_bench::Subject::Device { socket, connect: &connect };
    limosa_bench::run(subject, args.seconds, |figure| figures.push(figure))?;
    out.result(&figures, |to| limosa_bench::print(&figures, to))
}
