//! The client of the crate `vfio_user` 0.1.7 drives the server.

mod common;

use std::os::fd::AsRawFd;

use common::Served;
use common::device::*;
use limosa_testing::memfd;
use rustix::event::{EventfdFlags, eventfd};
use vfio_user::Client;

#[test]
fn regions_with_their_fds_and_areas_are_found() {
    let served = Served::new();
    let client = Client::new(served.path()).unwrap();
    let bar0 = client.region(BAR0).unwrap();
    assert_eq!((bar0.flags, bar0.size, bar0.file_offset.is_some()), (3, 1 << 20, false));
    let bar1 = client.region(BAR1).unwrap();
    assert_eq!((bar1.flags, bar1.size), (0xf, 16 << 10));
    let areas: Vec<_> = bar1.sparse_areas.iter().map(|area| (area.offset, area.size)).collect();
    assert_eq!(areas, [(0, 4096), (8192, 4096)]);
    let file = bar1.file_offset.as_ref().unwrap();
    rustix::io::pwrite(file.file(), b"through the file", 8192).unwrap();
    let mut client = client;
    let mut data = [0; 16];
    client.region_read(BAR1, 8192, &mut data).unwrap();
    assert_eq!(&data, b"through the file");
    assert_eq!(client.region(CONFIG).unwrap().size, 256);
    assert_eq!(client.region(BAR4).unwrap().size, 0);
}

#[test]
fn regions_are_read_and_written() {
    let served = Served::new();
    let mut client = Client::new(served.path()).unwrap();
    let data: Vec<u8> = (0..100_000).map(|i: u32| i as u8).collect();
    client.region_write(BAR0, 16, &data).unwrap();
    let mut back = vec![0; data.len()];
    client.region_read(BAR0, 16, &mut back).unwrap();
    assert_eq!(back, data);
    client.reset().unwrap();
    client.region_read(BAR0, 16, &mut back).unwrap();
    assert!(back.iter().all(|&byte| byte == 0));
}

#[test]
fn memory_is_mapped_used_and_unmapped() {
    let served = Served::new();
    let mut client = Client::new(served.path()).unwrap();
    let memory = memfd(1 << 16);
    rustix::io::pwrite(&memory, b"guest memory", 4096).unwrap();
    client.dma_map(4096, 0x8000_0000, 0x4000, memory.as_raw_fd()).unwrap();
    let engine = |operation: u64, iova: u64| [operation, iova, 12].map(u64::to_ne_bytes).concat();
    client.region_write(BAR2, 0, &engine(DMA_READ_NOW, 0x8000_0000)).unwrap();
    client.region_write(BAR2, 0, &engine(DMA_WRITE_NOW, 0x8000_3000)).unwrap();
    let mut data = [0; 12];
    rustix::io::pread(&memory, &mut data, 0x4000).unwrap();
    assert_eq!(&data, b"guest memory");
    client.dma_unmap(0x8000_0000, 0x4000).unwrap();
    assert!(served.machine.bus().memory.read(0x8000_0000, &mut data).is_err());
}

#[test]
fn interrupts_arrive() {
    let served = Served::new();
    let mut client = Client::new(served.path()).unwrap();
    let info = client.get_irq_info(MSIX).unwrap();
    assert_eq!((info.index, info.flags, info.count), (MSIX, 1, 8));
    let fds = [eventfd(0, EventfdFlags::CLOEXEC).unwrap(), eventfd(0, EventfdFlags::CLOEXEC).unwrap()];
    // DATA_EVENTFD and ACTION_TRIGGER.
    client.set_irqs(MSIX, 0x24, 3, 2, &fds.each_ref().map(|fd| fd.as_raw_fd())).unwrap();
    served.machine.bus().interrupts.raise(MSIX, 4);
    let mut count = [0; 8];
    rustix::io::read(&fds[1], &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);
    // DATA_NONE, ACTION_TRIGGER, count 0: no more.
    client.set_irqs(MSIX, 0x21, 0, 0, &[]).unwrap();
    assert!(!served.machine.bus().interrupts.any_wired(MSIX));
}

#[test]
fn clients_come_and_go() {
    let served = Served::new();
    for i in 0..10u8 {
        let mut client = Client::new(served.path()).unwrap();
        let mut data = [0];
        client.region_read(BAR0, 0, &mut data).unwrap();
        assert_eq!(data, [i], "what the client before left");
        client.region_write(BAR0, 0, &[i + 1]).unwrap();
        client.shutdown().unwrap();
    }
}
