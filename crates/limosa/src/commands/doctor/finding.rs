//! [`Finding`]: an obstacle that the doctor found, and [`KINDS`]: the list of everything that it can find.
//! `docs/doctor.md` is generated from that list.

use serde::Serialize;

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Worth knowing.
    Note,
    /// A move is possible, but with a disadvantage.
    Warning,
    /// No move is possible.
    Blocker,
}

impl Level {
    pub fn name(self) -> &'static str {
        match self {
            Level::Note => "note",
            Level::Warning => "warning",
            Level::Blocker => "blocker",
        }
    }
}

/// The devices that a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// Every machine and device.
    Any,
    /// Kernel devices. Such findings are looked for if no device or a kernel device is named; without a kernel
    /// device a blocker is only a warning.
    Kernel,
}

/// A kind of finding.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    pub id: &'static str,
    section: &'static str,
    pub level: Level,
    pub about: About,
    /// The obstacle, in general.
    title: &'static str,
    /// Why that matters.
    means: &'static str,
    /// The remedy, in general.
    pub remedy: &'static str,
}

macro_rules! kinds {
    ($($section:literal { $($name:ident = $id:literal, $level:ident, $about:ident: $title:literal,
        $means:literal, $remedy:literal;)* })*) => {
        $($(pub static $name: Kind = Kind {
            id: $id,
            section: $section,
            level: Level::$level,
            about: About::$about,
            title: $title,
            means: $means,
            remedy: $remedy,
        };)*)*
        /// Everything that can be found, in the order of the page.
        pub static KINDS: &[&Kind] = &[$($(&$name,)*)*];
    };
}

