//! Memory in address spaces, through both doors.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::path::Path;

use limosa_lab::Mdev;
use limosa_protocol::Errno;
use limosa_vfio_kernel::{AddressSpace, Door};

use crate::{file, memory};

fn device(path: impl AsRef<Path>) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn memory_is_mapped_before_and_after_devices_come_and_unmapped_in_its_pieces() {
    for door in [Door::Cdev, Door::Group] {
        let mtty = Mdev::create("mtty", "mtty-1");
        let space = AddressSpace::new(door).unwrap();
        let guest = memory(1 << 20);
        space.map("dev", &file(&guest, 0x10_0000, 0x10000)).unwrap();
        let again = space.map("dev", &file(&guest, 0x10_f000, 0x1000)).unwrap_err();
        assert_eq!(again.errno(), Some(Errno::EEXIST), "{again}");
        let opened = match door {
            Door::Cdev => {
                let cdev = device(mtty.cdev());
                space.attach_cdev("dev", cdev.as_fd()).unwrap();
                cdev
            }
            Door::Group => {
                let group = device(format!("/dev/vfio/{}", mtty.group()));
                space.attach_group("dev", group.as_fd()).unwrap();
                group
            }
        };
        let again = space.map("dev", &file(&guest, 0x10_f000, 0x1000)).unwrap_err();
        assert_eq!(again.errno(), Some(Errno::EEXIST), "{again}");
        space.map("dev", &file(&guest, 0x20_0000, 0x10000)).unwrap();
        let odd = space.map("dev", &file(&guest, 0x30_0000, 0x1001)).unwrap_err();
        assert_eq!(odd.errno(), Some(Errno::EINVAL), "{odd}");
        let part = space.unmap("dev", 0x10_0000, 0x1000, None).unwrap_err();
        assert_eq!(part.errno(), Some(Errno::EINVAL), "{part}");
        space.unmap("dev", 0x10_0000, 0x10000, None).unwrap();
        let gone = space.unmap("dev", 0x10_0000, 0x10000, None).unwrap_err();
        assert_eq!(gone.errno(), Some(Errno::ENOENT), "{gone}");
        assert_eq!(space.iova_ranges().unwrap().alignment, 4096);
        drop(opened);
        space.unmap("dev", 0x20_0000, 0x10000, None).unwrap();
    }
}
