//! Mappings (`vfio-user.rst: VFIO_USER_DMA_MAP, VFIO_USER_DMA_UNMAP`).

use std::os::fd::AsFd;

use limosa_protocol::Errno;
use limosa_vfio_user::codec::{Command, DirtyBitmap, DmaMapMessage, DmaUnmapMessage};
use zerocopy::IntoBytes;

use super::{IOVA, PAGE, ask_map, ask_unmap, map, mapped, memory, on_connection, unmap};
use crate::check::{Check, Family, Needs, Stop, Verdict, ensure};
use crate::wire::{Answer, Raw};

pub(super) fn checks() -> Vec<Check> {
    let none = Needs::empty();
    vec![
        on_connection("vfio-user.map-and-unmap", none, &["map.map", "unmap.exact"], |_, raw| {
            let memory = memory(PAGE)?;
            let body = raw
                .ask_with(Command::DMA_MAP, map(IOVA, PAGE).as_bytes(), &[memory.as_fd()])?
                .done("DMA_MAP of shared memory")?;
            ensure(body.bytes.is_empty(), || {
                format!("DMA_MAP's reply has {} bytes, expected none", body.bytes.len())
            })?;
            let body = ask_unmap(raw, IOVA, PAGE)?.done("DMA_UNMAP of it")?;
            let entry: DmaUnmapMessage = body.fixed()?;
            ensure((entry.address, entry.size) == (IOVA, PAGE), || {
                format!("DMA_UNMAP's reply names {:#x} bytes at {:#x}", entry.size, entry.address)
            })
        }),
        on_connection("vfio-user.map-without-an-fd", none, &["map.map"], |_, raw| {
            mapped(raw, IOVA, PAGE)?;
            ask_unmap(raw, IOVA, PAGE)?.done("DMA_UNMAP of it").map(drop)
        }),
        on_connection("vfio-user.map-of-neighbours", none, &["map.map"], |_, raw| {
            mapped(raw, IOVA, PAGE)?;
            mapped(raw, IOVA + PAGE, PAGE)?;
            mapped(raw, IOVA - PAGE, PAGE)
        }),
        exists("vfio-user.map-twice", 4, 4),
        exists("vfio-user.map-over-the-front", 3, 2),
        exists("vfio-user.map-over-the-back", 7, 2),
        exists("vfio-user.map-over-the-middle", 5, 1),
        exists("vfio-user.map-round-another", 2, 8),
        refused("vfio-user.map-of-nothing", "map.range", map(IOVA, 0)),
        refused("vfio-user.map-beyond-the-end", "map.range", map(u64::MAX - PAGE + 1, 2 * PAGE)),
        refused("vfio-user.map-of-everything-and-more", "map.range", map(2 * PAGE, u64::MAX - PAGE + 1)),
        refused("vfio-user.map-for-nothing", "map.flags", DmaMapMessage { flags: 0, ..map(IOVA, PAGE) }),
        on_connection("vfio-user.map-of-an-odd-offset", none, &["wire.answered"], |_, raw| {
            let memory = memory(4 * PAGE)?;
            let body = DmaMapMessage { offset: 512, ..map(IOVA, PAGE) };
            raw.ask_with(Command::DMA_MAP, body.as_bytes(), &[memory.as_fd()])?
                .answered("DMA_MAP of an offset that is not aligned")?;
            raw.in_step()
        }),
        with_memory(
            "vfio-user.map-of-an-offset-beyond-the-end",
            "map.range",
            DmaMapMessage { offset: u64::MAX - PAGE + 1, ..map(IOVA, 2 * PAGE) },
        ),
        on_connection("vfio-user.map-of-more-than-the-file", none, &["wire.answered"], |_, raw| {
            let memory = memory(PAGE)?;
            let body = map(IOVA, 1 << 20);
            let answer = raw.ask_with(Command::DMA_MAP, body.as_bytes(), &[memory.as_fd()])?;
            answer.answered("DMA_MAP of more than its file has")?;
            raw.in_step()
        }),
        on_connection("vfio-user.unmap-twice", none, &["unmap.exact"], |_, raw| {
            mapped(raw, IOVA, PAGE)?;
            ask_unmap(raw, IOVA, PAGE)?.done("DMA_UNMAP")?;
            unmaps_nothing(raw, IOVA, PAGE)
        }),
        on_connection("vfio-user.unmap-of-what-is-not-mapped", none, &["unmap.exact"], |_, raw| {
            unmaps_nothing(raw, IOVA, PAGE)
        }),
        part("vfio-user.unmap-of-the-front", 4, 1),
        part("vfio-user.unmap-of-the-back", 7, 1),
        part("vfio-user.unmap-of-the-middle", 5, 2),
        part("vfio-user.unmap-over-the-end", 7, 4),
        on_connection("vfio-user.unmap-of-two", none, &["unmap.exact"], |_, raw| {
            mapped(raw, IOVA, PAGE)?;
            mapped(raw, IOVA + PAGE, PAGE)?;
            let gone = unmapped(raw, IOVA, 2 * PAGE)?;
            ensure(gone == 0 || gone == 2 * PAGE, || {
                format!(
                    "DMA_UNMAP of two mappings says {gone:#x} bytes, expected a refusal or {:#x}",
                    2 * PAGE
                )
            })?;
            for address in [IOVA, IOVA + PAGE] {
                is_mapped(raw, address, PAGE, gone == 0)?;
            }
            Ok(())
        }),
        on_connection("vfio-user.unmap-of-nothing", none, &["unmap.exact"], |_, raw| {
            mapped(raw, IOVA, PAGE)?;
            unmaps_nothing(raw, IOVA, 0)?;
            is_mapped(raw, IOVA, PAGE, true)
        }),
        on_connection("vfio-user.unmap-beyond-the-end", none, &["unmap.exact"], |_, raw| {
            mapped(raw, IOVA, PAGE)?;
            unmaps_nothing(raw, u64::MAX - PAGE + 1, 2 * PAGE)?;
            is_mapped(raw, IOVA, PAGE, true)
        }),
        on_connection(
            "vfio-user.unmap-with-a-bitmap-while-nothing-is-logged",
            none,
            &["wire.answered"],
            |_, raw| {
                mapped(raw, IOVA, PAGE)?;
                let bitmap = DirtyBitmap { page_size: PAGE, size: 8 };
                let unmap = DmaUnmapMessage { argsz: 48, flags: 1, ..unmap(IOVA, PAGE) };
                let body = [unmap.as_bytes(), bitmap.as_bytes()].concat();
                raw.ask(Command::DMA_UNMAP, &body)?.answered("DMA_UNMAP with GET_DIRTY_BITMAP")?;
                raw.in_step()
            },
        ),
    ]
}

