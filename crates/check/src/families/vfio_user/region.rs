//! Accesses of regions (`vfio-user.rst: VFIO_USER_REGION_READ, VFIO_USER_REGION_WRITE, VFIO_USER_REGION_WRITE_MULTI`).

use limosa_protocol::info::{RegionFlags, RegionInfo};
use limosa_vfio_user::codec::{Command, RegionAccess, RegionWriteMulti, SingleWrite};
use zerocopy::{FromBytes, IntoBytes};

use super::info::find_region;
use super::on_connection;
use crate::check::{Check, Family, Needs, Stop, Verdict, ensure, skip};
use crate::trial::Trial;
use crate::wire::{Answer, Raw};

pub(super) fn checks() -> Vec<Check> {
    let none = Needs::empty();
    vec![
        on_connection("vfio-user.region-read", none, &["region.reply"], |_, raw| {
            let region = readable(raw, 4)?;
            let access = RegionAccess { offset: 0, region: region.index, count: 4 };
            let body =
                raw.ask(Command::REGION_READ, access.as_bytes())?.done(&named("REGION_READ", access))?;
            echoes(&body.bytes, access, 4)
        }),
        on_connection("vfio-user.region-write", none, &["region.reply"], |_, raw| {
            // What was there is written again.
            let region = find_region(raw, RegionFlags::READ | RegionFlags::WRITE, 4)?;
            let access = RegionAccess { offset: 0, region: region.index, count: 4 };
            let body =
                raw.ask(Command::REGION_READ, access.as_bytes())?.done(&named("REGION_READ", access))?;
            let data = body.bytes.get(RegionAccess::BYTES..).unwrap_or_default();
            let body = raw
                .ask(Command::REGION_WRITE, &[access.as_bytes(), data].concat())?
                .done(&named("REGION_WRITE", access))?;
            echoes(&body.bytes, access, 0)
        }),
        on_connection("vfio-user.region-read-of-nothing", none, &["wire.answered"], |_, raw| {
            let region = readable(raw, 4)?;
            let access = RegionAccess { offset: 0, region: region.index, count: 0 };
            if let Answer::Reply(body) = raw.ask(Command::REGION_READ, access.as_bytes())? {
                echoes(&body.bytes, access, 0)?;
            }
            raw.in_step()
        }),
        bad_read("vfio-user.region-read-over-the-end", "region.bounds", |region, _| RegionAccess {
            offset: region.size - 1,
            region: region.index,
            count: 4,
        }),
        bad_read("vfio-user.region-read-at-the-end", "region.bounds", |region, _| RegionAccess {
            offset: region.size,
            region: region.index,
            count: 4,
        }),
        bad_read("vfio-user.region-read-overflow", "region.bounds", |region, _| RegionAccess {
            offset: u64::MAX - 1,
            region: region.index,
            count: 4,
        }),
        bad_read("vfio-user.region-read-of-no-region", "region.bounds", |_, _| RegionAccess {
            offset: 0,
            region: u32::MAX,
            count: 4,
        }),
        bad_read("vfio-user.region-read-beyond-the-limit", "region.limit", |region, limit| RegionAccess {
            offset: 0,
            region: region.index,
            count: u32::try_from(limit).unwrap_or(u32::MAX).saturating_add(1),
        }),
        bad_read("vfio-user.region-read-of-everything", "region.limit", |region, _| RegionAccess {
            offset: 0,
            region: region.index,
            count: u32::MAX,
        }),
        bad_write("vfio-user.region-write-over-the-end", "region.bounds", |region| {
            (RegionAccess { offset: region.size - 1, region: region.index, count: 4 }, 4)
        }),
        bad_write("vfio-user.region-write-overflow", "region.bounds", |region| {
            (RegionAccess { offset: u64::MAX - 1, region: region.index, count: 4 }, 4)
        }),
        bad_write("vfio-user.region-write-of-no-region", "region.bounds", |_| {
            (RegionAccess { offset: 0, region: u32::MAX, count: 4 }, 4)
        }),
        bad_write("vfio-user.region-write-of-less-data", "region.data", |region| {
            (RegionAccess { offset: 0, region: region.index, count: 4 }, 2)
        }),
        bad_write("vfio-user.region-write-of-no-data", "region.data", |region| {
            (RegionAccess { offset: 0, region: region.index, count: u32::MAX }, 0)
        }),
        on_connection("vfio-user.region-multi-of-fewer", none, &["region.multi"], |_, raw| {
            let write = multi(raw)?;
            bad_multi(raw, 2, &[write])
        }),
        on_connection("vfio-user.region-multi-of-very-many", none, &["region.multi"], |_, raw| {
            let write = multi(raw)?;
            bad_multi(raw, u64::MAX / 8, &[write])
        }),
        on_connection("vfio-user.region-multi-of-nine-bytes", none, &["region.multi"], |_, raw| {
            let write = multi(raw)?;
            bad_multi(raw, 1, &[SingleWrite { count: 9, ..write }])
        }),
        on_connection("vfio-user.region-multi-beyond", none, &["region.multi"], |_, raw| {
            let write = multi(raw)?;
            bad_multi(raw, 1, &[SingleWrite { offset: u64::MAX - 1, ..write }])
        }),
    ]
}

