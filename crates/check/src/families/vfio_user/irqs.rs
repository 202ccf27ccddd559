//! Interrupts (`vfio-user.rst: VFIO_USER_DEVICE_SET_IRQS`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use limosa_protocol::info::{DeviceInfo, IRQ_INDEXES_MAX, IrqFlags, IrqInfo, IrqSet, IrqSetFlags};
use limosa_vfio_user::codec::Command;
use rustix::event::PollFlags;
use zerocopy::IntoBytes;

use super::{becomes_ready, event, host, is_ready, on_connection};
use crate::check::{Check, Family, Needs, Stop, Verdict, ensure, skip};
use crate::trial::Trial;
use crate::wire::{Answer, Raw};

const NONE: IrqSetFlags = IrqSetFlags::DATA_NONE;
const BOOL: IrqSetFlags = IrqSetFlags::DATA_BOOL;
const EVENTFD: IrqSetFlags = IrqSetFlags::DATA_EVENTFD;
const MASK: IrqSetFlags = IrqSetFlags::ACTION_MASK;
pub(super) const TRIGGER: IrqSetFlags = IrqSetFlags::ACTION_TRIGGER;

pub(super) fn checks() -> Vec<Check> {
    let none = Needs::empty();
    let flags =
        |id: &'static str, flags: IrqSetFlags| refused(id, "irqs.flags", move |irq| set(irq, flags, 0, 1));
    vec![
        on_connection("vfio-user.irqs-wire-and-take-away", none, &["irqs.wire"], |_, raw| {
            let irq = an_irq(raw, 1)?;
            let fd = event()?;
            ask(raw, set(irq, EVENTFD | TRIGGER, 0, 1), &[], &[fd.as_fd()])?
                .done("SET_IRQS with an eventfd")?;
            ask(raw, set(irq, EVENTFD | TRIGGER, 0, 1), &[], &[])?
                .done("SET_IRQS without the eventfds")
                .map(drop)
        }),
        on_connection("vfio-user.irqs-disable", none, &["irqs.wire"], |_, raw| {
            let irq = an_irq(raw, 1)?;
            let fd = event()?;
            ask(raw, set(irq, EVENTFD | TRIGGER, 0, 1), &[], &[fd.as_fd()])?
                .done("SET_IRQS with an eventfd")?;
            ask(raw, set(irq, NONE | TRIGGER, 0, 0), &[], &[])?.done("SET_IRQS of count 0").map(drop)
        }),
        on_connection("vfio-user.irqs-trigger", none, &["irqs.trigger"], |t, raw| {
            let irq = an_irq(raw, 1)?;
            let fd = wired(raw, irq, 0)?;
            triggered(raw, irq, 0)?;
            ensure(becomes_ready(t, &fd, PollFlags::IN)?, || {
                "a vector that was triggered did not signal its eventfd".into()
            })
        }),
        on_connection("vfio-user.irqs-trigger-by-bools", none, &["irqs.trigger"], |t, raw| {
            let irq = an_irq(raw, 2)?;
            let (first, second) = (wired(raw, irq, 0)?, wired(raw, irq, 1)?);
            if !matches!(ask(raw, set(irq, BOOL | TRIGGER, 0, 2), &[0, 1], &[])?, Answer::Reply(_)) {
                return skip("the device is not triggered by bools");
            }
            ensure(becomes_ready(t, &second, PollFlags::IN)?, || {
                "the vector whose bool is 1 was silent".into()
            })?;
            ensure(!is_ready(&first, PollFlags::IN)?, || "the vector whose bool is 0 was signalled".into())
        }),
        on_connection("vfio-user.irqs-disabled-is-silent", none, &["irqs.trigger"], |t, raw| {
            let irq = an_irq(raw, 1)?;
            let old = wired(raw, irq, 0)?;
            ask(raw, set(irq, NONE | TRIGGER, 0, 0), &[], &[])?.done("SET_IRQS of count 0")?;
            // It may be obeyed or refused, but has to be answered.
            ask(raw, set(irq, NONE | TRIGGER, 0, 1), &[], &[])?.answered("a trigger of a disabled index")?;
            let new = wired(raw, irq, 0)?;
            triggered(raw, irq, 0)?;
            ensure(becomes_ready(t, &new, PollFlags::IN)?, || "the vector wired anew was silent".into())?;
            ensure(!is_ready(&old, PollFlags::IN)?, || "an eventfd of a disabled index was signalled".into())
        }),
        refused("vfio-user.irqs-index-unknown", "irqs.range", |irq| {
            set(IrqInfo { index: 4096, ..irq }, NONE | TRIGGER, 0, 1)
        }),
        refused("vfio-user.irqs-vectors-beyond", "irqs.range", |irq| set(irq, NONE | TRIGGER, irq.count, 1)),
        refused("vfio-user.irqs-vectors-over-the-end", "irqs.range", |irq| {
            set(irq, NONE | TRIGGER, irq.count - 1, 2)
        }),
        refused("vfio-user.irqs-vectors-overflow", "irqs.range", |irq| set(irq, NONE | TRIGGER, u32::MAX, 2)),
        refused("vfio-user.irqs-eventfds-beyond", "irqs.range", |irq| {
            set(irq, EVENTFD | TRIGGER, irq.count, 1)
        }),
        flags("vfio-user.irqs-no-flags", IrqSetFlags::empty()),
        flags("vfio-user.irqs-no-action", NONE),
        flags("vfio-user.irqs-no-data", TRIGGER),
        flags("vfio-user.irqs-two-actions", NONE.union(TRIGGER).union(MASK)),
        flags("vfio-user.irqs-two-kinds-of-data", NONE.union(BOOL).union(TRIGGER)),
        flags(
            "vfio-user.irqs-flags-beyond",
            NONE.union(TRIGGER).union(IrqSetFlags::from_bits_retain(1 << 9)),
        ),
        on_connection("vfio-user.irqs-fewer-eventfds-than-vectors", none, &["irqs.fds"], |_, raw| {
            let irq = an_irq(raw, 2)?;
            let fd = event()?;
            ask(raw, set(irq, EVENTFD | TRIGGER, 0, 2), &[], &[fd.as_fd()])?
                .refused("SET_IRQS of 2 vectors with 1 eventfd")?;
            raw.in_step()
        }),
        on_connection("vfio-user.irqs-more-eventfds-than-vectors", none, &["irqs.fds"], |_, raw| {
            let irq = an_irq(raw, 1)?;
            let (one, other) = (event()?, event()?);
            ask(raw, set(irq, EVENTFD | TRIGGER, 0, 1), &[], &[one.as_fd(), other.as_fd()])?
                .refused("SET_IRQS of 1 vector with 2 eventfds")?;
            raw.in_step()
        }),
        on_connection("vfio-user.irqs-no-eventfd", none, &["wire.answered"], |_, raw| {
            let irq = an_irq(raw, 1)?;
            let (_read, write) = host(rustix::pipe::pipe())?;
            ask(raw, set(irq, EVENTFD | TRIGGER, 0, 1), &[], &[write.as_fd()])?
                .answered("SET_IRQS with a pipe")?;
            ask(raw, set(irq, NONE | TRIGGER, 0, 1), &[], &[])?.answered("a trigger of it")?;
            raw.in_step()
        }),
        on_connection("vfio-user.irqs-fewer-bools-than-vectors", none, &["irqs.bools"], |_, raw| {
            let irq = an_irq(raw, 2)?;
            ask(raw, set(irq, BOOL | TRIGGER, 0, 2), &[1], &[])?
                .refused("SET_IRQS of 2 vectors with 1 bool")?;
            raw.in_step()
        }),
    ]
}

