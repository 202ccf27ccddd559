//! The kernel: its version, and the options of its configuration that VFIO needs.

use std::io::Read;

use flate2::read::GzDecoder;

use super::super::finding::{KERNEL_CONFIG, KERNEL_NO_CDEV, KERNEL_NO_VFIO, KERNEL_OLD, KERNEL_PARTIAL};
use super::Look;

/// The most bytes of a configuration, unpacked.
const CONFIG_BYTES_MAX: u64 = 8 << 20;

/// A version's first two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release(pub u32, pub u32);

impl Release {
    fn parse(text: &str) -> Option<Release> {
        let mut numbers =
            text.split(|letter: char| !letter.is_ascii_digit()).map(|number| number.parse().ok());
        Some(Release(numbers.next()??, numbers.next()??))
    }
}

/// Parts of the protocol, each with the version that brought it (`docs/kernel.md`).
const PARTS: [(Release, &str); 4] = [
    (Release(6, 1), "DMA logging by devices"),
    (Release(6, 2), "pre-copy and MIG_DATA_SIZE"),
    (Release(6, 6), "the cdev"),
    (Release(6, 7), "dirty tracking by iommufd"),
];

/// Options that are shown.
const OPTIONS: [&str; 8] = [
    "VFIO",
    "VFIO_PCI",
    "VFIO_GROUP",
    "VFIO_DEVICE_CDEV",
    "IOMMUFD",
    "IOMMUFD_DRIVER",
    "VFIO_IOMMU_TYPE1",
    "VFIO_MDEV",
];

/// The configuration of the kernel.
struct Config(String);

impl Config {
    fn read(look: &Look<'_>, release: &str) -> Option<Config> {
        if let Some(packed) = look.host.bytes("proc/config.gz") {
            let mut text = Vec::new();
            if GzDecoder::new(&packed[..]).take(CONFIG_BYTES_MAX).read_to_end(&mut text).is_ok() {
                return Some(Config(String::from_utf8_lossy(&text).into_owned()));
            }
        }
        // A name that comes from a file leads nowhere else.
        let release = release.split('/').next_back().filter(|name| !name.is_empty() && *name != "..")?;
        let files = [
            format!("boot/config-{release}"),
            format!("lib/modules/{release}/config"),
            format!("usr/lib/modules/{release}/config"),
        ];
        files.iter().find_map(|file| look.host.text(file)).map(Config)
    }

    /// `y`, `m`, or `n`.
    fn get(&self, option: &str) -> &str {
        let value = self
            .0
            .lines()
            .find_map(|line| line.strip_prefix("CONFIG_")?.strip_prefix(option)?.strip_prefix('='));
        value.unwrap_or("n").trim()
    }
}

pub fn look(look: &mut Look<'_>) -> Option<Release> {
    let text = look.host.text("proc/sys/kernel/osrelease");
    look.facts.add("kernel", text.as_deref().unwrap_or("unknown"));
    let release = text.as_deref().and_then(Release::parse);
    if let Some(release) = release {
        let Release(major, minor) = release;
        let lacks: Vec<_> = PARTS.iter().filter(|(from, _)| release < *from).map(|(_, what)| *what).collect();
        match lacks.is_empty() {
            true => {}
            false if release < Release(5, 18) => {
                look.find(&KERNEL_OLD, format!("the kernel is {major}.{minor}"))
            }
            false => look.find(
                &KERNEL_PARTIAL,
                format!("the kernel is {major}.{minor}, without {}", lacks.join(", ")),
            ),
        }
    }
    if !look.looks_at_kernel_devices() {
        return release;
    }
    match Config::read(look, text.as_deref().unwrap_or_default()) {
        None => {
            look.facts.add("kernel options", "unknown");
            look.find(&KERNEL_CONFIG, "there is no readable /proc/config.gz or /boot/config of this kernel");
        }
        Some(config) => {
            let options = OPTIONS.map(|option| format!("{option}={}", config.get(option)));
            look.facts.add("kernel options", options.join(" "));
            let is_there = look.host.has("dev/vfio") || look.host.has("sys/module/vfio");
            if config.get("VFIO") == "n" && !is_there {
                look.find(&KERNEL_NO_VFIO, "CONFIG_VFIO is off");
            }
            let lacks: Vec<_> = ["VFIO_DEVICE_CDEV", "IOMMUFD"]
                .into_iter()
                .filter(|option| config.get(option) == "n")
                .collect();
            if config.get("VFIO") != "n" && !lacks.is_empty() {
                look.find(&KERNEL_NO_CDEV, format!("off: CONFIG_{}", lacks.join(", CONFIG_")));
            }
        }
    }
    release
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_told_by_their_first_two_numbers() {
        let release = |text| Release::parse(text);
        assert_eq!(release("6.12.8+deb13-amd64"), Some(Release(6, 12)));
        assert_eq!(release("7.2-rc1"), Some(Release(7, 2)));
        assert!(release("5.9") < release("5.18"));
        for wrong in ["", "six", "6", ".1", "99999999999.1"] {
            assert_eq!(release(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn an_option_is_not_taken_for_a_longer_one() {
        let config = Config("CONFIG_VFIO_PCI=m\n# CONFIG_VFIO is not set\nCONFIG_IOMMUFD=y\n".into());
        assert_eq!((config.get("VFIO"), config.get("VFIO_PCI"), config.get("IOMMUFD")), ("n", "m", "y"));
        assert_eq!(config.get("IOMMUF"), "n");
    }
}
