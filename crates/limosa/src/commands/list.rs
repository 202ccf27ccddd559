//! `limosa probe` without a device: the kernel's VFIO devices, whether they can migrate, and why one is not usable.

use std::io::Write;
use std::path::Path;

use limosa_client::DeviceExt;
use limosa_protocol::MigrationFlags;
use serde::Serialize;

use super::doctor::finding::{VFIO_NO_DEVICE, VFIO_NOT_LOADED};
use crate::exit;
use crate::open::Opening;
use crate::open_elsewhere::{Holder, OpenElsewhere};
use crate::output::{self, Output};

/// The devices that were found.
#[derive(Debug, Serialize)]
struct Listing {
    devices: Vec<Listed>,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    none_because: Option<String>,
}

#[derive(Debug, Serialize)]
struct Listed {
    /// The name to give to other commands.
    device: String,
    bus: String,
    /// The type of a mediated device, or a PCI device's vendor and device as `lspci -n` writes them.
    #[serde(rename = "type")]
    kind: Option<String>,
    driver: Option<String>,
    group: Option<String>,
    cdev: Option<String>,
    #[serde(flatten)]
    found: Found,
}

/// The result of opening it for a moment.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case", tag = "is")]
enum Found {
    /// Free, and it can migrate.
    Usable { migration: Vec<&'static str> },
    /// Free, and it cannot migrate.
    NotMovable { cannot_migrate: String },
    /// Another process has it open. It is not named if this user may not examine it.
    InUse { by: Vec<Holder> },
    /// It cannot be opened.
    Unusable { unusable: String },
}

/// With `all`, PCI devices that could be VFIO's, too.
pub fn run(all: bool, opening: Opening<'_>, out: &Output) -> anyhow::Result<()> {
    let elsewhere = OpenElsewhere::look();
    let unbound = if all { limosa_vfio_kernel::list_unbound() } else { Vec::new() };
    let devices = limosa_vfio_kernel::list().into_iter().chain(unbound);
    let devices: Vec<Listed> = devices.map(|device| look(device, opening, &elsewhere)).collect();
    let none_because = devices.is_empty().then(why_none);
    let listing = Listing { devices, none_because };
    out.result(&listing, |to| print(&listing, to))
}

fn look(device: limosa_vfio_kernel::Listed, opening: Opening<'_>, elsewhere: &OpenElsewhere) -> Listed {
    let group = device.group.map(|group| group.to_string());
    let node = group.as_ref().map(|group| Path::new("/dev/vfio").join(group));
    let by = elsewhere.holders(&device.folder, node.as_deref());
    let found = match &device.unusable {
        _ if !by.is_empty() => Found::InUse { by },
        Some(why) => Found::Unusable { unusable: why.to_string() },
        None => open(&device.id, opening),
    };
    let cdev = device.cdev.map(|cdev| cdev.display().to_string());
    let pci = device.pci.map(|ids| format!("{:04x}:{:04x}", ids.vendor, ids.device));
    let kind = device.mdev_type.or(pci);
    Listed { device: device.id, bus: device.bus, kind, driver: device.driver, group, cdev, found }
}

/// Opens the device for a moment. No other process has it open, so no state is lost by that.
fn open(id: &str, opening: Opening<'_>) -> Found {
    let flags = opening.open(id).and_then(|device| Ok(device.migration_flags()?));
    match flags {
        Ok(flags) if flags.contains(MigrationFlags::STOP_COPY) => {
            Found::Usable { migration: output::flag_names(flags) }
        }
        Ok(_) => Found::NotMovable { cannot_migrate: "its driver has no migration".into() },
        Err(error) if is_in_use(&error) => Found::InUse { by: Vec::new() },
        Err(error) => Found::Unusable { unusable: exit::message(&error) },
    }
}

fn is_in_use(error: &anyhow::Error) -> bool {
    let client = error.chain().find_map(|cause| cause.downcast_ref::<limosa_client::Error>());
    client.is_some_and(exit::is_in_use)
}

/// The doctor's advice if the kernel has no VFIO device.
fn why_none() -> String {
    let (what, kind) = match Path::new("/dev/vfio").exists() {
        false => ("there is no /dev/vfio", &VFIO_NOT_LOADED),
        true => ("no device has a VFIO driver", &VFIO_NO_DEVICE),
    };
    format!("{what}: {}", kind.remedy)
}

const HEAD: [&str; 6] = ["DEVICE", "TYPE", "DRIVER", "GROUP", "CDEV", "MIGRATION"];

fn print(listing: &Listing, to: &mut dyn Write) -> std::io::Result<()> {
    if let Some(why) = &listing.none_because {
        return writeln!(to, "no VFIO devices; {why}");
    }
    let rows: Vec<[String; 6]> = listing.devices.iter().map(row).collect();
    let head = HEAD.map(str::to_owned);
    let width = |column: usize| {
        rows.iter().chain([&head]).map(|row| row[column].chars().count()).max().unwrap_or_default()
    };
    let widths = [0, 1, 2, 3, 4].map(width);
    let line = |row: &[String; 6], to: &mut dyn Write| {
        for (cell, width) in row.iter().zip(widths) {
            write!(to, "{cell:<width$}  ")?;
        }
        writeln!(to, "{}", row[5])
    };
    line(&head, to)?;
    for (device, row) in listing.devices.iter().zip(&rows) {
        line(row, to)?;
        match &device.found {
            Found::Usable { .. } | Found::NotMovable { .. } => {}
            Found::InUse { by } if by.is_empty() => {
                writeln!(to, "  by a process that this user may not look into")?
            }
            Found::InUse { by } => by.iter().try_for_each(|holder| writeln!(to, "  by {holder}"))?,
            Found::Unusable { unusable } => writeln!(to, "  {unusable}")?,
        }
    }
    Ok(())
}

fn row(device: &Listed) -> [String; 6] {
    let migration = match &device.found {
        Found::Usable { migration } => migration.join("+"),
        Found::NotMovable { cannot_migrate } => cannot_migrate.clone(),
        Found::InUse { .. } => "in use".into(),
        Found::Unusable { .. } => "not usable".into(),
    };
    let of = |text: &Option<String>| or_none(text).to_owned();
    [
        device.device.clone(),
        of(&device.kind),
        of(&device.driver),
        of(&device.group),
        of(&device.cdev),
        migration,
    ]
}

/// The last part of what may be a path.
fn or_none(text: &Option<String>) -> &str {
    text.as_deref().map_or("-", |text| text.rsplit('/').next().unwrap_or(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(device: &str, driver: Option<&str>, found: Found) -> Listed {
        let cdev = driver.map(|_| "/dev/vfio/devices/vfio3".to_owned());
        let group = Some("12".to_owned());
        Listed {
            device: device.into(),
            bus: "pci".into(),
            kind: Some("15b3:101e".to_owned()),
            driver: driver.map(str::to_owned),
            group,
            cdev,
            found,
        }
    }

    fn listing() -> Listing {
        let holder = Holder { pid: 77, process: "qemu".into(), name: Some("/proc/77/fd/9".into()) };
        let devices = vec![
            listed(
                "0000:65:00.1",
                Some("mlx5_vfio_pci"),
                Found::Usable { migration: vec!["STOP_COPY", "P2P"] },
            ),
            listed("0000:65:00.2", Some("mlx5_vfio_pci"), Found::InUse { by: vec![holder] }),
            listed("0000:65:00.3", Some("mlx5_vfio_pci"), Found::InUse { by: vec![] }),
            listed(
                "0000:03:00.0",
                Some("vfio-pci"),
                Found::NotMovable { cannot_migrate: "it has none".into() },
            ),
            listed("0000:04:00.0", None, Found::Unusable { unusable: "bound to no driver; bind it".into() }),
        ];
        Listing { devices, none_because: None }
    }

    #[test]
    fn a_table_has_a_row_for_each_device_and_reasons_below_them() {
        let mut text = Vec::new();
        print(&listing(), &mut text).unwrap();
        let expected = "\
DEVICE        TYPE       DRIVER         GROUP  CDEV   MIGRATION
0000:65:00.1  15b3:101e  mlx5_vfio_pci  12     vfio3  STOP_COPY+P2P
0000:65:00.2  15b3:101e  mlx5_vfio_pci  12     vfio3  in use
  by qemu (process 77) as /proc/77/fd/9
0000:65:00.3  15b3:101e  mlx5_vfio_pci  12     vfio3  in use
  by a process that this user may not look into
0000:03:00.0  15b3:101e  vfio-pci       12     vfio3  it has none
0000:04:00.0  15b3:101e  -              12     -      not usable
  bound to no driver; bind it
";
        assert_eq!(String::from_utf8(text).unwrap(), expected);
    }

    #[test]
    fn each_device_in_json_says_what_it_is() {
        let json = serde_json::to_value(listing()).unwrap();
        let devices = json["devices"].as_array().unwrap();
        let is: Vec<_> = devices.iter().map(|device| device["is"].as_str().unwrap()).collect();
        assert_eq!(is, ["usable", "in_use", "in_use", "not_movable", "unusable"]);
        assert_eq!(devices[0]["migration"], serde_json::json!(["STOP_COPY", "P2P"]));
        assert_eq!(devices[1]["by"][0]["name"], "/proc/77/fd/9");
        assert_eq!(devices[4]["driver"], serde_json::Value::Null);
        assert!(json.get("none_because").is_none());
    }
}
