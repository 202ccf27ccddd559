//! A server that is killed while a VMM uses its device: what the VMM is told, and how it goes on with the next server.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::support::{Folder, LIMIT};
use limosa_client::{Device, DeviceExt, DmaMap, DmaMemory, IrqAction};
use limosa_models::synthetic::{PAGE_BYTES, REGISTERS_REGION, registers::*};
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::{State, pci_index};
use limosa_testing::memfd;
use limosa_vfio_user::client::{Client, Options};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

const PAGES: u64 = 16;

fn get(client: &Client, register: u64) -> limosa_client::Result<u64> {
    let mut value = [0; 8];
    client.region_read(REGISTERS_REGION, register, &mut value)?;
    Ok(u64::from_le_bytes(value))
}

fn set(client: &Client, register: u64, value: u64) {
    client.region_write(REGISTERS_REGION, register, &value.to_le_bytes()).unwrap();
}

fn is_readable(fd: impl AsFd) -> bool {
    let limit = Timespec::try_from(LIMIT).unwrap();
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)) == Ok(1)
}

/// A request that waits longer than this is not answered at once.
const REQUEST_LIMIT: Duration = Duration::from_secs(300);

#[test]
fn a_vmm_whose_server_is_killed_is_told_at_once_and_goes_on_with_the_next_one() {
    let folder = Folder::new();
    let mut device = folder.device("device", &["seed=3"]);
    let options =
        || Options { request_limit: REQUEST_LIMIT, state_limit: REQUEST_LIMIT, ..Options::default() };
    let connect = || Client::connect(folder.path("device"), options()).unwrap();
    let client = connect();
    // A VMM that asks for nothing is told by the end of the server's process.
    let pid = Pid::from_raw(client.server_process().unwrap()).unwrap();
    assert_eq!(pid.as_raw_pid().to_string(), device.pid());
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let memory = memfd(PAGES * PAGE_BYTES as u64);
    let start = |client: &Client| {
        let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
        let file = DmaMemory::File { fd: memory.as_fd(), offset: 0 };
        let size = PAGES * PAGE_BYTES as u64;
        client.dma_map(&DmaMap { iova: 0, size, flags, memory: file }).unwrap();
        let done = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        client.set_irqs(pci_index::IRQ_MSI, 0, IrqAction::Wire(&[Some(done.as_fd())])).unwrap();
        set(client, DMA_PAGES, PAGES);
        set(client, DMA_LIMIT, 3 * PAGES);
        set(client, DMA_CONTROL, 1);
        done
    };
    assert!(is_readable(start(&client)), "the device works");
    // A request is under way all the time.
    let told = std::thread::scope(|scope| {
        let asks = scope.spawn(|| {
            loop {
                if let Err(error) = get(&client, SCRATCH) {
                    return (error, Instant::now());
                }
            }
        });
        let killed = Instant::now();
        device.kill();
        assert!(is_readable(&process));
        let (error, told) = asks.join().unwrap();
        assert!(error.is_connection_lost(), "{error}");
        assert!(error.to_string().contains("device"), "it names the device: {error}");
        told.duration_since(killed)
    });
    assert!(told < REQUEST_LIMIT / 2, "told after {told:?}, and not by the request's limit");
    let again = Instant::now();
    for _ in 0..100 {
        assert!(get(&client, SCRATCH).unwrap_err().is_connection_lost(), "and ever after");
        assert!(client.reset().unwrap_err().is_connection_lost());
    }
    assert!(again.elapsed() < REQUEST_LIMIT / 2);
    drop(client);

    // The next server takes the place of the socket that the other one has left.
    assert!(folder.path("device").exists());
    memory.write_all_at(b"the guest's own", (PAGES - 1) * PAGE_BYTES as u64).unwrap();
    let next = folder.device("device", &["seed=3"]);
    let client = connect();
    client.reset().unwrap();
    assert_eq!((client.state().unwrap(), get(&client, DMA_SEQUENCE).unwrap()), (State::Running, 0));
    let mut kept = [0; 15];
    memory.read_exact_at(&mut kept, (PAGES - 1) * PAGE_BYTES as u64).unwrap();
    assert_eq!(&kept, b"the guest's own", "a device that was reset writes nothing");
    assert!(is_readable(start(&client)), "memory and interrupts are given to it anew");
    assert_eq!(get(&client, DMA_FAILED).unwrap(), 0);
    drop((client, next));
}
