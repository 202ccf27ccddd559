//! The client against the server of the crate `vfio_user`, written by others.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use limosa_client::{Device, DeviceExt, DmaMap, DmaMemory, IrqAction};
use limosa_protocol::info::{DmaMapFlags, RegionFlags};
use limosa_protocol::{Errno, State};
use limosa_test_device::{ForeignDevice, ForeignServer, WRITTEN};
use limosa_vfio_user::client::{Client, Options};
use rustix::event::{EventfdFlags, eventfd};

#[test]
fn a_server_of_the_crate_vfio_user_is_driven() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("device.sock");
    let device = ForeignDevice {
        memory_bytes: 1 << 20,
        mappable: Some(tempfile::tempfile().unwrap().into()),
        vectors: 40,
        answers: true,
    };
    // One connection: the client must not lose it by asking for features.
    let server = ForeignServer::start(&path, device);

    let client = Client::connect(&path, Options::default()).unwrap();
    assert!(client.migration_flags().unwrap().is_empty(), "it has no features");
    assert!(client.set_state(State::Stop).map(drop).unwrap_err().is_refused(Errno::ENOTTY));
    assert_eq!(client.mig_data_size().unwrap(), None);
    assert_eq!(client.reset_count().unwrap(), None);
    let info = client.info().unwrap();
    assert_eq!((info.num_regions, info.num_irqs), (9, 5));
    let bar1 = client.region(1).unwrap();
    assert_eq!(bar1.mappable, [(4096, 4096)]);
    assert!(bar1.fd.is_some());
    let flags = RegionFlags::from_bits_retain(client.region(0).unwrap().info.flags);
    assert_eq!(flags, RegionFlags::READ | RegionFlags::WRITE);
    assert_eq!(client.irq(2).unwrap().count, 40);
    for bytes in [1usize, 8, 4096, 100_000, 1 << 20] {
        let data: Vec<u8> = (0..bytes).map(|i| (i * 13 + bytes) as u8).collect();
        client.region_write(0, 0, &data).unwrap();
        let mut read = vec![0; bytes];
        client.region_read(0, 0, &mut read).unwrap();
        assert!(read == data, "{bytes} bytes");
    }
    client.region_write_posted(0, 16, &[5; 8]).unwrap();
    let mut eight = [0; 8];
    client.region_read(0, 16, &mut eight).unwrap();
    assert_eq!(eight, [5; 8]);
    // It refuses, even what is posted, and stays in step.
    assert!(client.region_read(0, 1 << 20, &mut eight).is_err());
    client.region_write_posted(0, 1 << 20, &eight).unwrap();
    assert!(client.region_read(99, 0, &mut eight).unwrap_err().is_refused(Errno::EINVAL));
    client.region_read(0, 16, &mut eight).unwrap();

    let memory = tempfile::tempfile().unwrap();
    memory.set_len(16384).unwrap();
    let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
    let file = DmaMemory::File { fd: memory.as_fd(), offset: 4096 };
    client.dma_map(&DmaMap { iova: 0x1000, size: 8192, flags, memory: file }).unwrap();
    let mut written = [0; WRITTEN.len()];
    memory.read_exact_at(&mut written, 4096).unwrap();
    assert_eq!(written, WRITTEN);
    client.dma_unmap(0x1000, 8192, None).unwrap();

    // It lets one fd come in a message, as it announces.
    let events: Vec<OwnedFd> = (0..40).map(|_| eventfd(0, EventfdFlags::CLOEXEC).unwrap()).collect();
    let wires: Vec<_> = events.iter().map(|fd| Some(fd.as_fd())).collect();
    client.set_irqs(2, 0, IrqAction::Wire(&wires)).unwrap();
    for event in &events {
        assert_eq!(rustix::io::read(event, &mut [0; 8]).unwrap(), 8);
    }
    client.set_irqs(2, 0, IrqAction::Disable).unwrap();
    client.reset().unwrap();

    drop(client);
    let seen = server.ended();
    assert_eq!((&seen.maps[..], &seen.unmaps[..]), (&[(4096, 0x1000, 8192)][..], &[(0x1000, 8192)][..]));
    assert_eq!(seen.wired.iter().map(|wired| wired.3).sum::<usize>(), 40);
    assert_eq!(seen.resets, 1);
}
