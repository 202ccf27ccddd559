//! TCP, as links of a move use it: congestion control and buffers.

use super::super::finding::{CONGESTION, TCP_BUFFERS};
use super::Look;
use crate::output;

/// The least that a round trip should be able to carry, in bytes; see the finding.
const BUFFER_LEAST: u64 = 4 << 20;

pub fn look(look: &mut Look<'_>) {
    let host = look.host;
    let set = host.text("proc/sys/net/ipv4/tcp_congestion_control");
    let available = host.text("proc/sys/net/ipv4/tcp_available_congestion_control");
    let or_unknown = |text: &Option<String>| text.clone().unwrap_or_else(|| "unknown".into());
    look.facts.add("TCP congestion", format!("{} (available: {})", or_unknown(&set), or_unknown(&available)));
    if let Some(set) = set.filter(|set| !set.starts_with("bbr")) {
        let has_bbr = available.is_some_and(|all| all.split_whitespace().any(|name| name.starts_with("bbr")));
        let there = if has_bbr { "is available" } else { "is not loaded" };
        look.find(&CONGESTION, format!("{set} is set, bbr {there}"));
    }
    // The least, the first and the most, in bytes (tcp.7).
    let most = |name: &str| -> Option<u64> {
        host.text(&format!("proc/sys/net/ipv4/{name}"))?.split_whitespace().nth(2)?.parse().ok()
    };
    let (out, back) = (most("tcp_wmem"), most("tcp_rmem"));
    let show = |bytes: Option<u64>| bytes.map_or("unknown".into(), output::bytes);
    look.facts.add("TCP buffers", format!("up to {} to send, {} to receive", show(out), show(back)));
    let small: Vec<String> = [("tcp_wmem", out), ("tcp_rmem", back)]
        .into_iter()
        .filter_map(|(name, bytes)| Some((name, bytes.filter(|bytes| *bytes < BUFFER_LEAST)?)))
        .map(|(name, bytes)| format!("net.ipv4.{name} ends at {}", output::bytes(bytes)))
        .collect();
    if !small.is_empty() {
        look.find(&TCP_BUFFERS, small.join(", "));
    }
}
