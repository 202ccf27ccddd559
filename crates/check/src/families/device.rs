//! Regions, interrupts and the information about the device (`vfio.h: VFIO_DEVICE_GET_INFO`,
//! `VFIO_DEVICE_GET_REGION_INFO`, `VFIO_DEVICE_GET_IRQ_INFO`, `VFIO_DEVICE_SET_IRQS`).

use limosa_client::{Device, Error, IrqAction};
use limosa_protocol::info::{IRQ_INDEXES_MAX, IrqFlags, REGIONS_MAX, RegionFlags};
use limosa_protocol::{Errno, State};

use crate::check::{Check, Family, Needs, Stop, Verdict, ensure, fail, skip};
use crate::trial::{Trial, refused, refused_somehow};

pub(super) fn checks() -> Vec<Check> {
    let check = |id: &'static str, needs, clauses: &[&'static str], body: fn(&mut Trial) -> Verdict| {
        Check::new(Family::Device, id, needs, clauses, body)
    };
    let none = Needs::empty();
    vec![
        check("device.regions-answer", none, &["info.indexes"], regions_answer),
        check("device.region-index-too-high", none, &["info.indexes"], |t| {
            let device = t.device()?;
            let count = device.info()?.num_regions;
            refused(device.region(count).map(drop), &format!("region {count} of {count}"), &[Errno::EINVAL])
        }),
        check("device.region-index-highest", none, &["info.indexes"], |t| {
            refused(t.device()?.region(u32::MAX).map(drop), "region 4294967295", &[Errno::EINVAL])
        }),
        check("device.irqs-answer", none, &["info.indexes"], irqs_answer),
        check("device.irq-index-too-high", none, &["info.indexes"], |t| {
            let device = t.device()?;
            let count = device.info()?.num_irqs;
            refused(
                device.irq(count).map(drop),
                &format!("interrupt index {count} of {count}"),
                &[Errno::EINVAL],
            )
        }),
        check("device.region-read-beyond", none, &["info.region-bounds"], |t| beyond(t, false)),
        check("device.region-write-beyond", none, &["info.region-bounds"], |t| beyond(t, true)),
        check("device.irq-vectors-beyond", none, &["info.irqs"], vectors_beyond),
        check("device.info-is-stable", Needs::MIGRATION, &["info.stable"], info_is_stable),
    ]
}

fn regions_answer(t: &mut Trial) -> Verdict {
    let device = t.device()?;
    let count = device.info()?.num_regions;
    ensure(count <= REGIONS_MAX, || format!("{count} regions, expected at most {REGIONS_MAX}"))?;
    for index in 0..count {
        match device.region(index) {
            Ok(region) => ensure(region.info.index == index, || {
                format!("asked for region {index}, the answer is for {}", region.info.index)
            })?,
            Err(Error::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn irqs_answer(t: &mut Trial) -> Verdict {
    let device = t.device()?;
    let count = device.info()?.num_irqs;
    ensure(count <= IRQ_INDEXES_MAX, || {
        format!("{count} interrupt indexes, expected at most {IRQ_INDEXES_MAX}")
    })?;
    for index in 0..count {
        match device.irq(index) {
            Ok(irq) => ensure(irq.index == index, || {
                format!("asked for interrupt index {index}, the answer is for {}", irq.index)
            })?,
            Err(Error::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// A region of the device with these rights.
fn a_region(t: &Trial, flags: RegionFlags) -> Result<(u32, u64), Stop> {
    let device = t.device()?;
    for index in 0..device.info()?.num_regions.min(REGIONS_MAX) {
        match device.region(index) {
            Ok(region)
                if region.info.size > 0
                    && RegionFlags::from_bits_retain(region.info.flags).contains(flags) =>
            {
                return Ok((index, region.info.size));
            }
            Ok(_) | Err(Error::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    skip("the device has no such region")
}

fn beyond(t: &mut Trial, write: bool) -> Verdict {
    let (index, size) = a_region(t, if write { RegionFlags::WRITE } else { RegionFlags::READ })?;
    let device = t.device()?;
    for offset in [size, u64::MAX - 8] {
        let answer = match write {
            true => device.region_write(index, offset, &[0; 4]),
            false => device.region_read(index, offset, &mut [0; 4]),
        };
        match (answer, t.facts.transport) {
            // read(2) of the kernel has a limit, and offsets have a limited number of bits.
            (Err(Error::Os { .. } | Error::Usage { .. }), _) => {}
            (answer, _) => {
                let access = if write { "a write" } else { "a read" };
                let what = format!(
                    "{access} of 4 bytes at {offset:#x} of region {index}, which has {size:#x} bytes,"
                );
                refused_somehow(answer, &what)?;
            }
        }
    }
    Ok(())
}

fn vectors_beyond(t: &mut Trial) -> Verdict {
    let device = t.device()?;
    for index in 0..device.info()?.num_irqs.min(IRQ_INDEXES_MAX) {
        let irq = match device.irq(index) {
            Ok(irq) => irq,
            Err(Error::Refused { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        if irq.count == 0 || !IrqFlags::from_bits_retain(irq.flags).contains(IrqFlags::EVENTFD) {
            continue;
        }
        let answer = device.set_irqs(index, irq.count, IrqAction::Wire(&[None]));
        return refused(answer, &format!("vector {0} of {0}", irq.count), &[Errno::EINVAL]);
    }
    skip("the device has no interrupts")
}

fn info_is_stable(t: &mut Trial) -> Verdict {
    let look = |t: &Trial| -> Result<Vec<String>, Stop> {
        let device = t.device()?;
        let info = device.info()?;
        let counts = format!("{} regions and {} interrupt indexes", info.num_regions, info.num_irqs);
        let region = |index| match device.region(index) {
            Ok(region) => {
                format!("region {index} of {:#x} bytes with flags {:#x}", region.info.size, region.info.flags)
            }
            Err(_) => format!("no region {index}"),
        };
        let regions = (0..info.num_regions.min(REGIONS_MAX)).map(region);
        Ok(std::iter::once(counts).chain(regions).collect())
    };
    let running = look(t)?;
    t.go(State::Stop)?;
    let stopped = look(t)?;
    match running.iter().zip(&stopped).find(|(running, stopped)| running != stopped) {
        Some((running, stopped)) => fail(format!("in RUNNING it has {running}, in STOP {stopped}")),
        None => Ok(()),
    }
}
