//! [`Name`]: how a user names a device of the kernel's.

use std::fmt;
use std::str::FromStr;

/// A device's name, as a user gives it.
///
/// ```
/// use limosa_vfio_kernel::Name;
///
/// let name: Name = "65:00.1".parse()?;
/// assert_eq!(name, Name::Pci("0000:65:00.1".into()));
/// assert!("/dev/vfio/devices/vfio0".parse::<Name>().is_ok());
/// assert!("/run/device.sock".parse::<Name>().is_err());
/// # Ok::<(), limosa_vfio_kernel::NotAName>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Name {
    /// A PCI address with its domain, in the kernel's own form: `0000:65:00.1`.
    Pci(String),
    /// A mediated device's UUID, in lower case.
    Mdev(String),
    /// `/dev/vfio/devices/vfioN`.
    Cdev(u32),
    /// `/dev/vfio/N`, `/dev/vfio/noiommu-N`, or the same without the folder; the device is the only one of
    /// the group.
    Group(Group),
}

/// An IOMMU group, as it is called below `/dev/vfio`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Group {
    /// The kernel's number.
    pub number: u32,
    /// Whether its devices have no IOMMU between them and memory (`vfio.h: VFIO_NOIOMMU_IOMMU`).
    pub noiommu: bool,
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.noiommu { "noiommu-" } else { "" }, self.number)
    }
}

/// The text names no kernel device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` names no VFIO device: expected a PCI address (0000:65:00.1 or 65:00.1), a mediated device's UUID, \
     /dev/vfio/devices/vfioN, /dev/vfio/GROUP or a group's number"
)]
pub struct NotAName(pub String);

impl Name {
    /// Whether this has the form of a name. The device need not be there.
    pub fn is_name(name: &str) -> bool {
        name.parse::<Name>().is_ok()
    }
}

impl FromStr for Name {
    type Err = NotAName;

    fn from_str(name: &str) -> Result<Name, NotAName> {
        if let Some(node) = name.strip_prefix("/dev/vfio/") {
            let cdev = node.strip_prefix("devices/vfio").and_then(number).map(Name::Cdev);
            return cdev.or_else(|| group(node)).ok_or_else(|| NotAName(name.into()));
        }
        group(name).or_else(|| pci(name)).or_else(|| mdev(name)).ok_or_else(|| NotAName(name.into()))
    }
}

fn group(name: &str) -> Option<Name> {
    let bare = name.strip_prefix("noiommu-");
    Some(Name::Group(Group { number: number(bare.unwrap_or(name))?, noiommu: bare.is_some() }))
}

/// A decimal number as the kernel prints it: without sign or leading zeros.
fn number(digits: &str) -> Option<u32> {
    let number = digits.parse().ok()?;
    (u32::to_string(&number) == digits).then_some(number)
}

fn pci(name: &str) -> Option<Name> {
    let (slot, function) = name.split_once('.')?;
    let parts: Vec<&str> = slot.split(':').collect();
    let (domain, bus, device) = match parts[..] {
        [bus, device] => ("0000", bus, device),
        [domain, bus, device] => (domain, bus, device),
        _ => return None,
    };
    // Domains of more than four digits belong to bridges that the firmware does not know.
    let fits = (4..=8).contains(&domain.len())
        && [domain, bus, device].iter().all(|part| part.bytes().all(|digit| digit.is_ascii_hexdigit()))
        && bus.len() == 2
        && device.len() == 2
        && u8::from_str_radix(device, 16).is_ok_and(|device| device < 32)
        && matches!(function.as_bytes(), [b'0'..=b'7']);
    fits.then(|| Name::Pci(format!("{domain}:{bus}:{device}.{function}").to_ascii_lowercase()))
}

fn mdev(name: &str) -> Option<Name> {
    let lengths = name.split('-').map(str::len);
    let fits =
        lengths.eq([8, 4, 4, 4, 12]) && name.bytes().all(|digit| digit.is_ascii_hexdigit() || digit == b'-');
    fits.then(|| Name::Mdev(name.to_ascii_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_a_name_is_known() {
        let group = |number, noiommu| Ok(Name::Group(Group { number, noiommu }));
        assert_eq!("0000:00:1F.7".parse(), Ok(Name::Pci("0000:00:1f.7".into())));
        assert_eq!("00:1f.7".parse(), Ok(Name::Pci("0000:00:1f.7".into())));
        assert_eq!("10000:e1:00.0".parse(), Ok(Name::Pci("10000:e1:00.0".into())));
        let uuid = "83B8F4F2-509F-382F-3C1E-E6BFE0FA1001";
        assert_eq!(uuid.parse(), Ok(Name::Mdev(uuid.to_lowercase())));
        assert_eq!("/dev/vfio/devices/vfio12".parse(), Ok(Name::Cdev(12)));
        assert_eq!("/dev/vfio/7".parse(), group(7, false));
        assert_eq!("/dev/vfio/noiommu-7".parse(), group(7, true));
        assert_eq!("7".parse(), group(7, false));
        assert_eq!("noiommu-0".parse(), group(0, true));
    }

    #[test]
    fn what_names_no_device_of_the_kernels_is_refused() {
        for name in [
            "",
            ".",
            "/",
            "/dev/vfio",
            "/dev/vfio/",
            "/dev/vfio/vfio",
            "/dev/vfio/devices",
            "/dev/vfio/devices/vfio",
            "/dev/vfio/devices/vfio-1",
            "/dev/vfio/devices/../7",
            "/dev/vfio/devices/vfio01",
            "devices/vfio1",
            "-1",
            "+1",
            "01",
            "4294967296",
            "noiommu-",
            "00:20.0",
            "00:1f.8",
            "00:1f",
            "00:1f.",
            "000:00:1f.0",
            "0:1f.0",
            "00:1g.0",
            "é0:1f.0",
            "00:é.0",
            "0000:0000:00:1f.0",
            "uart.sock",
            "./7",
            "83b8f4f2-509f-382f-3c1e-e6bfe0fa100",
            "83b8f4f2-509f-382f-3c1e-e6bfe0fa100g",
            "83b8f4f2509f382f3c1ee6bfe0fa1001----",
        ] {
            assert_eq!(name.parse::<Name>(), Err(NotAName(name.into())));
            assert!(!Name::is_name(name));
        }
    }
}
