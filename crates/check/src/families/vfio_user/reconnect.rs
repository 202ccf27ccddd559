//! Clients that disconnect, reconnect, and connect while another client is served (`vfio-user.rst: Client Disconnection, Socket`).

use limosa_protocol::State;
use limosa_protocol::info::RegionInfo;
use limosa_vfio_user::codec::{Command, DmaUnmapMessage};
use rustix::event::PollFlags;
use zerocopy::IntoBytes;

use super::irqs::{an_irq, triggered, wired};
use super::migration::{is, set};
use super::{IOVA, PAGE, ask_map, ask_unmap, becomes_ready, is_ready, mapped, on_wire};
use crate::check::{Check, Family, Needs, Verdict, ensure, fail};
use crate::families::session::needs_of;
use crate::trial::Trial;
use crate::wire::{Answer, Message, Raw, info_request, next_client, version};

pub(super) fn checks() -> Vec<Check> {
    let none = Needs::empty();
    let kept = |state: State| {
        let id = format!("vfio-user.client-gone-in-{}", state.name().to_lowercase().replace('_', "-"));
        let clauses = &["gone.state", "gone.served"];
        Check::new(Family::VfioUser, id, needs_of(state) | Needs::WIRE, clauses, move |t| is_kept(t, state))
    };
    let mut checks: Vec<_> =
        State::ALL.into_iter().filter(|state| *state != State::Error).map(kept).collect();
    checks.extend([
        on_wire("vfio-user.client-gone-with-mappings", none, &["gone.mappings"], |t| {
            mapped(&mut Raw::open(t)?, IOVA, PAGE)?;
            let mut next = Raw::open_as(t, "next ")?;
            ask_map(&mut next, IOVA, PAGE)?.done("DMA_MAP of what the client before had mapped").map(drop)
        }),
        on_wire("vfio-user.client-gone-with-interrupts", none, &["gone.interrupts"], |t| {
            let mut raw = Raw::open(t)?;
            let irq = an_irq(&mut raw, 1)?;
            let old = wired(&mut raw, irq, 0)?;
            drop(raw);
            let mut next = Raw::open_as(t, "next ")?;
            let new = wired(&mut next, irq, 0)?;
            triggered(&mut next, irq, 0)?;
            ensure(becomes_ready(t, &new, PollFlags::IN)?, || {
                "the next client's eventfd was not signalled".into()
            })?;
            ensure(!is_ready(&old, PollFlags::IN)?, || {
                "the eventfd of a client that is gone was signalled".into()
            })
        }),
        on_wire("vfio-user.client-comes-and-goes", none, &["gone.served"], |t| {
            for _ in 0..16 {
                next_client(t)?;
            }
            Ok(())
        }),
        on_wire("vfio-user.client-gone-before-its-version", none, &["gone.served"], |t| {
            drop(Raw::dial(t, "")?);
            next_client(t)
        }),
        on_wire("vfio-user.second-client", none, &["second.harmless"], |t| second(t, &version(b"{}\0"))),
        on_wire("vfio-user.second-client-sends-nonsense", none, &["second.harmless"], |t| {
            second(t, &[0xff; 64])
        }),
        on_wire("vfio-user.second-client-goes", none, &["second.harmless"], |t| {
            let mut first = Raw::open(t)?;
            // Whether it can connect is the server's choice.
            let _ = Raw::dial(t, "second ");
            first.in_step()?;
            drop(first);
            next_client(t)
        }),
    ]);
    checks
}

/// Checks that the device is in the state in which its client left it, and that the next client is answered.
fn is_kept(t: &Trial, state: State) -> Verdict {
    let mut raw = Raw::open(t)?;
    if state != State::Running {
        set(&mut raw, state)?;
    }
    drop(raw);
    let mut next = Raw::open_as(t, "next ")?;
    is(&mut next, state)?;
    next.in_step()?;
    let region = RegionInfo { argsz: size_of::<RegionInfo>() as u32, ..RegionInfo::default() };
    let answer = next.ask(Command::DEVICE_GET_REGION_INFO, region.as_bytes())?;
    answer.answered(&format!("GET_REGION_INFO in {state}"))?;
    mapped(&mut next, IOVA, PAGE)?;
    match state {
        State::Running => Ok(()),
        // It was loaded in part: only a reset recovers it, which another check tests.
        State::Resuming => is(&mut next, state),
        _ => set(&mut next, State::Running).and_then(|()| is(&mut next, State::Running)),
    }
}

/// A second client, whatever it sends, does not disturb the first. It waits, is served too, or is refused; when the first
/// is gone, a client is served.
fn second(t: &Trial, body: &[u8]) -> Verdict {
    let mut first = Raw::open(t)?;
    mapped(&mut first, IOVA, PAGE)?;
    let mut second = match Raw::dial(t, "second ") {
        Ok(second) => second,
        // Refused at once.
        Err(_) => {
            first.in_step()?;
            drop(first);
            return next_client(t);
        }
    };
    let id = second.id();
    let mut open = second.send(&Message::command(id, Command::VERSION, body), &[])?;
    for _ in 0..8 {
        first.in_step()?;
    }
    let body = ask_unmap(&mut first, IOVA, PAGE)?.done("DMA_UNMAP of the first client's mapping")?;
    if body.fixed::<DmaUnmapMessage>()?.size != PAGE {
        return fail("the first client's mapping is gone, expected it to outlive a second client");
    }
    drop(first);
    if open {
        open = !matches!(second.answer(id, Command::VERSION)?, Answer::Closed | Answer::Refused(_));
    }
    if open {
        return second.ask(Command::DEVICE_GET_INFO, info_request().as_bytes())?.done("GET_INFO").map(drop);
    }
    drop(second);
    next_client(t)
}
