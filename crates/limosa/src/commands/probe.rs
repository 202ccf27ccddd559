//! `limosa probe`: the description of a device, and whether and how it can migrate.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use limosa_client::dirty::DirtySource;
use limosa_client::{Device, DeviceExt, Error};
use limosa_protocol::info::{DeviceFlags, IrqFlags, RegionFlags};
use limosa_protocol::{FeatureIndex, FeatureOp, MigrationFlags, pci_index};
use limosa_vfio_kernel::KernelDevice;
use serde::Serialize;

use crate::open::{self, Opened};
use crate::output::{self, Output};

/// The description of a device.
#[derive(Debug, Serialize)]
pub struct Probe {
    device: String,
    flags: Vec<&'static str>,
    /// Its place in the kernel; absent for a device behind a socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<Kernel>,
    /// The role of this command: `control` beside a VMM that uses the device, else `vmm`. Absent for a kernel device.
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pci_id: Option<String>,
    pub(super) migration: Option<MigrationSupport>,
    /// Why the device cannot migrate; absent when it can.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cannot_migrate: Option<String>,
    pub(super) dma_logging: bool,
    features: Vec<String>,
    regions: Vec<RegionFound>,
    irqs: Vec<IrqFound>,
}

/// The part of the description that only kernel devices have.
#[derive(Debug, Serialize)]
pub(super) struct Kernel {
    /// Where it is in sysfs.
    sysfs: Option<String>,
    pub(super) driver: Option<String>,
    pub(super) group: Option<String>,
    pub(super) cdev: Option<String>,
    /// The interface through which it is open here; absent for a device that another process has open.
    pub(super) door: Option<String>,
    /// The sources that log the memory it writes: `device`, `iommufd`, `container`. Absent for a device that another
    /// process holds, since only that process knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) dirty_sources: Option<Vec<String>>,
}

