//! The clock: where time comes from, and whether anything keeps it right.

use super::super::finding::{CLOCK_OFF, CLOCK_SLOW};
use super::Look;

/// Sources that are read by leaving the processor's own counter: tens of times slower than that.
const SLOW: [&str; 5] = ["acpi_pm", "hpet", "jiffies", "refined-jiffies", "pit"];

pub fn look(look: &mut Look<'_>) {
    let source = look.host.text("sys/devices/system/clocksource/clocksource0/current_clocksource");
    look.facts.add("clock source", source.as_deref().unwrap_or("unknown"));
    if let Some(source) = source.filter(|source| SLOW.contains(&source.as_str())) {
        look.find(&CLOCK_SLOW, format!("the clock source is {source}"));
    }
    match look.host.system.clock() {
        Ok(clock) if clock.synchronised => {
            look.facts.add("wall clock", format!("synchronised, off by {:?} at most", clock.error_max));
        }
        Ok(_) => {
            look.facts.add("wall clock", "not synchronised");
            look.find(&CLOCK_OFF, "the kernel calls its clock unsynchronised");
        }
        Err(error) => look.facts.add("wall clock", format!("unknown: {error}")),
    }
}
