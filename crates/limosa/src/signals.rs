//! SIGINT and SIGTERM: the first asks to end, the second ends.

use anyhow::Context;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

/// Calls `end` on a thread of its own at the first signal. The second one has its default effect.
pub fn on_end(end: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot handle signals")?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut end = Some(end);
            for signal in signals.forever() {
                match end.take() {
                    Some(end) => end(),
                    // It only fails for signals that do not exist.
                    None => drop(emulate_default_handler(signal)),
                }
            }
        })
        .context("cannot start a thread for signals")?;
    Ok(())
}
