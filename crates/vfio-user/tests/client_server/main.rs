//! The client against the server of this crate: every request, a whole migration, many threads.

#[path = "../common/mod.rs"]
mod common;
mod sessions;
mod threads;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use common::Served;
use common::device::*;
use limosa_client::{
    Chunk, DataStream, Device, DeviceExt, DirtyBits, DmaMap, DmaMemory, DmaTarget, Error, IrqAction,
};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::info::{DeviceFlags, DmaMapFlags, RegionFlags};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, MigrationFlags, State};
use limosa_testing::memfd;
use limosa_vfio_user::client::{Client, Options};
use limosa_vfio_user::codec::SingleWrite;
use limosa_vfio_user::server;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

fn client(served: &Served) -> Client {
    Client::connect(served.path(), Options::default()).unwrap()
}

fn rw() -> DmaMapFlags {
    DmaMapFlags::READ | DmaMapFlags::WRITE
}

fn wait_event(fd: &OwnedFd) {
    let limit = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&limit)), Ok(1), "no interrupt");
    rustix::io::read(fd, &mut [0; 8]).unwrap();
}

/// Tells the device's DMA engine what to do.
fn engine(operation: u64, iova: u64, bytes: u64) -> Vec<u8> {
    [operation, iova, bytes].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn run_engine(client: &Client, operation: u64, iova: u64, bytes: u64) -> limosa_client::Result<()> {
    client.region_write(BAR2, 0, &engine(operation, iova, bytes))
}

const ENGINE_DATA: u64 = 64 << 10;

#[test]
fn what_the_device_says_of_itself_arrives() {
    let served = Served::new();
    let client = client(&served);
    let info = client.info().unwrap();
    assert!(DeviceFlags::from_bits_retain(info.flags).contains(DeviceFlags::PCI | DeviceFlags::RESET));
    assert_eq!((info.num_regions, info.num_irqs), (9, 5));
    let bar0 = client.region(BAR0).unwrap();
    assert_eq!((bar0.info.size, bar0.mappable.len()), (1 << 20, 0));
    let bar1 = client.region(BAR1).unwrap();
    assert!(RegionFlags::from_bits_retain(bar1.info.flags).contains(RegionFlags::MMAP | RegionFlags::CAPS));
    assert_eq!(bar1.mappable, [(0, 4096), (8192, 4096)]);
    // What is written through the fd is read through the socket.
    let at = bar1.info.offset + 8192;
    rustix::io::pwrite(bar1.fd.unwrap(), b"mapped", at).unwrap();
    let mut data = [0; 6];
    client.region_read(BAR1, 8192, &mut data).unwrap();
    assert_eq!(&data, b"mapped");
    assert_eq!(client.irq(MSIX).unwrap().count, 8);
    let fds = client.region_io_fds(BAR0).unwrap();
    assert_eq!(fds.entries.len(), 2);
    assert_eq!((fds.entries[1].offset, fds.entries[1].datamatch), (0x104, 7));
    for result in [client.region(99).map(drop), client.irq(99).map(drop)] {
        assert!(result.unwrap_err().is_refused(Errno::EINVAL));
    }
}

#[test]
fn regions_are_read_and_written_in_every_size() {
    let served = Served::new();
    let client = client(&served);
    for bytes in [1usize, 2, 3, 4, 8, 100, 4096, 8150, 8192, 8193, 65536, 1 << 20] {
        let data: Vec<u8> = (0..bytes).map(|i| (i * 7 + bytes) as u8).collect();
        client.region_write(BAR0, 0, &data).unwrap();
        let mut read = vec![0; bytes];
        client.region_read(BAR0, 0, &mut read).unwrap();
        assert!(read == data, "{bytes} bytes");
    }
    assert!(client.region_read(BAR0, 1 << 20, &mut [0]).unwrap_err().is_refused(Errno::EINVAL));
    assert!(client.region_write(BAR3, 0, &[1]).unwrap_err().errno().is_some());
}

#[test]
fn accesses_beyond_the_limit_are_split() {
    let served = Served::with(
        TestDevice::new().machine(),
        server::Options { data_bytes_max: 4096, ..Default::default() },
    );
    let client = client(&served);
    assert_eq!(client.limits().data_xfer_bytes_max, 4096);
    let data: Vec<u8> = (0..20_001u32).map(|i| (i * 3) as u8).collect();
    client.region_write(BAR0, 5, &data).unwrap();
    let mut read = vec![0; data.len()];
    client.region_read(BAR0, 5, &mut read).unwrap();
    assert!(read == data);
    client.region_write_posted(BAR0, 100_000, &data).unwrap();
    client.region_read(BAR0, 100_000, &mut read).unwrap();
    assert!(read == data);
}

#[test]
fn posted_writes_are_done_before_the_next_read() {
    let served = Served::new();
    let client = client(&served);
    for n in 0..2000u32 {
        client.region_write_posted(BAR0, u64::from(n) * 4, &n.to_ne_bytes()).unwrap();
    }
    // One that is refused is lost, and nothing else.
    client.region_write_posted(BAR3, 0, &[1]).unwrap();
    let mut last = [0; 4];
    client.region_read(BAR0, 1999 * 4, &mut last).unwrap();
    assert_eq!(u32::from_ne_bytes(last), 1999);
    assert!(client.limits().write_multiple);
    let writes: Vec<SingleWrite> = (0..500u64)
        .map(|n| SingleWrite { offset: n * 8, region: BAR0, count: 8, data: (!n).to_ne_bytes() })
        .collect();
    client.region_write_multi(&writes).unwrap();
    let mut read = [0; 8];
    client.region_read(BAR0, 499 * 8, &mut read).unwrap();
    assert_eq!(u64::from_ne_bytes(read), !499);
    let long = SingleWrite { count: 9, ..writes[0] };
    assert!(matches!(client.region_write_multi(&[long]), Err(Error::Usage { .. })));
}

#[test]
fn interrupts_are_wired_in_runs_and_triggered() {
    let served = Served::new();
    let client = client(&served);
    let fds: Vec<OwnedFd> = (0..3).map(|_| eventfd(0, EventfdFlags::CLOEXEC).unwrap()).collect();
    let wires = [Some(fds[0].as_fd()), None, Some(fds[1].as_fd()), Some(fds[2].as_fd())];
    client.set_irqs(MSI, 0, IrqAction::Wire(&wires)).unwrap();
    client.set_irqs(MSI, 2, IrqAction::Trigger(2)).unwrap();
    wait_event(&fds[1]);
    wait_event(&fds[2]);
    client.set_irqs(MSI, 0, IrqAction::Mask(1)).unwrap();
    client.set_irqs(MSI, 0, IrqAction::Trigger(1)).unwrap();
    client.set_irqs(MSI, 0, IrqAction::Unmask(1)).unwrap();
    wait_event(&fds[0]);
    client.set_irqs(MSI, 0, IrqAction::Disable).unwrap();
    assert!(client.set_irqs(MSI, 3, IrqAction::Trigger(2)).is_err(), "beyond the vectors");
}

/// Guest memory that the device cannot map.
struct Memory(Mutex<Vec<u8>>);

impl DmaTarget for Memory {
    fn read(&self, offset: u64, data: &mut [u8]) -> std::io::Result<()> {
        let memory = self.0.lock().unwrap();
        data.copy_from_slice(&memory[offset as usize..][..data.len()]);
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.0.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }
}

#[test]
fn the_device_reaches_memory_by_messages_on_either_socket() {
    for twin_socket in [true, false] {
        let served = Served::new();
        let client = Client::connect(served.path(), Options { twin_socket, ..Options::default() }).unwrap();
        assert_eq!(client.limits().twin_socket.is_some(), twin_socket);
        let memory = Arc::new(Memory(Mutex::new((0..=255u8).cycle().take(2 << 20).collect())));
        let target: Arc<dyn DmaTarget> = Arc::<Memory>::clone(&memory);
        let map = |iova| DmaMap { iova, size: 1 << 20, flags: rw(), memory: DmaMemory::Messages(&target) };
        client.dma_map(&map(0x10_0000)).unwrap();
        client.dma_map(&map(0x20_0000)).unwrap();
        let msi = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        client.set_irqs(MSI, 0, IrqAction::Wire(&[Some(msi.as_fd())])).unwrap();
        // While the client waits for its own reply, and of the device's own accord.
        for operation in [DMA_READ_NOW, DMA_READ_LATER, DMA_READ_JOINED] {
            client.region_write(BAR2, ENGINE_DATA, &vec![0; 1 << 20]).unwrap();
            run_engine(&client, operation, 0x10_0001, 1_000_000).unwrap();
            wait_event(&msi);
            let mut data = vec![0; 1_000_000];
            client.region_read(BAR2, ENGINE_DATA, &mut data).unwrap();
            assert!(data == memory.0.lock().unwrap()[1..1_000_001], "operation {operation}");
        }
        for operation in [DMA_WRITE_NOW, DMA_WRITE_LATER] {
            client.region_write(BAR2, ENGINE_DATA, &[operation as u8; 5000]).unwrap();
            run_engine(&client, operation, 0x10_0000 + (1 << 20) - 2500, 5000).unwrap();
            wait_event(&msi);
            let written = memory.0.lock().unwrap();
            // The range lies across both mappings, each with its own offsets.
            assert!(written[(1 << 20) - 2500..1 << 20].iter().all(|&byte| byte == operation as u8));
            assert!(written[..2500].iter().all(|&byte| byte == operation as u8));
        }
        assert!(run_engine(&client, DMA_READ_NOW, 0x40_0000, 8).is_err(), "not mapped");
        client.dma_unmap(0x10_0000, 1 << 20, None).unwrap();
        assert!(run_engine(&client, DMA_READ_NOW, 0x10_0000, 8).is_err(), "no longer mapped");
    }
}

#[test]
fn mappings_are_made_logged_and_taken_away() {
    let served = Served::new();
    let client = client(&served);
    let fd = memfd(1 << 20);
    let file = DmaMemory::File { fd: fd.as_fd(), offset: 0 };
    client.dma_map(&DmaMap { iova: 0x100_0000, size: 1 << 20, flags: rw(), memory: file }).unwrap();
    let again = client.dma_map(&DmaMap { iova: 0x100_0000, size: 1 << 20, flags: rw(), memory: file });
    assert!(again.unwrap_err().is_refused(Errno::EEXIST));
    // SAFETY: no device of this transport ever sees an address.
    let nowhere = unsafe { limosa_client::HostAddress::new(0) };
    let address = DmaMap { iova: 0, size: 4096, flags: rw(), memory: DmaMemory::Address(nowhere) };
    assert!(matches!(client.dma_map(&address), Err(Error::Usage { .. })));

    let range = DmaLoggingRange { iova: 0x100_0000, length: 1 << 20 };
    assert_eq!(client.dma_logging_start(4096, &[range]).unwrap(), 4096);
    run_engine(&client, DMA_WRITE_NOW, 0x100_0000 + 4096 * 70, 4097).unwrap();
    assert!(client.probe(FeatureIndex::DIRTY_BLOCKS, FeatureOp::GET).unwrap());
    for _ in 0..2 {
        let mut blocks = [u64::MAX; 2];
        client.dirty_blocks(range.iova, range.length, 1 << 18, &mut blocks).unwrap();
        assert_eq!(blocks[0] & 0b10, 0b10, "page 70 is in the second quarter, and stays in the log");
        assert_eq!((blocks[0] >> 4, blocks[1]), (0, 0));
    }
    let mut words = [u64::MAX; 5];
    client.dma_logging_report(range.iova, range.length, 4096, &mut words).unwrap();
    assert_eq!(words, [0, 0b11 << 6, 0, 0, 0]);
    run_engine(&client, DMA_WRITE_NOW, 0x100_0000 + 4096 * 3, 1).unwrap();
    let mut words = [1u64 << 63, 0, 0, 0];
    let dirty = DirtyBits { page_size: 4096, words: &mut words };
    client.dma_unmap(0x100_0000, 1 << 20, Some(dirty)).unwrap();
    assert_eq!(words, [1 << 63 | 1 << 3, 0, 0, 0], "what was set stays set");
    assert!(run_engine(&client, DMA_WRITE_NOW, 0x100_0000, 1).is_err());
    client.dma_logging_stop().unwrap();
    assert!(client.dma_logging_stop().is_err());
}

#[test]
fn a_mapping_was_forgotten_once_one_over_it_was_refused() {
    let served = Served::new();
    let client = client(&served);
    let memory = Arc::new(Memory(Mutex::new(vec![7; 0x4000])));
    let target: Arc<dyn DmaTarget> = memory.clone();
    let map = |iova, size| {
        client.dma_map(&DmaMap { iova, size, flags: rw(), memory: DmaMemory::Messages(&target) })
    };
    map(0x1000, 0x1000).unwrap();
    map(0x3000, 0x1000).unwrap();
    for (iova, size) in
        [(0, 0x4000), (0, 0x1001), (0x1000, 0x1000), (0x1fff, 1), (0x1001, 0x2000), (0x2000, 0x1001)]
    {
        let refused = map(iova, size).unwrap_err();
        assert!(refused.is_refused(Errno::EEXIST), "{iova:#x} {size:#x}: {refused}");
    }
    map(0x2000, 0x1000).unwrap();
    for iova in [0x1000, 0x2000, 0x3000] {
        run_engine(&client, DMA_READ_NOW, iova, 8).unwrap();
    }
    // What the server alone refuses leaves the others as they are too.
    client.dma_unmap(0x2000, 0x1000, None).unwrap();
    let nobody = DmaMapFlags::empty();
    let memory = DmaMemory::Messages(&target);
    client.dma_map(&DmaMap { iova: 0x2000, size: 0x1000, flags: nobody, memory }).unwrap_err();
    map(0x2000, 0x1000).unwrap();
    run_engine(&client, DMA_READ_NOW, 0x1ffc, 8).unwrap();
    client.dma_unmap(0x1000, 0x3000, None).unwrap();
    assert!(
        client.dma_unmap(0x1000, 0x3000, None).unwrap_err().is_refused(Errno::ENOENT),
        "nothing is there"
    );
}

#[test]
fn names_and_limits_are_in_the_errors() {
    let error = Client::connect("/nonexistent/limosa.sock", Options::default()).err().unwrap();
    assert!(error.to_string().contains("/nonexistent/limosa.sock"), "{error}");
    assert_eq!(error.errno(), Some(Errno::ENOENT));
    let served = Served::new();
    let client = client(&served);
    let error = client.region_read(99, 0, &mut [0; 8]).unwrap_err().to_string();
    assert!(error.contains("REGION_READ") && error.contains("EINVAL"), "{error}");
    assert_eq!(client.name(), served.path().to_str().unwrap());
}
