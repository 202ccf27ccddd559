//! Limits of this process and of the system: locked memory, open files, mappings, huge pages.

use super::super::finding::{FILES_LOW, HUGE_PAGES_TAKEN, MAPS_LOW, MEMLOCK_LOW};
use super::{Host, Look};
use crate::output;

/// `capability.h: CAP_IPC_LOCK`.
const CAP_IPC_LOCK: u32 = 14;
/// `capability.h: CAP_SYS_PTRACE`.
pub const CAP_SYS_PTRACE: u32 = 19;

/// Less than any guest has.
const MEMLOCK_LEAST: u64 = 64 << 20;
/// The limit that most systems give a process.
const FILES_LEAST: u64 = 1024;
/// The kernel's default is 65530.
const MAPS_LEAST: u64 = 65_530;

/// A limit of a process (`proc_pid_limits.5`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    Unlimited,
    AtMost(u64),
}

/// The soft limit of this name.
fn limit(host: &Host<'_>, name: &str) -> Option<Limit> {
    let limits = host.text("proc/self/limits")?;
    let soft = limits.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?;
    match soft {
        "unlimited" => Some(Limit::Unlimited),
        number => number.parse().ok().map(Limit::AtMost),
    }
}

/// Whether this process has a capability (`proc_pid_status.5`: CapEff).
pub fn has_capability(host: &Host<'_>, number: u32) -> bool {
    let status = host.text("proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> number & 1 == 1
}

fn show(limit: Option<Limit>, print: impl Fn(u64) -> String) -> String {
    match limit {
        None => "unknown".into(),
        Some(Limit::Unlimited) => "unlimited".into(),
        Some(Limit::AtMost(most)) => print(most),
    }
}

pub fn look(look: &mut Look<'_>) {
    let host = look.host;
    let (locked, files) = (limit(host, "Max locked memory"), limit(host, "Max open files"));
    let may_lock = has_capability(host, CAP_IPC_LOCK);
    let note = if may_lock { ", not counted with CAP_IPC_LOCK" } else { "" };
    look.facts.add("locked memory", show(locked, output::bytes) + note);
    if let Some(Limit::AtMost(most)) = locked
        && most < MEMLOCK_LEAST
        && !may_lock
    {
        look.find(&MEMLOCK_LOW, format!("this process may lock {}", output::bytes(most)));
    }
    look.facts.add("open files", show(files, |most| most.to_string()));
    if let Some(Limit::AtMost(most)) = files
        && most < FILES_LEAST
    {
        look.find(&FILES_LOW, format!("this process may have {most} files open"));
    }
    let maps = host.number("proc/sys/vm/max_map_count");
    look.facts.add("mappings", show(maps.map(Limit::AtMost), |most| most.to_string()));
    if let Some(most) = maps.filter(|most| *most < MAPS_LEAST) {
        look.find(&MAPS_LOW, format!("vm.max_map_count is {most}"));
    }
    huge_pages(look);
}

/// `Documentation/admin-guide/mm/hugetlbpage.rst`.
fn huge_pages(look: &mut Look<'_>) {
    let host = look.host;
    let folder = "sys/kernel/mm/hugepages";
    let mut sizes = Vec::new();
    for name in host.entries(folder) {
        let number = |attribute: &str| host.number(&format!("{folder}/{name}/{attribute}"));
        let (Some(all), Some(free)) = (number("nr_hugepages"), number("free_hugepages")) else { continue };
        let size = name.trim_start_matches("hugepages-").to_owned();
        let free = free.saturating_sub(number("resv_hugepages").unwrap_or(0));
        if all > 0 && free == 0 {
            look.find(&HUGE_PAGES_TAKEN, format!("all {all} huge pages of {size} are taken or promised"));
        }
        sizes.push(format!("{size}: {free} of {all} free"));
    }
    look.facts.add("huge pages", if sizes.is_empty() { "none".into() } else { sizes.join(", ") });
}
