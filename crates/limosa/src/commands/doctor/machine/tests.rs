//! Machines made of files: what the doctor finds on each.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use limosa_host::Clock;
use tempfile::TempDir;

use super::*;

/// A system as a test wants it.
struct Played {
    synchronised: bool,
    forbidden: &'static str,
}

impl System for Played {
    fn clock(&self) -> io::Result<Clock> {
        Ok(Clock { synchronised: self.synchronised, error_max: Duration::from_millis(3) })
    }

    fn may_use(&self, node: &Path) -> bool {
        !node.ends_with(self.forbidden)
    }
}

const GOOD: Played = Played { synchronised: true, forbidden: "nothing" };

const CONFIG: &str = "CONFIG_VFIO=m\nCONFIG_VFIO_PCI=m\nCONFIG_VFIO_DEVICE_CDEV=y\nCONFIG_IOMMUFD=m\n";

struct Machine(TempDir);

impl Machine {
    /// One on which nothing stands in the way.
    fn good() -> Machine {
        let machine = Machine(tempfile::tempdir().unwrap());
        for (path, text) in [
            ("proc/sys/kernel/osrelease", "6.12.8-test\n"),
            ("boot/config-6.12.8-test", CONFIG),
            ("proc/sys/vm/max_map_count", "65530\n"),
            ("proc/sys/net/ipv4/tcp_congestion_control", "bbr\n"),
            ("proc/sys/net/ipv4/tcp_available_congestion_control", "reno cubic bbr\n"),
            ("proc/sys/net/ipv4/tcp_wmem", "4096\t16384\t4194304\n"),
            ("proc/sys/net/ipv4/tcp_rmem", "4096\t131072\t6291456\n"),
            ("proc/sys/kernel/yama/ptrace_scope", "0\n"),
            ("sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc\n"),
            ("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "0\n"),
            ("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "0\n"),
            ("sys/kernel/iommu_groups/12/type", "DMA\n"),
            ("sys/module/mlx5_vfio_pci/refcnt", "0\n"),
            ("dev/vfio/vfio", ""),
            ("dev/vfio/12", ""),
            ("dev/iommu", ""),
        ] {
            machine.file(path, text);
        }
        machine.limits("unlimited", "1024");
        machine.capabilities(0);
        // A device that its driver has.
        let device = machine.0.path().join("sys/devices/pci0/0000:65:00.1");
        fs::create_dir_all(device.join("vfio-dev/vfio3")).unwrap();
        fs::write(device.join("vfio-dev/vfio3/dev"), "1:1").unwrap();
        let bus = machine.0.path().join("sys/bus/pci");
        fs::create_dir_all(bus.join("devices")).unwrap();
        for (at, to) in [
            (device.join("subsystem"), bus.clone()),
            (device.join("driver"), bus.join("drivers/mlx5_vfio_pci")),
            (device.join("iommu_group"), machine.0.path().join("sys/kernel/iommu_groups/12")),
            (bus.join("devices/0000:65:00.1"), device),
        ] {
            std::os::unix::fs::symlink(to, at).unwrap();
        }
        machine
    }

    fn file(&self, path: &str, text: impl AsRef<[u8]>) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn gone(&self, path: &str) {
        let path = self.0.path().join(path);
        if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
    }

    fn limits(&self, locked: &str, files: &str) {
        let text = format!(
            "Limit                     Soft Limit           Hard Limit           Units     \n\
             Max open files            {files}                 1048576              files     \n\
             Max locked memory         {locked}              8388608              bytes     \n"
        );
        self.file("proc/self/limits", text);
    }

    fn capabilities(&self, mask: u64) {
        self.file("proc/self/status", format!("Name:\tlimosa\nCapEff:\t{mask:016x}\n"));
    }

    fn look_with(&self, system: &dyn System, wanted: Wanted) -> (Facts, Vec<Finding>) {
        look(&Host::new(self.0.path(), system), wanted)
    }

    /// The ids of what is found, with their levels.
    fn found(&self, system: &dyn System, wanted: Wanted) -> Vec<(&'static str, Level)> {
        self.look_with(system, wanted).1.iter().map(|finding| (finding.id, finding.level)).collect()
    }

    fn ids(&self) -> Vec<&'static str> {
        self.found(&GOOD, Wanted::Machine).into_iter().map(|(id, _)| id).collect()
    }

    fn fact(&self, name: &str) -> String {
        let (facts, _) = self.look_with(&GOOD, Wanted::Machine);
        facts.0.into_iter().find(|fact| fact.0 == name).unwrap().1
    }
}

#[test]
fn a_good_machine_has_no_finding() {
    let machine = Machine::good();
    assert_eq!(machine.found(&GOOD, Wanted::Machine), []);
    assert_eq!(machine.found(&GOOD, Wanted::KernelDevice), []);
    assert_eq!(machine.fact("kernel"), "6.12.8-test");
    assert_eq!(machine.fact("VFIO devices"), "0000:65:00.1");
    assert!(
        machine.fact("kernel options").contains("VFIO_PCI=m") && machine.fact("nodes").contains("/dev/iommu")
    );
}

#[test]
fn an_empty_folder_is_a_machine_of_which_nothing_is_known() {
    let machine = Machine(tempfile::tempdir().unwrap());
    let ids = machine.ids();
    assert_eq!(ids, ["kernel-config-unknown", "vfio-not-loaded", "iommu-off"]);
    assert_eq!(machine.fact("kernel"), "unknown");
    assert_eq!(machine.fact("locked memory"), "unknown");
}

#[test]
fn what_stops_the_kernels_devices_stops_nothing_else() {
    let machine = Machine::good();
    machine.gone("sys/kernel/iommu_groups");
    let off = |wanted| machine.found(&GOOD, wanted).into_iter().find(|(id, _)| *id == "iommu-off");
    assert_eq!(off(Wanted::KernelDevice), Some(("iommu-off", Level::Blocker)));
    assert_eq!(off(Wanted::Machine), Some(("iommu-off", Level::Warning)));
    assert_eq!(off(Wanted::Socket), None);
    machine.gone("dev/vfio");
    assert!(machine.ids().contains(&"vfio-not-loaded"));
    assert_eq!(machine.found(&GOOD, Wanted::Socket), []);
}

#[test]
fn kernels_are_told_by_their_release_and_options() {
    let machine = Machine::good();
    machine.file("boot/config-6.12.8-test", "# CONFIG_VFIO is not set\n");
    machine.gone("dev/vfio");
    assert!(machine.ids().contains(&"kernel-without-vfio"));
    machine.file("boot/config-6.12.8-test", "CONFIG_VFIO=y\nCONFIG_IOMMUFD=m\n");
    let (_, findings) = machine.look_with(&GOOD, Wanted::Machine);
    let cdev = findings.iter().find(|finding| finding.id == "kernel-without-cdev").unwrap();
    assert_eq!(cdev.what, "off: CONFIG_VFIO_DEVICE_CDEV");
    for (release, expected) in
        [("5.15.0", "kernel-old"), ("6.1.0", "kernel-partial"), ("5.4", "pidfd-getfd-missing")]
    {
        machine.file("proc/sys/kernel/osrelease", release);
        assert!(machine.ids().contains(&expected), "{release}: {:?}", machine.ids());
    }
    assert!(machine.ids().contains(&"kernel-config-unknown"), "the file is of another release");
}

#[test]
fn a_configuration_is_unpacked_and_one_that_is_damaged_is_not_believed() {
    let machine = Machine::good();
    machine.gone("boot");
    let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
    packed.write_all(CONFIG.as_bytes()).unwrap();
    let packed = packed.finish().unwrap();
    machine.file("proc/config.gz", &packed);
    assert_eq!(machine.found(&GOOD, Wanted::Machine), []);
    for damaged in [&packed[..packed.len() / 2], b"no gzip", b""] {
        machine.file("proc/config.gz", damaged);
        assert_eq!(machine.ids(), ["kernel-config-unknown"]);
    }
    // The release of the kernel is a file's name, and leads nowhere else.
    machine.file("proc/sys/kernel/osrelease", "../../etc/passwd");
    machine.file("boot/config-passwd", CONFIG);
    assert!(!machine.ids().contains(&"kernel-config-unknown"));
}

#[test]
fn limits_that_are_tiny_are_found() {
    let machine = Machine::good();
    machine.limits("65536", "256");
    machine.file("proc/sys/vm/max_map_count", "1000");
    assert_eq!(machine.ids(), ["memlock-low", "open-files-low", "map-count-low"]);
    assert_eq!(machine.fact("open files"), "256");
    machine.capabilities(1 << 14);
    assert_eq!(machine.ids(), ["open-files-low", "map-count-low"], "CAP_IPC_LOCK");
    machine.file("proc/self/limits", "nonsense\nMax open files\n");
    assert_eq!(machine.ids(), ["map-count-low"]);
}

#[test]
fn huge_pages_that_are_promised_are_not_free() {
    let machine = Machine::good();
    let file = |name: &str, value: &str| {
        machine.file(&format!("sys/kernel/mm/hugepages/hugepages-2048kB/{name}"), value);
    };
    file("nr_hugepages", "16");
    file("free_hugepages", "4");
    assert_eq!(machine.ids(), [] as [&str; 0]);
    file("resv_hugepages", "4");
    assert_eq!(machine.ids(), ["huge-pages-taken"]);
}

#[test]
fn nodes_that_this_user_may_not_open_are_named() {
    let machine = Machine::good();
    let forbidden = Played { forbidden: "dev/iommu", ..GOOD };
    let (_, findings) = machine.look_with(&forbidden, Wanted::Machine);
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert_eq!(
        (findings[0].id, findings[0].what.as_str()),
        ("node-forbidden", "not for this user: /dev/iommu")
    );
}

#[test]
fn devices_that_cannot_be_opened_say_why() {
    let machine = Machine::good();
    machine.gone("dev/vfio/12");
    let (_, findings) = machine.look_with(&GOOD, Wanted::Machine);
    let finding = findings.iter().find(|finding| finding.id == "vfio-device-unusable").unwrap();
    assert!(
        finding.what.contains("0000:65:00.1") && finding.remedy.contains("load the module vfio"),
        "{finding:?}"
    );
    machine.gone("sys/bus");
    assert!(machine.ids().contains(&"vfio-no-device"));
}

#[test]
fn clocks_networks_and_tracing_have_findings() {
    let machine = Machine::good();
    machine.file("sys/devices/system/clocksource/clocksource0/current_clocksource", "hpet");
    machine.file("proc/sys/net/ipv4/tcp_congestion_control", "cubic");
    machine.file("proc/sys/net/ipv4/tcp_wmem", "4096 16384 65536");
    machine.file("proc/sys/kernel/yama/ptrace_scope", "1");
    let off = Played { synchronised: false, ..GOOD };
    let ids: Vec<_> = machine.found(&off, Wanted::Socket).into_iter().map(|(id, _)| id).collect();
    let expected = [
        "congestion-control",
        "tcp-buffers-small",
        "clock-source-slow",
        "clock-not-synchronised",
        "ptrace-limited",
    ];
    assert_eq!(ids, expected);
    machine.capabilities(1 << 19);
    for (scope, found) in [("1", false), ("2", false), ("3", true)] {
        machine.file("proc/sys/kernel/yama/ptrace_scope", scope);
        assert_eq!(machine.ids().iter().any(|id| id.starts_with("ptrace")), found, "{scope}");
    }
}

/// A FIFO in place of a file would be waited for when it is opened.
#[test]
fn what_is_no_file_is_not_opened_and_told() {
    let machine = Machine::good();
    machine.gone("proc/sys/vm/max_map_count");
    machine.file("proc/sys/vm/x", "");
    let fifo = machine.0.path().join("proc/sys/vm/max_map_count");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let (_, findings) = machine.look_with(&GOOD, Wanted::Machine);
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert!(
        findings[0].id == "facts-unreadable" && findings[0].what.contains("max_map_count"),
        "{findings:?}"
    );
}