kinds! {
    "The kernel" {
        KERNEL_OLD = "kernel-old", Blocker, Kernel: "The kernel is older than 5.18.",
            "Version 2 of the migration protocol is in Linux from 5.18 on. No driver of this kernel migrates.",
            "Run a kernel from 6.7 on, which has everything that Limosa can use.";
        KERNEL_PARTIAL = "kernel-partial", Note, Kernel: "The kernel lacks newer parts of the protocol.",
            "DMA logging by devices came with 6.1, pre-copy and MIG_DATA_SIZE with 6.2, the cdev with 6.6, dirty tracking by iommufd with 6.7.",
            "Run a kernel from 6.7 on, if the missing parts matter: without them more of a move is downtime.";
        KERNEL_CONFIG = "kernel-config-unknown", Note, Kernel: "The configuration of the kernel cannot be read.",
            "Neither /proc/config.gz nor a file config-RELEASE exists, so the kernel's build options are unknown. Modules and nodes still show what is loaded.",
            "modprobe configs, or install the configuration of this kernel in /boot.";
        KERNEL_NO_VFIO = "kernel-without-vfio", Blocker, Kernel: "The kernel was built without VFIO.",
            "CONFIG_VFIO is off, so no device can be passed to user space.",
            "Run a kernel with CONFIG_VFIO, CONFIG_VFIO_PCI and CONFIG_IOMMUFD.";
        KERNEL_NO_CDEV = "kernel-without-cdev", Note, Kernel: "The kernel has no cdev for devices.",
            "Without CONFIG_VFIO_DEVICE_CDEV and CONFIG_IOMMUFD devices are opened through their group. That works, but the IOMMU cannot track dirty pages.",
            "Nothing. Dirty tracking by the IOMMU needs a kernel with both options.";
        VFIO_NOT_LOADED = "vfio-not-loaded", Blocker, Kernel: "There is no /dev/vfio.",
            "The kernel's VFIO modules are not loaded, or the nodes are not passed into this container.",
            "modprobe vfio-pci, or the device's own VFIO driver; for a container, pass /dev/vfio and /dev/iommu into it.";
        VFIO_NO_DEVICE = "vfio-no-device", Warning, Kernel: "No device is bound to a VFIO driver.",
            "There is no kernel device to move.",
            "Bind a device to a VFIO driver; for migration, to the driver for that device (driverctl set-override 0000:65:00.1 mlx5_vfio_pci); `limosa probe --all` lists candidates.";
        VFIO_NO_MIGRATION_DRIVER = "vfio-no-migration-driver", Note, Kernel: "No VFIO driver with migration is loaded.",
            "vfio-pci binds to any PCI device, but has no migration. Migration needs a driver for the device.",
            "modprobe the driver of the device: mlx5_vfio_pci, hisi_acc_vfio_pci, pds_vfio_pci, qat_vfio_pci, xe_vfio_pci or virtio_vfio_pci.";
        VFIO_DEVICE_UNUSABLE = "vfio-device-unusable", Warning, Kernel: "A VFIO device cannot be opened.",
            "Its group is shared with drivers of the host, its node is missing, or this user may not open it. The finding says which.",
            "As the finding says; `limosa probe` lists all devices.";
    }
    "The IOMMU" {
        IOMMU_OFF = "iommu-off", Blocker, Kernel: "There are no IOMMU groups.",
            "The IOMMU is off or missing, so a PCI device cannot be confined to the memory of its guest, and VFIO does not allow its use.",
            "Enable it in the firmware (VT-d, AMD-Vi, SMMU) and, if needed, on the kernel's command line: intel_iommu=on.";
        IOMMU_UNSAFE = "iommu-unsafe", Warning, Kernel: "VFIO allows the use of devices without an IOMMU.",
            "enable_unsafe_noiommu_mode is on: such a device can access all memory of the machine.",
            "Enable the IOMMU, and disable unsafe mode: echo N > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode.";
        NODE_FORBIDDEN = "node-forbidden", Warning, Kernel: "This user may not open a node of VFIO or iommufd.",
            "Devices are opened through /dev/vfio/devices/vfioN and /dev/iommu, or through /dev/vfio/GROUP and /dev/vfio/vfio.",
            "chown the node to the user, and add a udev rule to make that permanent, or run limosa as root.";
    }
    "Limits" {
        MEMLOCK_LOW = "memlock-low", Warning, Kernel: "The limit for locked memory is low.",
            "Guest memory that is mapped for a kernel device is pinned, and counts against RLIMIT_MEMLOCK of the user who maps it.",
            "Raise the limit to slightly more than the memory of the guest: LimitMEMLOCK= of a systemd unit, memlock in limits.conf, or CAP_IPC_LOCK.";
        FILES_LOW = "open-files-low", Warning, Any: "The limit for open files is low.",
            "Each device takes several descriptors, and each link, data stream, mapping and interrupt takes another one.",
            "Raise the soft limit to 1024 or more: ulimit -n, or LimitNOFILE= of a systemd unit.";
        MAPS_LOW = "map-count-low", Warning, Any: "The limit for mappings of a process is low.",
            "A device server maps guest memory, and a VMM maps regions of devices. Below the kernel's default of 65530, large guests run out of mappings.",
            "sysctl vm.max_map_count=65530, or more.";
        HUGE_PAGES_TAKEN = "huge-pages-taken", Note, Any: "All huge pages are in use.",
            "A destination with guest memory on hugetlbfs is refused if too few huge pages are free.",
            "Reserve more in /sys/kernel/mm/hugepages/hugepages-SIZE/nr_hugepages before such a guest moves here.";
    }
    "The network" {
        CONGESTION = "congestion-control", Note, Any: "TCP does not use bbr.",
            "Over long or lossy paths bbr keeps a link full when cubic and reno slow down. Within a local network there is little difference.",
            "modprobe tcp_bbr; sysctl net.ipv4.tcp_congestion_control=bbr, for moves over long paths.";
        TCP_BUFFERS = "tcp-buffers-small", Note, Any: "The limits of TCP buffers are low.",
            "A link carries at most one buffer of data in each round trip: 4 MiB are enough for 25 Gbit/s at 1.3 ms.",
            "Raise the last of the three numbers of net.ipv4.tcp_wmem at the source and of net.ipv4.tcp_rmem at the destination, or send with --links auto.";
    }
    "The clock" {
        CLOCK_SLOW = "clock-source-slow", Warning, Any: "The clock source is slow.",
            "Each reading of the clock accesses a device instead of the processor's own counter. This also slows down guests, and makes measurements of short times inaccurate.",
            "Find out why the kernel does not trust the counter (dmesg | grep -i tsc), and set the source in /sys/devices/system/clocksource/clocksource0/current_clocksource.";
        CLOCK_OFF = "clock-not-synchronised", Warning, Any: "The wall clock is not synchronised.",
            "Certificates have a period of validity, so TLS between two hosts fails if a clock is wrong. The reports of both sides are then also hard to compare.",
            "Run a time service: chronyd, systemd-timesyncd or ntpd.";
    }
    "Processes" {
        PTRACE_LIMITED = "ptrace-limited", Note, Any: "Processes of the same user may not duplicate each other's descriptors.",
            "kernel.yama.ptrace_scope is 1. Devices and memory of a VMM (/proc/PID/fd/N) are duplicated by pidfd_getfd, and so are the descriptors of the old server in `limosa switch-over`; both need the right to trace the process.",
            "Run these commands as root, or have the old server start the new one.";
        PTRACE_OFF = "ptrace-off", Warning, Any: "Only processes with a capability, or no process at all, may duplicate descriptors of others.",
            "kernel.yama.ptrace_scope is 2 (CAP_SYS_PTRACE is needed) or 3 (no process may, until the next boot). The effects are those of ptrace-limited.",
            "With 2, run these commands as root; with 3, start the new server from the old one, and boot with a lower value.";
        PIDFD_GETFD = "pidfd-getfd-missing", Warning, Any: "The kernel is older than 5.6.",
            "It has no pidfd_getfd, so descriptors of other processes cannot be duplicated: limosa cannot use the devices of a VMM, and there is no switch-over.",
            "Run a newer kernel.";
        UNREADABLE = "facts-unreadable", Note, Any: "Some files with facts about the machine cannot be read.",
            "Their facts are missing above, and cannot lead to findings.",
            "Run limosa doctor as root, or outside of the container.";
    }
    "Reaching a device" {
        DEVICE_MISSING = "device-not-there", Blocker, Any: "There is no such device.",
            "The name is neither a socket nor a kernel device, or no server listens at the socket.",
            "Start its server, or use a name that `limosa probe` lists.";
        DEVICE_FORBIDDEN = "device-forbidden", Blocker, Any: "This user may not open the device.",
            "The node or the socket belongs to another user, or the server runs as a user that is not trusted.",
            "Give the node to this user (chown), admit the user (limosa serve --mode 660 --group GROUP), or trust the server's user with --server-uid.";
        DEVICE_IN_USE = "device-in-use", Blocker, Any: "Another process has the device open.",
            "The kernel lets only one process open a device.",
            "Name it by that process's descriptor, /proc/PID/fd/N: `limosa probe` lists that name.";
        DEVICE_SILENT = "device-silent", Blocker, Any: "The device does not answer within the limit.",
            "Its server hangs, or serves another client: servers of other implementations serve one client at a time. A kernel driver that does not return cannot be interrupted.",
            "Check the server; end the other client; or allow more time with --timeout.";
        DEVICE_GONE = "device-gone", Blocker, Any: "The device went away during the examination.",
            "Its server ended, or the device was unplugged.",
            "Check the server's log, and restart it.";
        DEVICE_NOT_VFIO_USER = "device-not-vfio-user", Blocker, Any: "The other end breaks the protocol.",
            "The process that listens there does not speak vfio-user, or violates it.",
            "Name the socket of a vfio-user server. `limosa check` names the clauses that a server breaks.";
        DEVICE_UNUSABLE = "device-unusable", Blocker, Any: "The device cannot be used.",
            "It is bound to another driver, its IOMMU group is shared with the host, or it refuses a request that every device has to answer.",
            "As the finding says.";
    }
    "What a device can do" {
        NO_MIGRATION = "no-migration", Blocker, Any: "The device has no migration.",
            "Its driver or server has no feature MIGRATION, or lacks its flag STOP_COPY.",
            "Bind it to the driver for this device, with a firmware that supports migration; vfio-pci has no migration.";
        NO_PRE_COPY = "no-pre-copy", Note, Any: "The device has no pre-copy.",
            "All of its state moves while its guest is stopped.",
            "Nothing, if the state is small; see the estimate of the downtime.";
        NO_P2P = "no-p2p", Note, Any: "The device has no P2P states.",
            "Devices that move together are stopped one after the other, and those that still run may write to the memory of stopped ones.",
            "Nothing, if the machine has one device, or if its guest does not let devices access each other.";
        NO_DATA_SIZE = "no-data-size", Warning, Any: "The device does not report how much state it has.",
            "Without MIG_DATA_SIZE a downtime cannot be predicted, and a move with --downtime-limit is refused.",
            "Measure the size with --measure, and use --state-max for a device with more than 1 GiB of state.";
        NO_DIRTY_LOG = "no-dirty-log", Warning, Any: "The device's writes to guest memory are not logged.",
            "Neither the device nor an IOMMU tracks its writes, so a move with guest memory sends all of it after the stop.",
            "Use a device with DMA logging, or a kernel and an IOMMU with dirty tracking (iommufd from 6.7 on).";
        IOMMU_NO_DIRTY = "iommu-no-dirty-tracking", Note, Kernel: "The IOMMU does not track dirty pages.",
            "Only the device's own log records its writes.",
            "Nothing, if the device's log covers all of the guest's memory.";
        LOG_REFUSED = "log-refused", Warning, Any: "The device has DMA logging, but refuses to start it.",
            "Another client may already be logging, or the device cannot log as much memory as requested.",
            "End the other user of the log; otherwise see the refusal.";
        LOG_COARSE = "log-coarse", Note, Any: "The device logs pages larger than 4 KiB.",
            "A write of one byte makes a whole large page dirty, and the page is sent again.",
            "Nothing; a guest with scattered writes needs more rounds.";
        SMALL_MESSAGES = "small-messages", Note, Any: "The server's messages are small.",
            "Each message is a round trip, so state moves slowly in small messages.",
            "Have the server announce a larger max_data_xfer_size: 1 MiB is usual.";
    }
    "The state of a device" {
        BESIDE_VMM = "beside-vmm", Note, Any: "A VMM is using the device.",
            "Limosa connects in addition to the VMM and moves the device while its guest runs; the VMM or --stop-with has to stop the guest.",
            "Nothing.";
        IN_ERROR = "device-in-error", Blocker, Any: "The device is in ERROR.",
            "No arc leaves ERROR, and the device's state is lost.",
            "limosa state DEVICE reset; or, while a VMM uses it, have the VMM reset it.";
        STANDS = "device-stands", Warning, Any: "The device is in STOP.",
            "Its guest is paused, or was moved away. In the second case another move would overwrite that guest with old state.",
            "If it is paused, move it with --stopped; to run its guest here, limosa state DEVICE set RUNNING.";
        MIDWAY = "device-midway", Blocker, Any: "The device is in the middle of a move.",
            "Another command is using it, or was killed.",
            "limosa resolve DEVICE, if there is a note of it; otherwise as the finding says.";
        IN_DOUBT = "device-in-doubt", Blocker, Any: "The device stays stopped until a move of it is decided.",
            "A sender was about to commit, and has not told the device how the move ended; or the move is done, and its guest runs elsewhere.",
            "limosa resolve DEVICE, if its move is noted here; otherwise the command that the finding names, but only if its guest runs nowhere else.";
        NOT_RESTORED = "device-not-restored", Blocker, Any: "The device does not run again after the measurement.",
            "An arc back to RUNNING failed.",
            "limosa state DEVICE set RUNNING; if that is refused, limosa state DEVICE reset, which loses its state.";
        NOT_MEASURED = "not-measured", Warning, Any: "The device could not be measured.",
            "An arc was refused or hung, a guest is using the device and --in-use was not given, or the device does not run.",
            "As the finding says.";
    }
    "Two devices" {
        SAME_DEVICE = "pair-same-device", Blocker, Any: "Both names are names of the same device.",
            "A device cannot be moved to itself.",
            "Name another one.";
        DIFFERS = "pair-differs", Blocker, Any: "The two devices differ in a fact that has to match.",
            "The engine compares the kinds, PCI identifications, regions and interrupts of both sides before it touches them. The device itself checks its data when it loads it; an unknown version is detected only then.",
            "Move to a device of the same make and configuration.";
        PAIR_FLAGS = "pair-flags", Note, Any: "The two devices have different migration flags.",
            "A move is possible. After it, the device may lack pre-copy or P2P.",
            "Nothing.";
        DESTINATION_USED = "pair-destination-used", Warning, Any: "A VMM is using the destination, whose device runs.",
            "The move replaces the state of the destination's device. A guest that runs on it loses that state.",
            "Have the destination's VMM wait for an incoming guest.";
    }
}

