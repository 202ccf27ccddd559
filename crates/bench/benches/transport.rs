//! The transport beside the floor, on one core: `cargo bench -p limosa-bench`.
//! LIMOSA_BENCH_SECONDS sets how long each contender is timed (0.5).

use std::io::Write;
use std::time::Duration;

use limosa_bench::{pin_to_one_core, print, run, run_if_child};

fn main() -> anyhow::Result<()> {
    if run_if_child()? {
        return Ok(());
    }
    // `cargo test --benches` only wants to know that it runs.
    let smoke = !std::env::args().any(|argument| argument == "--bench");
    let seconds =
        std::env::var("LIMOSA_BENCH_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(0.5);
    let each = if smoke { Duration::from_millis(2) } else { Duration::from_secs_f64(seconds) };
    pin_to_one_core()?;
    let mut figures = Vec::new();
    run(each, |figure| {
        eprint!(".");
        figures.push(figure);
    })?;
    eprintln!();
    print(&figures, &mut std::io::stdout().lock())?;
    std::io::stdout().flush()?;
    Ok(())
}