#[derive(Debug, Serialize)]
pub(super) struct MigrationSupport {
    pub(super) flags: Vec<&'static str>,
    pub(super) state: &'static str,
    pub(super) stop_copy_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct RegionFound {
    index: u32,
    bytes: u64,
    flags: Vec<&'static str>,
    mappable: Vec<Mappable>,
}

/// A part of a region that can be mapped.
#[derive(Debug, Serialize)]
struct Mappable {
    offset: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct IrqFound {
    index: u32,
    vectors: u32,
    flags: Vec<&'static str>,
}

pub fn run(device: &Opened, out: &Output) -> anyhow::Result<()> {
    let mut found = probe(&**device)?;
    found.kernel = device.kernel().map(|kernel| look(kernel, device.given(), found.dma_logging));
    found.role = device.vfio_user().map(|_| if device.is_beside_vmm() { "control" } else { "vmm" });
    out.result(&found, |to| output::folded(to, |to| print(&found, to)))
}

/// Queries the device.
pub(super) fn probe(device: &dyn Device) -> anyhow::Result<Probe> {
    let info = device.info().context("cannot ask what the device is")?;
    let flags = DeviceFlags::from_bits_retain(info.flags);
    let is_pci = flags.contains(DeviceFlags::PCI);

    let mut regions = Vec::new();
    for index in 0..info.num_regions.min(output::INDEXES_MAX) {
        let Some(region) = or_refused(device.region(index))? else { continue };
        if region.info.size > 0 {
            regions.push(RegionFound {
                index,
                bytes: region.info.size,
                flags: region_flags(RegionFlags::from_bits_retain(region.info.flags)),
                mappable: region.mappable.iter().map(|&(offset, bytes)| Mappable { offset, bytes }).collect(),
            });
        }
    }
    let mut irqs = Vec::new();
    for index in 0..info.num_irqs.min(output::INDEXES_MAX) {
        let Some(irq) = or_refused(device.irq(index))? else { continue };
        if irq.count > 0 {
            let flags = IrqFlags::from_bits_retain(irq.flags).iter_names().map(|(name, _)| name).collect();
            irqs.push(IrqFound { index, vectors: irq.count, flags });
        }
    }

    let mut features = Vec::new();
    for index in (0..).map(FeatureIndex).map_while(|index| index.rules().map(|rules| (index, rules))) {
        let (index, rules) = index;
        let op = if rules.get { FeatureOp::GET } else { FeatureOp::SET };
        if device.probe(index, op)? {
            features.push(index.to_string());
        }
    }

    let migration = device.migration_flags()?;
    let can_stop = migration.contains(MigrationFlags::STOP_COPY);
    Ok(Probe {
        device: device.name().into(),
        flags: flags.iter_names().map(|(name, _)| name).collect(),
        kernel: None,
        role: None,
        pci_id: if is_pci { pci_id(device) } else { None },
        cannot_migrate: (!can_stop).then(|| match migration.is_empty() {
            true => {
                "it has no feature MIGRATION: its driver or server does not support live migration".into()
            }
            false => format!("its migration flags are {migration}, without the mandatory STOP_COPY"),
        }),
        migration: if migration.is_empty() {
            None
        } else {
            Some(MigrationSupport {
                flags: output::flag_names(migration),
                state: device.state()?.name(),
                stop_copy_bytes: device.mig_data_size()?,
            })
        },
        dma_logging: device.probe(FeatureIndex::DMA_LOGGING_START, FeatureOp::SET)?,
        features,
        regions,
        irqs,
    })
}

/// The entries of sysfs and of the address space for a kernel device.
pub(super) fn look(kernel: &KernelDevice, given: &str, dma_logging: bool) -> Kernel {
    let listed = open::listed(given);
    let text = |path: &PathBuf| path.display().to_string();
    Kernel {
        sysfs: listed.as_ref().map(|listed| text(&listed.folder)),
        driver: listed.as_ref().and_then(|listed| listed.driver.clone()),
        group: listed.as_ref().and_then(|listed| listed.group).map(|group| group.to_string()),
        cdev: listed.as_ref().and_then(|listed| listed.cdev.as_ref()).map(text),
        door: kernel.door().map(|door| door.to_string()),
        dirty_sources: kernel.address_space().map(|space| {
            let log = space.dirty_log();
            // A log that does not start tells nothing.
            let space = log.sees(kernel) && log.start(4096, &[]).and_then(|_| log.stop()).is_ok();
            let device = dma_logging.then(|| "device".to_owned());
            device.into_iter().chain(space.then(|| log.name().to_owned())).collect()
        }),
    }
}

/// Drivers refuse indexes that they do not use.
fn or_refused<T>(answer: limosa_client::Result<T>) -> limosa_client::Result<Option<T>> {
    match answer {
        Err(Error::Refused { .. }) => Ok(None),
        answer => answer.map(Some),
    }
}

/// Vendor, device and class as `lspci -nn` writes them, or `None` when the config space cannot be read.
fn pci_id(device: &dyn Device) -> Option<String> {
    let mut header = [0; 12];
    device.region_read(pci_index::CONFIG, 0, &mut header).ok()?;
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    Some(format!("{:04x}:{:04x} class {:04x}", half(0), half(2), half(10)))
}

fn region_flags(flags: RegionFlags) -> Vec<&'static str> {
    flags.iter_names().map(|(name, _)| name).collect()
}

/// `rwm`, with `-` for what is missing.
fn access(flags: &[&str]) -> String {
    [("READ", 'r'), ("WRITE", 'w'), ("MMAP", 'm')]
        .map(|(flag, letter)| if flags.contains(&flag) { letter } else { '-' })
        .iter()
        .collect()
}

/// The name of a region of a PCI device.
pub(super) fn region_name(index: u32) -> String {
    match index {
        pci_index::BAR0..=pci_index::BAR5 => format!("BAR{index}"),
        pci_index::ROM => "ROM".into(),
        pci_index::CONFIG => "config".into(),
        pci_index::VGA => "VGA".into(),
        _ => format!("region {index}"),
    }
}

fn irq_name(index: u32) -> String {
    match index {
        pci_index::IRQ_INTX => "INTx".into(),
        pci_index::IRQ_MSI => "MSI".into(),
        pci_index::IRQ_MSIX => "MSI-X".into(),
        pci_index::IRQ_ERR => "ERR".into(),
        pci_index::IRQ_REQ => "REQ".into(),
        _ => format!("irq {index}"),
    }
}

fn print(found: &Probe, to: &mut dyn Write) -> std::io::Result<()> {
    let is_pci = found.flags.contains(&"PCI");
    write!(to, "{}", found.device)?;
    if let Some(id) = &found.pci_id {
        write!(to, "  PCI {id}")?;
    }
    writeln!(to, "  [{}]", found.flags.join(" "))?;
    if let Some(Kernel { sysfs: _, driver, group, cdev, door, dirty_sources: _ }) = &found.kernel {
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "unknown".into());
        let door =
            door.as_ref().map_or("held by another process".into(), |door| format!("open by its {door}"));
        let (driver, group) = (or_none(driver), or_none(group));
        writeln!(to, "  kernel       driver {driver}, group {group}, cdev {}, {door}", or_none(cdev))?;
    }
    if found.role == Some("control") {
        writeln!(to, "  role         control: a VMM uses it, and is not disturbed")?;
    }
    match (&found.migration, &found.cannot_migrate) {
        (_, Some(why)) => writeln!(to, "  migration    no: {why}")?,
        (Some(support), None) => {
            writeln!(to, "  migration    {}, now in {}", support.flags.join("+"), support.state)?;
            match support.stop_copy_bytes {
                Some(bytes) => writeln!(to, "  stop-copy    about {}", output::bytes(bytes))?,
                None => writeln!(to, "  stop-copy    size unknown: it has no feature MIG_DATA_SIZE")?,
            }
        }
        (None, None) => {}
    }
    writeln!(to, "  DMA logging  {}", if found.dma_logging { "yes" } else { "no" })?;
    match found.kernel.as_ref().and_then(|kernel| kernel.dirty_sources.as_deref()) {
        None => {}
        Some([]) => writeln!(
            to,
            "  dirty pages  nobody tells: neither the device nor its IOMMU tracks what it writes, so all memory that it \
             may write is moved while it is stopped"
        )?,
        Some(sources) => writeln!(to, "  dirty pages  told by {}", sources.join(", "))?,
    }
    writeln!(to, "  features     {}", found.features.join(" "))?;
    for region in &found.regions {
        let name = if is_pci { region_name(region.index) } else { format!("region {}", region.index) };
        write!(to, "  {name:<12} {} {}", output::bytes(region.bytes), access(&region.flags))?;
        for Mappable { offset, bytes } in &region.mappable {
            write!(to, "  mappable {offset:#x}+{bytes:#x}")?;
        }
        writeln!(to)?;
    }
    for irq in &found.irqs {
        let name = if is_pci { irq_name(irq.index) } else { format!("irq {}", irq.index) };
        writeln!(to, "  {name:<12} {} vector(s)  [{}]", irq.vectors, irq.flags.join(" "))?;
    }
    Ok(())
}