/// A map over one of four pages from page 4 on, pages counted from [`IOVA`].
fn exists(id: &'static str, from: u64, pages: u64) -> Check {
    Check::new(Family::VfioUser, id, Needs::WIRE, &["map.exists"], move |t| {
        let mut raw = Raw::open(t)?;
        mapped(&mut raw, IOVA + 4 * PAGE, 4 * PAGE)?;
        let answer = ask_map(&mut raw, IOVA + from * PAGE, pages * PAGE)?;
        answer.refused_with("DMA_MAP over a mapping", Errno::EEXIST)?;
        raw.in_step()
    })
}

/// Checks that a map is refused, and maps nothing.
fn refused(id: &'static str, clause: &'static str, map: DmaMapMessage) -> Check {
    Check::new(Family::VfioUser, id, Needs::WIRE, &[clause, "wire.answered"], move |t| {
        let mut raw = Raw::open(t)?;
        raw.ask(Command::DMA_MAP, map.as_bytes())?.refused("DMA_MAP")?;
        mapped(&mut raw, IOVA, PAGE)
    })
}

/// The same of shared memory.
fn with_memory(id: &'static str, clause: &'static str, map: DmaMapMessage) -> Check {
    Check::new(Family::VfioUser, id, Needs::WIRE, &[clause, "wire.answered"], move |t| {
        let mut raw = Raw::open(t)?;
        let memory = memory(4 * PAGE)?;
        raw.ask_with(Command::DMA_MAP, map.as_bytes(), &[memory.as_fd()])?.refused("DMA_MAP")?;
        mapped(&mut raw, IOVA, PAGE)
    })
}

/// Checks that an unmap of part of a mapping is refused, and leaves the mapping.
fn part(id: &'static str, from: u64, pages: u64) -> Check {
    Check::new(Family::VfioUser, id, Needs::WIRE, &["unmap.exact", "wire.answered"], move |t| {
        let mut raw = Raw::open(t)?;
        mapped(&mut raw, IOVA + 4 * PAGE, 4 * PAGE)?;
        unmaps_nothing(&mut raw, IOVA + from * PAGE, pages * PAGE)?;
        is_mapped(&mut raw, IOVA + 4 * PAGE, 4 * PAGE, true)
    })
}

/// The number of bytes that an unmap reports; 0 for a refusal.
fn unmapped(raw: &mut Raw, iova: u64, size: u64) -> Result<u64, Stop> {
    match ask_unmap(raw, iova, size)? {
        Answer::Reply(body) => Ok(body.fixed::<DmaUnmapMessage>()?.size),
        Answer::Refused(_) => Ok(0),
        Answer::Closed => Err(Stop::Fail("the connection was closed by a DMA_UNMAP".into())),
    }
}

/// As in the kernel, an unmap that finds no mapping may succeed, and reports 0 bytes.
fn unmaps_nothing(raw: &mut Raw, iova: u64, size: u64) -> Verdict {
    let gone = unmapped(raw, iova, size)?;
    ensure(gone == 0, || {
        format!(
            "DMA_UNMAP of {size:#x} bytes at {iova:#x} says that {gone:#x} are gone, expected a refusal or 0"
        )
    })
}

/// The reply to an unmap shows whether it was mapped. A second map does not show it, since some servers accept a map twice.
fn is_mapped(raw: &mut Raw, iova: u64, size: u64, expected: bool) -> Verdict {
    let found = unmapped(raw, iova, size)? == size;
    ensure(found == expected, || {
        let words = |mapped: bool| if mapped { "mapped" } else { "not mapped" };
        format!("{iova:#x} is {}, expected {}", words(found), words(expected))
    })
}
