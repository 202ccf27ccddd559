//! The facts of a device, and their meaning for a move.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use limosa_client::{Device, DeviceExt, Error};
use limosa_host::{Group, User};
use limosa_migrate::way_out_of;
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::{MigrationFlags, State};

use super::super::finding::{
    BESIDE_VMM, Finding, IN_DOUBT, IN_ERROR, IOMMU_NO_DIRTY, LOG_COARSE, LOG_REFUSED, MIDWAY, NO_DATA_SIZE,
    NO_DIRTY_LOG, NO_MIGRATION, NO_P2P, NO_PRE_COPY, SMALL_MESSAGES, STANDS,
};
use super::{Known, Looked};
use crate::commands::probe::{self, Probe};
use crate::found;
use crate::moves::Moves;
use crate::open::Opened;
use crate::open_elsewhere;
use crate::output;
use crate::staying::way_back;

/// Page sizes with which a log is requested.
const PAGES: [u64; 3] = [4 << 10, 64 << 10, 2 << 20];

/// Numbers of ranges with which a log is requested, the largest first. The kernel accepts 256.
const RANGES: [u64; 4] = [256, 64, 16, 1];

/// The length and the distance of those ranges, in bytes.
const RANGE_BYTES: u64 = 2 << 20;

/// Less than this in one message is little.
const MESSAGE_LEAST: u32 = 64 << 10;

/// Queries the device. An error ends the examination: the device does not answer as it should.
pub fn gather(device: &Opened, moves: &Moves, looked: &mut Looked) -> anyhow::Result<()> {
    reach(device, looked);
    let found = probe::probe(&**device)?;
    if let Some(id) = &found.pci_id {
        looked.report.facts.add("PCI", id.clone());
    }
    let flags = device.migration_flags()?;
    looked.known.flags = Some(flags);
    migration(device, &found, flags, moves, looked)?;
    if let Some(loaded) = moves.loaded_by(device) {
        looked.report.facts.add("loaded by", loaded.to_string());
    }
    if let Some(kernel) = device.kernel() {
        kernels(probe::look(kernel, device.given(), found.dma_logging), found.dma_logging, looked);
    } else if !found.dma_logging {
        looked.report.facts.add("dirty log", "none");
        looked.find(&NO_DIRTY_LOG, "it has no DMA logging");
    }
    if found.dma_logging {
        log(device, looked)?;
    }
    Ok(())
}

/// The server, the role beside other clients, and the limits that both sides agreed on.
fn reach(device: &Opened, looked: &mut Looked) {
    let Some(client) = device.vfio_user() else { return };
    if let Ok(found) = std::fs::metadata(device.given()) {
        let (mode, user, group) = (found.mode() & 0o777, User(found.uid()), Group(found.gid()));
        looked.report.facts.add("socket", format!("mode {mode:o}, user {user}, group {group}"));
    }
    if let Some(pid) = device.server() {
        let folder = Path::new("/proc").join(pid.to_string());
        let user = std::fs::metadata(&folder).map(|folder| format!(", user {}", User(folder.uid())));
        let server =
            format!("{} (process {pid}){}", open_elsewhere::called(&folder), user.unwrap_or_default());
        looked.report.facts.add("server", server);
    }
    let limits = client.limits();
    let yes = |is: bool| if is { "yes" } else { "no" };
    looked.report.facts.add(
        "vfio-user",
        format!(
            "version 0.{}, {} in a message, {} fds, {} DMA maps of pages of {:#x}, REGION_WRITE_MULTI {}, twin socket {}",
            limits.minor,
            output::bytes(limits.data_xfer_bytes_max.into()),
            limits.msg_fds_max,
            limits.dma_maps_max,
            limits.page_sizes,
            yes(limits.write_multiple),
            yes(limits.twin_socket.is_some()),
        ),
    );
    if limits.data_xfer_bytes_max < MESSAGE_LEAST {
        looked.find(
            &SMALL_MESSAGES,
            format!("{} in a message", output::bytes(limits.data_xfer_bytes_max.into())),
        );
    }
    match device.is_beside_vmm() {
        true => {
            looked.report.facts.add("role", "control: a VMM uses it");
            looked.find(&BESIDE_VMM, "its server has a VMM, and let this command in beside it");
        }
        false => looked.report.facts.add("role", "vmm: nobody else uses it"),
    }
}

