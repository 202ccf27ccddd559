//! The client against the server of the crate `vfio_user`, written by others.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use limosa_client::{Device, DeviceExt, DmaMap, DmaMemory, IrqAction};
use limosa_protocol::info::{DmaMapFlags, RegionFlags};
use limosa_protocol::{Errno, State};
use limosa_vfio_user::client::{Client, Options};
use rustix::event::{EventfdFlags, eventfd};
use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
    vfio_region_sparse_mmap_area,
};
use vfio_user::{IrqInfo, Server, ServerBackend, ServerRegion, SparseArea};

/// What the server was asked to do.
#[derive(Default)]
struct Seen {
    bar0: Vec<u8>,
    maps: Vec<(u64, u64, u64)>,
    unmaps: Vec<(u64, u64)>,
    wired: Vec<(u32, u32, u32, usize)>,
    resets: usize,
}

struct Backend(Arc<Mutex<Seen>>);

impl ServerBackend for Backend {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let seen = self.0.lock().unwrap();
        let end = offset as usize + data.len();
        match seen.bar0.get(offset as usize..end) {
            Some(bytes) if region == 0 => data.copy_from_slice(bytes),
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }
    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut seen = self.0.lock().unwrap();
        let end = offset as usize + data.len();
        match seen.bar0.get_mut(offset as usize..end) {
            Some(bytes) if region == 0 => bytes.copy_from_slice(data),
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }
    fn dma_map(
        &mut self,
        _: vfio_user::DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        // The fd is the memory: what is written to it is there.
        fd.expect("an fd came").write_all_at(b"written by the server", offset)?;
        self.0.lock().unwrap().maps.push((offset, address, size));
        Ok(())
    }
    fn dma_unmap(&mut self, _: vfio_user::DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        self.0.lock().unwrap().unmaps.push((address, size));
        Ok(())
    }
    fn reset(&mut self) -> io::Result<()> {
        self.0.lock().unwrap().resets += 1;
        Ok(())
    }
    fn set_irqs(&mut self, index: u32, flags: u32, start: u32, count: u32, fds: Vec<File>) -> io::Result<()> {
        for mut fd in &fds {
            fd.write_all(&1u64.to_ne_bytes())?;
        }
        let _ = flags;
        self.0.lock().unwrap().wired.push((index, start, count, fds.len()));
        Ok(())
    }
}

fn region(index: u32, size: u64, flags: u32) -> ServerRegion {
    let region_info = vfio_region_info { argsz: 32, index, size, flags, ..Default::default() };
    ServerRegion { region_info, sparse_areas: Vec::new(), mmap_fd: None }
}

#[test]
fn a_server_of_the_crate_vfio_user_is_driven() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("device.sock");
    let rw = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
    let bar1: OwnedFd = tempfile::tempfile().unwrap().into();
    let mut mappable = region(1, 8192, rw | VFIO_REGION_INFO_FLAG_MMAP);
    mappable.mmap_fd = Some(bar1.as_raw_fd());
    mappable.sparse_areas =
        vec![SparseArea { area: vfio_region_sparse_mmap_area { offset: 4096, size: 4096 } }];
    let mut regions = vec![region(0, 1 << 20, rw), mappable];
    regions.extend((2..9).map(|index| region(index, 0, 0)));
    let irqs =
        (0..5).map(|index| IrqInfo { index, flags: 1, count: if index == 2 { 40 } else { 1 } }).collect();
    let server = Server::new(&path, true, irqs, regions).unwrap();
    let seen = Arc::new(Mutex::new(Seen { bar0: vec![0; 1 << 20], ..Seen::default() }));
    let mut backend = Backend(Arc::clone(&seen));
    // One connection: the client must not lose it by asking for features.
    let thread = std::thread::spawn(move || server.run(&mut backend).map_err(|error| error.to_string()));

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
    let mut written = [0; 21];
    memory.read_exact_at(&mut written, 4096).unwrap();
    assert_eq!(&written, b"written by the server");
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
    thread.join().unwrap().unwrap();
    let seen = seen.lock().unwrap();
    assert_eq!((&seen.maps[..], &seen.unmaps[..]), (&[(4096, 0x1000, 8192)][..], &[(0x1000, 8192)][..]));
    assert_eq!(seen.wired.iter().map(|wired| wired.3).sum::<usize>(), 40);
    assert_eq!(seen.resets, 1);
}