fn readable(raw: &mut Raw, bytes_min: u64) -> Result<RegionInfo, Stop> {
    find_region(raw, RegionFlags::READ, bytes_min)
}

/// An access, as a message names it.
fn named(what: &str, RegionAccess { offset, region, count }: RegionAccess) -> String {
    format!("{what} of {count} bytes at {offset:#x} of region {region}")
}

/// The reply echoes the request, and carries `data` bytes of data.
fn echoes(reply: &[u8], asked: RegionAccess, data: usize) -> Verdict {
    let expected = RegionAccess::BYTES + data;
    let answered = || named("the reply to an access", asked);
    ensure(reply.len() == expected, || {
        format!("{} has {} bytes, expected {expected}", answered(), reply.len())
    })?;
    ensure(reply.starts_with(asked.as_bytes()), || match RegionAccess::read_from_prefix(reply) {
        Ok((other, _)) => format!("{} is {}", answered(), named("that to one", other)),
        Err(_) => format!("{} has {} bytes", answered(), reply.len()),
    })
}

fn bad_read(id: &'static str, clause: &'static str, access: fn(RegionInfo, u64) -> RegionAccess) -> Check {
    Check::new(Family::VfioUser, id, Needs::WIRE, &[clause, "wire.answered"], move |t: &mut Trial| {
        let mut raw = Raw::open(t)?;
        let region = readable(&mut raw, 4)?;
        let limit = raw.server.max_data_xfer_size.unwrap_or(1 << 20);
        let access = access(region, limit);
        let RegionAccess { offset, region, count } = access;
        let what = format!("REGION_READ of {count} bytes at {offset:#x} of region {region}");
        raw.ask(Command::REGION_READ, access.as_bytes())?.refused(&what)?;
        raw.in_step()
    })
}

fn bad_write(
    id: &'static str,
    clause: &'static str,
    access: fn(RegionInfo) -> (RegionAccess, usize),
) -> Check {
    Check::new(Family::VfioUser, id, Needs::WIRE, &[clause, "wire.answered"], move |t: &mut Trial| {
        let mut raw = Raw::open(t)?;
        let (access, data) = access(find_region(&mut raw, RegionFlags::WRITE, 4)?);
        let RegionAccess { offset, region, count } = access;
        let what = format!(
            "REGION_WRITE of {count} bytes at {offset:#x} of region {region}, with {data} bytes of data"
        );
        raw.ask(Command::REGION_WRITE, &[access.as_bytes(), &vec![0; data]].concat())?.refused(&what)?;
        raw.in_step()
    })
}

/// A write that could be one of many, if the server takes such.
fn multi(raw: &mut Raw) -> Result<SingleWrite, Stop> {
    if raw.server.write_multiple != Some(true) {
        return skip("the server does not take REGION_WRITE_MULTI");
    }
    let region = find_region(raw, RegionFlags::WRITE, 4)?;
    Ok(SingleWrite { offset: 0, region: region.index, count: 1, data: [0; 8] })
}

fn bad_multi(raw: &mut Raw, count: u64, writes: &[SingleWrite]) -> Verdict {
    let body = [RegionWriteMulti { count }.as_bytes(), writes.as_bytes()].concat();
    let what = format!("REGION_WRITE_MULTI of {count} writes, {} there", writes.len());
    raw.ask(Command::REGION_WRITE_MULTI, &body)?.refused(&what)?;
    raw.in_step()
}
