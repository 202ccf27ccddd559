//! What every other suite takes for granted: the kernel, both doors to VFIO, devices that come and go.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::thread;

use limosa_lab::{Mdev, kinds, limosa};

fn is_character_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_char_device())
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn the_kernel_is_no_older_than_6_12() {
    let version = fs::read_to_string("/proc/version").unwrap();
    let number = version.strip_prefix("Linux version ").expect(&version);
    let mut parts = number.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let release = (parts.next().unwrap(), parts.next().unwrap());
    assert!(release >= (6, 12), "{version}");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn both_doors_to_vfio_are_there() {
    for door in ["/dev/vfio/vfio", "/dev/iommu"] {
        assert!(is_character_device(Path::new(door)), "{door}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn every_kind_of_device_has_a_cdev_and_a_group_at_once_and_loses_them_at_once() {
    let kinds = kinds();
    assert!(kinds.iter().any(|kind| kind.name == "mtty-1"), "{kinds:?}");
    for kind in kinds {
        let device = kind.create();
        let (cdev, group) = (device.cdev(), Path::new("/dev/vfio").join(device.group().to_string()));
        for node in [&cdev, &group] {
            assert!(is_character_device(node), "{kind:?}: {}", node.display());
        }
        drop(device);
        for node in [&cdev, &group] {
            assert!(!node.exists(), "{kind:?}: {} outlived its device", node.display());
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn devices_made_side_by_side_are_different_ones() {
    let makers: Vec<_> = (0..8).map(|_| thread::spawn(|| Mdev::create("mtty", "mtty-1"))).collect();
    let devices: Vec<Mdev> = makers.into_iter().map(|maker| maker.join().unwrap()).collect();
    let mut cdevs: Vec<_> = devices.iter().map(Mdev::cdev).collect();
    cdevs.sort();
    cdevs.dedup();
    assert_eq!(cdevs.len(), 8, "{cdevs:?}");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_that_is_pulled_out_is_gone_when_the_kernel_says_so() {
    let device = Mdev::create("mtty", "mtty-1");
    device.unplug().recv().unwrap().unwrap();
    assert!(!Path::new("/sys/bus/mdev/devices").join(device.uuid()).exists());
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn the_command_runs_under_this_kernel() {
    let output = limosa().arg("--version").output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