fn migration(
    device: &Opened,
    found: &Probe,
    flags: MigrationFlags,
    moves: &Moves,
    looked: &mut Looked,
) -> anyhow::Result<()> {
    if let Some(why) = &found.cannot_migrate {
        looked.report.facts.add("migration", "no");
        looked.find(&NO_MIGRATION, why.clone());
        return Ok(());
    }
    let state = device.state()?;
    let stop_copy_bytes = found.migration.as_ref().and_then(|support| support.stop_copy_bytes);
    looked.known = Known { flags: Some(flags), state: Some(state), stop_copy_bytes };
    looked.report.facts.add("migration", flags.to_string());
    looked.report.facts.add("state", state.name());
    match stop_copy_bytes {
        Some(bytes) => looked.report.facts.add("stop-copy", format!("about {}", output::bytes(bytes))),
        None => {
            looked.report.facts.add("stop-copy", "size unknown");
            looked.find(&NO_DATA_SIZE, "it has no MIG_DATA_SIZE");
        }
    }
    if !flags.contains(MigrationFlags::PRE_COPY) {
        looked.find(&NO_PRE_COPY, format!("its flags are {flags}"));
    }
    if !flags.contains(MigrationFlags::P2P) {
        looked.find(&NO_P2P, format!("its flags are {flags}"));
    }
    stands(device, state, moves, looked);
    Ok(())
}

/// Whether a move can begin in this state.
fn stands(device: &Opened, state: State, moves: &Moves, looked: &mut Looked) {
    let name = looked.name().to_owned();
    if let Some(id) = device.stays_for() {
        let what = format!("it is in {state}, and stays so: it was given away with move {id}");
        let remedy = match found::noted(&name, moves).is_some() {
            true => format!("limosa resolve {name}"),
            false => format!("{}, only if its guest runs nowhere else, and never will", way_back(&name, id)),
        };
        looked.findings.push(Finding::new(&IN_DOUBT, &name, what).with_remedy(remedy));
        return;
    }
    match state {
        State::Running => {}
        State::Stop => looked.find(&STANDS, "it is in STOP"),
        State::Error => looked.find(&IN_ERROR, "it is in ERROR"),
        _ => looked.findings.push(Finding::new(&MIDWAY, &name, format!("it is in {state}")).with_remedy(
            format!("limosa resolve {name}, if something is noted of it; {}", way_out_of(state)),
        )),
    }
}

/// The facts from sysfs and from the address space of a kernel device.
fn kernels(kernel: probe::Kernel, logs: bool, looked: &mut Looked) {
    let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "unknown".into());
    let facts = &mut looked.report.facts;
    facts.add("driver", or_unknown(kernel.driver));
    facts.add("group", or_unknown(kernel.group));
    facts.add("cdev", or_unknown(kernel.cdev));
    facts.add("door", kernel.door.unwrap_or_else(|| "held by another process".into()));
    let Some(sources) = kernel.dirty_sources else { return };
    facts.add("dirty pages told by", if sources.is_empty() { "nobody".into() } else { sources.join(", ") });
    if sources.is_empty() {
        looked.find(&NO_DIRTY_LOG, "neither the device nor its IOMMU tracks what it writes");
    } else if logs && sources.len() == 1 {
        looked.find(&IOMMU_NO_DIRTY, "only the device itself logs");
    }
}

/// The page sizes and ranges that the log accepts: it is started and stopped again. Not beside a VMM, which may be about to log.
fn log(device: &Opened, looked: &mut Looked) -> anyhow::Result<()> {
    if device.is_beside_vmm() || device.is_borrowed() {
        looked.report.facts.add("dirty log", "there; not started beside a VMM");
        return Ok(());
    }
    let (mut pages, mut refused) = (Vec::new(), None);
    for hint in PAGES {
        match started(&**device, hint, 1)? {
            Ok(page) if !pages.contains(&page) => pages.push(page),
            Ok(_) => {}
            Err(error) => refused = Some(error),
        }
    }
    let Some(least) = pages.iter().min().copied() else {
        looked.report.facts.add("dirty log", "does not start");
        let why = refused.map_or_else(String::new, |error| error.to_string());
        looked.find(&LOG_REFUSED, why);
        return Ok(());
    };
    let mut ranges = 0;
    for count in RANGES {
        if started(&**device, least, count)?.is_ok() {
            ranges = count;
            break;
        }
    }
    let sizes: Vec<String> = pages.iter().map(|bytes| output::bytes(*bytes)).collect();
    let many =
        if ranges == RANGES[0] { format!("{ranges} ranges or more") } else { format!("{ranges} ranges") };
    looked.report.facts.add("dirty log", format!("pages of {}, {many}", sizes.join(", ")));
    if least > PAGES[0] {
        looked.find(&LOG_COARSE, format!("its pages have {} at least", output::bytes(least)));
    }
    Ok(())
}

/// Starts the log for a moment; the page size that the device chose, or its refusal. An error is a device that is gone.
fn started(device: &dyn Device, hint: u64, ranges: u64) -> limosa_client::Result<Result<u64, Error>> {
    let ranges: Vec<_> =
        (0..ranges).map(|at| DmaLoggingRange { iova: at * 2 * RANGE_BYTES, length: RANGE_BYTES }).collect();
    match device.dma_logging_start(hint, &ranges) {
        Ok(page) => device.dma_logging_stop().map(|()| Ok(page)),
        Err(error) if error.is_connection_lost() => Err(error),
        Err(error) => Ok(Err(error)),
    }
}