/// Checks that a SET_IRQS, made for an index of the device, is refused.
fn refused(
    id: &'static str,
    clause: &'static str,
    set: impl Fn(IrqInfo) -> IrqSet + Send + Sync + 'static,
) -> Check {
    Check::new(Family::VfioUser, id, Needs::WIRE, &[clause, "wire.answered"], move |t: &mut Trial| {
        let mut raw = Raw::open(t)?;
        let set = set(an_irq(&mut raw, 1)?);
        ask(&mut raw, set, &[], &[])?.refused("SET_IRQS")?;
        raw.in_step()
    })
}

pub(super) fn set(irq: IrqInfo, flags: IrqSetFlags, start: u32, count: u32) -> IrqSet {
    IrqSet { argsz: size_of::<IrqSet>() as u32, flags: flags.bits(), index: irq.index, start, count }
}

pub(super) fn ask(
    raw: &mut Raw,
    mut set: IrqSet,
    bools: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<Answer, Stop> {
    set.argsz += bools.len() as u32;
    raw.ask_with(Command::DEVICE_SET_IRQS, &[set.as_bytes(), bools].concat(), fds)
}

/// An interrupt index that signals eventfds, with `vectors_min` vectors or more.
pub(super) fn an_irq(raw: &mut Raw, vectors_min: u32) -> Result<IrqInfo, Stop> {
    let body = raw.ask(Command::DEVICE_GET_INFO, crate::wire::info_request().as_bytes())?.done("GET_INFO")?;
    for index in 0..body.fixed::<DeviceInfo>()?.num_irqs.min(IRQ_INDEXES_MAX) {
        let request = IrqInfo { argsz: size_of::<IrqInfo>() as u32, index, ..IrqInfo::default() };
        if let Answer::Reply(body) = raw.ask(Command::DEVICE_GET_IRQ_INFO, request.as_bytes())? {
            let irq: IrqInfo = body.fixed()?;
            let signals = IrqFlags::from_bits_retain(irq.flags).contains(IrqFlags::EVENTFD);
            if signals && irq.count >= vectors_min {
                return Ok(IrqInfo { index, ..irq });
            }
        }
    }
    skip(format!("the device has no interrupt index of {vectors_min} vectors with eventfds"))
}

/// Wires a vector to a new eventfd.
pub(super) fn wired(raw: &mut Raw, irq: IrqInfo, vector: u32) -> Result<OwnedFd, Stop> {
    let fd = event()?;
    ask(raw, set(irq, EVENTFD | TRIGGER, vector, 1), &[], &[fd.as_fd()])?.done("SET_IRQS with an eventfd")?;
    Ok(fd)
}

/// Triggers a vector.
pub(super) fn triggered(raw: &mut Raw, irq: IrqInfo, vector: u32) -> Verdict {
    match ask(raw, set(irq, NONE | TRIGGER, vector, 1), &[], &[])? {
        Answer::Reply(_) => Ok(()),
        _ => skip("the device's interrupts cannot be triggered by its client"),
    }
}
