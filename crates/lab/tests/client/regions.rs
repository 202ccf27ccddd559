//! Regions, interrupts and memory (`vfio.h: VFIO_DEVICE_GET_REGION_INFO`, `VFIO_DEVICE_SET_IRQS`,
//! `VFIO_IOMMU_MAP_DMA`).

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use limosa_client::{Device, DmaMap, DmaMemory, Error, IrqAction, Region};
use limosa_protocol::info::{DeviceFlags, DmaMapFlags, IrqFlags, RegionFlags};
use limosa_protocol::{Errno, pci_index};
use rustix::event::EventfdFlags;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::{Subject, all, of_type, refusal};

fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// How often an eventfd was signalled since it was asked last.
fn signals(fd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(fd, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(rustix::io::Errno::AGAIN) => 0,
        Err(error) => panic!("{error}"),
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn regions_are_those_of_the_kind_and_keep_within_their_bounds() {
    for subject in all() {
        let Subject { what, device, is_ours, .. } = &subject;
        let info = device.info().unwrap();
        assert!(DeviceFlags::from_bits_retain(info.flags).contains(DeviceFlags::PCI), "{what}: {info:?}");
        assert_eq!(
            (info.num_regions, info.num_irqs),
            (pci_index::NUM_REGIONS, pci_index::NUM_IRQS),
            "{what}"
        );
        for index in 0..info.num_regions {
            let region = device.region(index).unwrap();
            assert_eq!(region.info.index, index, "{what}");
            let sparse: &[(u64, u64)] =
                if *is_ours && index == 2 { &[(0x1000, 0x1000), (0x3000, 0x1000)] } else { &[] };
            assert_eq!(region.mappable, sparse, "{what}: region {index}");
            assert_eq!(region.fd.is_some(), !sparse.is_empty(), "{what}: region {index}");
            // Beyond the end of a region begins the next one.
            let size = region.info.size;
            for (offset, bytes) in [(size, 1), (1 << 40, 1), (u64::MAX, 1), (size.saturating_sub(1), 2)] {
                let mut data = vec![0; bytes];
                let error = device.region_read(index, offset, &mut data).unwrap_err();
                assert!(matches!(error, Error::Usage { .. }), "{what}: {error}");
                let error = device.region_write(index, offset, &data).unwrap_err();
                assert!(matches!(error, Error::Usage { .. }), "{what}: {error}");
            }
        }
        assert_eq!(refusal(what, &device.region(info.num_regions).unwrap_err()), Errno::EINVAL, "{what}");
        let config = device.region(pci_index::CONFIG).unwrap().info;
        let flags = RegionFlags::from_bits_retain(config.flags);
        // mtty's lacks the last byte.
        let size = if *is_ours { 256 } else { 255 };
        assert!(config.size == size && flags.contains(RegionFlags::READ | RegionFlags::WRITE), "{what}");
        let mut id = [0; 4];
        device.region_read(pci_index::CONFIG, 0, &mut id).unwrap();
        let expected = if *is_ours { [0x69, 0x4c, 0x6f, 0x6d] } else { [0x48, 0x43, 0x53, 0x32] };
        assert_eq!(id, expected, "{what}");
        device.region_write(pci_index::CONFIG, 0x3c, &[0x2b]).unwrap();
        let mut line = [0];
        device.region_read(pci_index::CONFIG, 0x3c, &mut line).unwrap();
        assert_eq!(line, [0x2b], "{what}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn interrupts_reach_the_eventfds_that_they_are_wired_to() {
    for subject in all() {
        let Subject { what, device, is_ours, .. } = &subject;
        let intx = pci_index::IRQ_INTX;
        let info = device.irq(intx).unwrap();
        let flags = IrqFlags::EVENTFD | IrqFlags::MASKABLE | IrqFlags::AUTOMASKED;
        assert_eq!((info.count, IrqFlags::from_bits_retain(info.flags)), (1, flags), "{what}");
        // Nothing is wired: there is nothing to unwire, and nothing to trigger.
        device.set_irqs(intx, 0, IrqAction::Disable).unwrap();
        device.set_irqs(intx, 0, IrqAction::Wire(&[])).unwrap();
        let fd = eventfd();
        device.set_irqs(intx, 0, IrqAction::Wire(&[Some(fd.as_fd())])).unwrap();
        device.set_irqs(intx, 0, IrqAction::Trigger(1)).unwrap();
        assert_eq!(signals(&fd), 1, "{what}");
        // It masks itself as it fires.
        device.set_irqs(intx, 0, IrqAction::Trigger(1)).unwrap();
        assert_eq!(signals(&fd), 0, "{what}: masked");
        device.set_irqs(intx, 0, IrqAction::Unmask(1)).unwrap();
        signals(&fd);
        device.set_irqs(intx, 0, IrqAction::Unmask(1)).unwrap();
        device.set_irqs(intx, 0, IrqAction::Mask(1)).unwrap();
        device.set_irqs(intx, 0, IrqAction::Trigger(1)).unwrap();
        assert_eq!(signals(&fd), 0, "{what}: masked");
        device.set_irqs(intx, 0, IrqAction::Unmask(1)).unwrap();
        let error = device.set_irqs(intx, 1, IrqAction::Mask(1)).unwrap_err();
        assert_eq!(refusal(what, &error), Errno::EINVAL, "{what}");
        device.set_irqs(intx, 0, IrqAction::Disable).unwrap();
        device.set_irqs(intx, 0, IrqAction::Disable).unwrap();

        let (index, vectors) = if *is_ours { (pci_index::IRQ_MSIX, 4) } else { (pci_index::IRQ_MSI, 1) };
        assert_eq!(device.irq(index).unwrap().count, vectors, "{what}");
        let fds: Vec<OwnedFd> = (0..vectors).map(|_| eventfd()).collect();
        let wires: Vec<_> = fds.iter().map(|fd| Some(fd.as_fd())).collect();
        device.set_irqs(index, 0, IrqAction::Wire(&wires)).unwrap();
        device.set_irqs(index, 0, IrqAction::Trigger(vectors)).unwrap();
        assert!(fds.iter().all(|fd| signals(fd) == 1), "{what}");
        if *is_ours {
            device.set_irqs(index, 1, IrqAction::Wire(&[None, Some(fds[0].as_fd())])).unwrap();
            device.set_irqs(index, 1, IrqAction::Trigger(2)).unwrap();
            assert_eq!(fds.iter().map(signals).collect::<Vec<_>>(), [1, 0, 0, 0], "{what}");
            // Vector 2 of index 2, raised by the device itself.
            device.region_write(pci_index::BAR0, 0x58, &(2 | 2u64 << 32).to_le_bytes()).unwrap();
            assert_eq!(signals(&fds[0]), 1, "{what}");
        }
        device.set_irqs(index, 0, IrqAction::Disable).unwrap();
        for (index, start) in [(index, vectors), (pci_index::NUM_IRQS, 0), (u32::MAX, 0)] {
            let fd = [Some(fds[0].as_fd())];
            let error = device.set_irqs(index, start, IrqAction::Wire(&fd)).unwrap_err();
            assert_eq!(refusal(what, &error), Errno::EINVAL, "{what}: index {index} from {start}");
        }
        assert_eq!(refusal(what, &device.irq(pci_index::NUM_IRQS).unwrap_err()), Errno::EINVAL, "{what}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn memory_that_is_mapped_is_reached_and_when_unmapped_no_more() {
    for subject in all() {
        let Subject { what, device, is_ours, .. } = &subject;
        let memory = limosa_testing::memfd(1 << 16);
        let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
        let file = DmaMemory::File { fd: memory.as_fd(), offset: 0 };
        let map = DmaMap { iova: 0x10_0000, size: 1 << 16, flags, memory: file };
        device.dma_map(&map).unwrap();
        let again = device.dma_map(&map).unwrap_err();
        assert_eq!(again.errno(), Some(Errno::EEXIST), "{what}: {again}");
        let dma = || {
            let write =
                |at, value: u64| device.region_write(pci_index::BAR0, at, &value.to_le_bytes()).unwrap();
            write(0x60, 0x10_1000);
            write(0x68, 4096);
            write(0x70, 7);
            write(0x78, 1);
            let mut status = [0; 8];
            device.region_read(pci_index::BAR0, 0x80, &mut status).unwrap();
            i64::from_le_bytes(status)
        };
        if *is_ours {
            assert_eq!(dma(), 0, "{what}");
            let mut page = [0; 4096];
            memory.read_exact_at(&mut page, 0x1000).unwrap();
            assert!(page.iter().any(|&byte| byte != 0), "{what}: the device wrote nothing");
        }
        device.dma_unmap(0x10_0000, 1 << 16, None).unwrap();
        if *is_ours {
            assert_ne!(dma(), 0, "{what}: it still reaches what was unmapped");
        }
        let gone = device.dma_unmap(0x10_0000, 1 << 16, None).unwrap_err();
        assert_eq!(gone.errno(), Some(Errno::ENOENT), "{what}: {gone}");
    }
}

/// Pages of a region, mapped; only ever accessed with volatile reads and writes.
struct Mapping {
    address: *mut std::ffi::c_void,
    bytes: usize,
}

impl Mapping {
    fn new(region: &Region, (offset, bytes): (u64, u64)) -> rustix::io::Result<Mapping> {
        let (bytes, at) = (bytes as usize, region.info.offset + offset);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let fd = region.fd.as_ref().unwrap();
        // SAFETY: a new mapping, where the kernel likes it.
        let address = unsafe { mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, fd, at) }?;
        Ok(Mapping { address, bytes })
    }

    fn word(&self, at: usize) -> *mut u32 {
        assert!(at.is_multiple_of(4) && at < self.bytes);
        self.address.cast::<u8>().wrapping_add(at).cast()
    }

    fn read(&self, at: usize) -> u32 {
        // SAFETY: it lies in the mapping, aligned, and there are no references to it.
        unsafe { self.word(at).read_volatile() }
    }

    fn write(&self, at: usize, value: u32) {
        // SAFETY: as for `read`.
        unsafe { self.word(at).write_volatile(value) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped here, and nothing refers to it any more.
        unsafe { munmap(self.address, self.bytes) }.unwrap();
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn what_of_a_region_can_be_mapped_is_the_region_itself() {
    for subject in of_type("limosa-full") {
        let Subject { what, device, .. } = &subject;
        let region = device.region(2).unwrap();
        for area in region.mappable.clone() {
            let mapping = Mapping::new(&region, area).unwrap();
            device.region_write(2, area.0 + 8, &0x600d_cafe_u32.to_le_bytes()).unwrap();
            assert_eq!(mapping.read(8), 0x600d_cafe, "{what}: {area:x?}");
            mapping.write(4092, 0x1234_5678);
            let mut word = [0; 4];
            device.region_read(2, area.0 + 4092, &mut word).unwrap();
            assert_eq!(u32::from_le_bytes(word), 0x1234_5678, "{what}: {area:x?}");
        }
        // What lies between the areas cannot be mapped.
        assert!(Mapping::new(&region, (0, 0x1000)).is_err(), "{what}");
        assert!(Mapping::new(&region, (0x1000, 0x2000)).is_err(), "{what}");
    }
}
