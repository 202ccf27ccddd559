//! Replies of unknown length, and `argsz` (`vfio-user.rst: Message sizes, VFIO_USER_DEVICE_GET_INFO,
//! VFIO_USER_DEVICE_GET_REGION_INFO, VFIO_USER_DEVICE_GET_REGION_IO_FDS, VFIO_USER_DEVICE_GET_IRQ_INFO`).

use limosa_protocol::info::{DeviceInfo, IrqInfo, REGIONS_MAX, RegionFlags, RegionInfo};
use limosa_vfio_user::codec::{Command, IoFdsMessage};
use zerocopy::{FromBytes, IntoBytes};

use super::on_connection;
use crate::check::{Check, Needs, Stop, Verdict, ensure};
use crate::wire::{Answer, Body, Raw};

pub(super) fn checks() -> Vec<Check> {
    let none = Needs::empty();
    vec![
        on_connection("vfio-user.info-with-more-room", none, &["argsz.reply"], |_, raw| {
            let info = DeviceInfo { argsz: 4096, ..DeviceInfo::default() };
            let body =
                raw.ask(Command::DEVICE_GET_INFO, info.as_bytes())?.done("GET_INFO with argsz 4096")?;
            let info: DeviceInfo = body.fixed()?;
            ensure(info.argsz as usize == body.bytes.len(), || {
                format!("GET_INFO's reply says argsz {} and has {} bytes", info.argsz, body.bytes.len())
            })
        }),
        on_connection("vfio-user.info-with-less-room", none, &["argsz.short"], |_, raw| {
            short::<DeviceInfo>(
                raw,
                Command::DEVICE_GET_INFO,
                &DeviceInfo { argsz: 8, ..DeviceInfo::default() },
            )
        }),
        on_connection("vfio-user.region-info-with-less-room", none, &["argsz.short"], |_, raw| {
            let info = RegionInfo { argsz: 16, ..RegionInfo::default() };
            short::<RegionInfo>(raw, Command::DEVICE_GET_REGION_INFO, &info)
        }),
        on_connection("vfio-user.irq-info-with-less-room", none, &["argsz.short"], |_, raw| {
            let info = IrqInfo { argsz: 8, ..IrqInfo::default() };
            short::<IrqInfo>(raw, Command::DEVICE_GET_IRQ_INFO, &info)
        }),
        on_connection("vfio-user.io-fds-with-less-room", none, &["argsz.short"], |_, raw| {
            let fds = IoFdsMessage { argsz: 8, ..IoFdsMessage::default() };
            short::<IoFdsMessage>(raw, Command::DEVICE_GET_REGION_IO_FDS, &fds)
        }),
        on_connection("vfio-user.io-fds-of-no-region", none, &["wire.answered"], |_, raw| {
            let fds = IoFdsMessage { argsz: 4096, index: u32::MAX, ..IoFdsMessage::default() };
            let answer = raw.ask(Command::DEVICE_GET_REGION_IO_FDS, fds.as_bytes())?;
            answer.refused("GET_REGION_IO_FDS of region 4294967295")?;
            raw.in_step()
        }),
        on_connection("vfio-user.region-capabilities", none, &["argsz.reply"], |_, raw| {
            each_region(raw, |raw, index, info, body| {
                if info.argsz as usize <= size_of::<RegionInfo>() {
                    return Ok(());
                }
                ensure(body.bytes.len() <= info.argsz as usize, || {
                    format!("region {index}: {} bytes for an argsz of {}", body.bytes.len(), info.argsz)
                })?;
                let (whole, body) = region(raw, index, info.argsz)?;
                ensure(body.bytes.len() == whole.argsz as usize, || {
                    let (got, said) = (body.bytes.len(), whole.argsz);
                    format!(
                        "region {index}: asked with the argsz that it named, it gave {got} bytes and says {said}"
                    )
                })
            })
        }),
        on_connection("vfio-user.region-that-can-be-mapped-has-an-fd", none, &["region.fd"], |_, raw| {
            each_region(raw, |_, index, info, body| {
                let mappable = RegionFlags::from_bits_retain(info.flags).contains(RegionFlags::MMAP);
                ensure(mappable != body.fds.is_empty(), || {
                    format!("region {index}: MMAP is {mappable}, and the reply has {} fds", body.fds.len())
                })
            })
        }),
    ]
}

/// Checks that a request with room for less than the fixed part is refused, or answered with the size that it needs.
fn short<T: IntoBytes + FromBytes + zerocopy::Immutable>(
    raw: &mut Raw,
    command: Command,
    request: &T,
) -> Verdict {
    let what = format!("{command} with too small an argsz");
    if let Answer::Reply(body) = raw.ask(command, request.as_bytes())? {
        let needed: u32 = body.fixed()?;
        ensure(needed as usize >= size_of::<T>(), || {
            format!("{what} is answered by argsz {needed}, expected at least {}", size_of::<T>())
        })?;
    }
    raw.in_step()
}

fn region(raw: &mut Raw, index: u32, argsz: u32) -> Result<(RegionInfo, Body), Stop> {
    let info = RegionInfo { argsz, index, ..RegionInfo::default() };
    let answer = raw.ask(Command::DEVICE_GET_REGION_INFO, info.as_bytes())?;
    let body = answer.done(&format!("GET_REGION_INFO of region {index}"))?;
    Ok((body.fixed()?, body))
}

/// Requests every region, with room for the fixed part.
pub(super) fn each_region(
    raw: &mut Raw,
    look: impl Fn(&mut Raw, u32, RegionInfo, &Body) -> Verdict,
) -> Verdict {
    let body = raw.ask(Command::DEVICE_GET_INFO, crate::wire::info_request().as_bytes())?.done("GET_INFO")?;
    let regions = body.fixed::<DeviceInfo>()?.num_regions.min(REGIONS_MAX);
    for index in 0..regions {
        let argsz = size_of::<RegionInfo>() as u32;
        let info = RegionInfo { argsz, index, ..RegionInfo::default() };
        // A missing region may be refused.
        if let Answer::Reply(body) = raw.ask(Command::DEVICE_GET_REGION_INFO, info.as_bytes())? {
            look(raw, index, body.fixed()?, &body)?;
        }
    }
    Ok(())
}

/// A region of this device with these rights, of `bytes_min` bytes or more.
pub(super) fn find_region(raw: &mut Raw, rights: RegionFlags, bytes_min: u64) -> Result<RegionInfo, Stop> {
    let found = std::cell::Cell::new(None);
    each_region(raw, |_, _, info, _| {
        let has = RegionFlags::from_bits_retain(info.flags).contains(rights) && info.size >= bytes_min;
        if has && found.get().is_none() {
            found.set(Some(info));
        }
        Ok(())
    })?;
    found.get().ok_or_else(|| Stop::Skip("the device has no such region".into()))
}