/// An obstacle that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    pub id: &'static str,
    pub level: Level,
    /// A device, or `machine`.
    pub subject: String,
    /// The obstacle, with the values that were found.
    pub what: String,
    pub remedy: String,
    /// Where it is described.
    pub page: String,
}

impl Finding {
    pub fn new(kind: &'static Kind, subject: &str, what: impl Into<String>) -> Finding {
        Finding {
            id: kind.id,
            level: kind.level,
            subject: subject.into(),
            what: what.into(),
            remedy: kind.remedy.into(),
            page: format!("docs/doctor.md#{}", kind.id),
        }
    }

    /// The same with a remedy for this very case.
    pub fn with_remedy(self, remedy: impl Into<String>) -> Finding {
        Finding { remedy: remedy.into(), ..self }
    }
}

/// The page of the doctor: what it does, and everything that it can find.
pub fn document() -> String {
    let mut text = String::from(include_str!("page.md"));
    let mut section = "";
    for kind in KINDS {
        if kind.section != section {
            section = kind.section;
            text += &format!("\n## {section}\n");
        }
        let level = match (kind.level, kind.about) {
            (Level::Blocker, About::Kernel) => "blocker for a kernel device, otherwise a warning",
            (level, _) => level.name(),
        };
        text += &format!("\n### {}\n\n{} (*{level}*)\n\n{}\n\n", kind.id, kind.title, kind.means);
        text += &format!("What to do: {}\n", kind.remedy);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_page_of_findings_is_that_of_the_source() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/doctor.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, document()).unwrap();
        }
        let page = std::fs::read_to_string(path).unwrap();
        assert!(page == document(), "run `limosa doctor --findings > docs/doctor.md`");
    }

    #[test]
    fn ids_are_unique_and_anchors_of_the_page() {
        let ids: BTreeSet<_> = KINDS.iter().map(|kind| kind.id).collect();
        assert_eq!(ids.len(), KINDS.len(), "an id twice");
        let is_anchor =
            |id: &&str| id.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-' || byte == b'2');
        assert!(ids.iter().all(is_anchor), "{ids:?}");
        let finding = Finding::new(&IOMMU_OFF, "machine", "none");
        let anchor = finding.page.split_once('#').unwrap().1.to_owned();
        assert!(document().contains(&format!("\n### {anchor}\n")));
    }
}
