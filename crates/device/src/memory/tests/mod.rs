//! What holds for guest memory.

use std::ops::Deref;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};

use limosa_protocol::Errno;
use limosa_protocol::info::DmaMapFlags;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::*;

mod export;
mod file_io;
mod log;
mod pins;

/// Both ends of one memory.
struct GuestMemory {
    mappings: Mappings,
    dma: Dma,
}

impl Default for GuestMemory {
    fn default() -> GuestMemory {
        let mappings = Mappings::default();
        GuestMemory { dma: mappings.dma(), mappings }
    }
}

impl Deref for GuestMemory {
    type Target = Mappings;

    fn deref(&self) -> &Mappings {
        &self.mappings
    }
}

impl GuestMemory {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.dma.read(iova, data)
    }
    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        self.dma.write(iova, data)
    }
    fn read_obj<T: FromBytes + IntoBytes>(&self, iova: u64) -> Result<T, Errno> {
        self.dma.read_obj(iova)
    }
    fn write_obj<T: IntoBytes + Immutable>(&self, iova: u64, object: &T) -> Result<(), Errno> {
        self.dma.write_obj(iova, object)
    }
}

const RW: DmaMapFlags = DmaMapFlags::READ.union(DmaMapFlags::WRITE);
const PAGE: u64 = 65536;

fn memfd(bytes: u64) -> OwnedFd {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fd
}

fn file(fd: &OwnedFd, iova: u64, size: u64, offset: u64, flags: DmaMapFlags) -> Mapping {
    Mapping { iova, size, flags, backing: Backing::File { fd: fd.try_clone().unwrap().into(), offset } }
}

/// Memory of a client, with every access recorded.
#[derive(Default)]
struct Client {
    bytes: Mutex<Vec<u8>>,
    fails: AtomicBool,
}

impl RemoteMemory for Client {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.copy_from_slice(&self.bytes.lock().unwrap()[iova as usize..][..data.len()]);
        Ok(())
    }
    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        if self.fails.load(Ordering::Relaxed) {
            return Err(Errno::EIO);
        }
        self.bytes.lock().unwrap()[iova as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }
}

fn remote(client: &Arc<Client>, iova: u64, size: u64) -> Mapping {
    Mapping { iova, size, flags: RW, backing: Backing::Remote(client.clone()) }
}

fn bytes_of(fd: &OwnedFd, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    assert_eq!(rustix::io::pread(fd, &mut bytes, offset).unwrap(), len);
    bytes
}

#[test]
fn reads_and_writes_go_to_the_file_at_any_offset() {
    let fd = memfd(PAGE);
    let memory = GuestMemory::default();
    memory.map(file(&fd, 0x1003, 100, 4097 + 10, RW)).unwrap();
    memory.write(0x1003, b"first").unwrap();
    memory.write(0x1003 + 95, b" last").unwrap();
    assert_eq!(bytes_of(&fd, 4107, 5), b"first");
    assert_eq!(bytes_of(&fd, 4107 + 95, 5), b" last");
    let mut back = [0; 100];
    memory.read(0x1003, &mut back).unwrap();
    assert_eq!((&back[..5], &back[95..]), (&b"first"[..], &b" last"[..]));
    assert_eq!(memory.write(0x1003 + 96, b" last"), Err(Errno::EFAULT));
    assert_eq!(memory.read(0x1002, &mut back[..1]), Err(Errno::EFAULT));
}

#[test]
fn accesses_span_neighbours_and_stop_at_holes() {
    let (fd, client) = (memfd(PAGE), Arc::new(Client::default()));
    client.bytes.lock().unwrap().resize(0x4000, 0);
    let memory = GuestMemory::default();
    memory.map(file(&fd, 0x3000, 0x1000, 0x5000, RW)).unwrap();
    memory.map(file(&fd, 0x1000, 0x1000, 0, RW)).unwrap();
    memory.map(remote(&client, 0x2000, 0x1000)).unwrap();
    let data: Vec<u8> = (0..0x3000u32).map(|n| (n / 7) as u8).collect();
    memory.write(0x1000, &data).unwrap();
    let mut back = vec![0; 0x3000];
    memory.read(0x1000, &mut back).unwrap();
    assert_eq!(back, data);
    assert_eq!(client.bytes.lock().unwrap()[0x2000..0x3000], data[0x1000..0x2000]);
    assert_eq!(bytes_of(&fd, 0x5000, 0x1000), data[0x2000..]);
    assert_eq!(memory.read(0x3fff, &mut [0; 2]), Err(Errno::EFAULT));
    memory.unmap(0x2000, 0x1000).unwrap();
    assert_eq!(memory.read(0x1000, &mut back), Err(Errno::EFAULT));
    assert_eq!(memory.read(0x3000, &mut back[..0x1000]), Ok(()));
}

#[test]
fn the_direction_of_a_mapping_is_respected() {
    let fd = memfd(PAGE);
    let memory = GuestMemory::default();
    memory.map(file(&fd, 0, 0x1000, 0, DmaMapFlags::READ)).unwrap();
    memory.map(file(&fd, 0x1000, 0x1000, 0, DmaMapFlags::WRITE)).unwrap();
    assert_eq!(memory.write(0xfff, &[1, 2]), Err(Errno::EFAULT));
    assert_eq!(memory.write(0x1000, &[3]), Ok(()));
    assert_eq!(memory.read(0x1000, &mut [0]), Err(Errno::EFAULT));
    assert_eq!(memory.read_obj::<u8>(0), Ok(3));
}

#[test]
fn a_file_that_cannot_be_mapped_so_is_refused() {
    let memory = GuestMemory::default();
    let fd = memfd(PAGE);
    let read_only = std::fs::File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
    let read_only = OwnedFd::from(read_only);
    assert_eq!(memory.map(file(&read_only, 0, 4096, 0, RW)), Err(Errno::EACCES));
    assert_eq!(memory.map(file(&read_only, 0, 4096, 0, DmaMapFlags::READ)), Ok(()));
}

/// A mapping of a file of any kind.
fn any_file(fd: &OwnedFd, iova: u64) -> Mapping {
    let backing = Backing::AnyFile { fd: fd.try_clone().unwrap().into(), offset: 0 };
    Mapping { iova, size: 4096, flags: DmaMapFlags::READ, backing }
}

#[test]
fn files_that_are_no_memory_are_mapped_only_as_any_file_and_never_what_is_no_regular_file() {
    let memory = GuestMemory::default();
    let on_disk = OwnedFd::from(std::fs::File::open(std::env::current_exe().unwrap()).unwrap());
    if rustix::fs::fcntl_get_seals(&on_disk).is_err() {
        assert_eq!(memory.map(file(&on_disk, 0, 4096, 0, DmaMapFlags::READ)), Err(Errno::ENOTSUP));
    }
    assert_eq!(memory.map(any_file(&on_disk, 0)), Ok(()));
    assert_eq!(memory.read_obj(0), Ok(*b"\x7fELF"));
    assert_eq!(memory.unmap(0, 4096), Ok(4096));
    assert_eq!(memory.read_obj::<u8>(0), Err(Errno::EFAULT));
    let memfd = memfd(PAGE);
    assert_eq!(memory.map(any_file(&memfd, 0)), Ok(()));
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let zero = OwnedFd::from(std::fs::File::open("/dev/zero").unwrap());
    for other in [pipe, zero] {
        assert_eq!(memory.map(file(&other, 0x10000, 4096, 0, DmaMapFlags::READ)), Err(Errno::ENOTSUP));
        assert_eq!(memory.map(any_file(&other, 0x10000)), Err(Errno::ENOTSUP));
    }
}

#[test]
fn bad_ranges_and_overlaps_are_refused() {
    let fd = memfd(PAGE);
    let memory = GuestMemory::default();
    let map = |iova, size| memory.map(file(&fd, iova, size, 0, RW));
    assert_eq!(map(0x1000, 0), Err(Errno::EINVAL));
    assert_eq!(map(u64::MAX, 2), Err(Errno::EINVAL));
    assert_eq!(memory.map(file(&fd, 0, 1, 0, DmaMapFlags::empty())), Err(Errno::EINVAL));
    assert_eq!(memory.map(file(&fd, 0, 4096, u64::MAX, RW)), Err(Errno::EOVERFLOW));
    assert_eq!(memory.map(file(&fd, 0, MAPPED_BYTES_MAX + 1, 0, RW)), Err(Errno::E2BIG));
    map(0x1000, 0x1000).unwrap();
    for (iova, size) in [(0x1000, 0x1000), (0x1fff, 1), (0, 0x1001), (0, 0x10000), (0x1800, 0x10)] {
        assert_eq!(map(iova, size), Err(Errno::EEXIST), "{iova:#x} {size:#x}");
    }
    map(0, 0x1000).unwrap();
    map(0x2000, 1).unwrap();
    assert_eq!(memory.unmap(0x1000, 0), Err(Errno::EINVAL));
    assert_eq!(memory.unmap(0x1000, u64::MAX), Err(Errno::EINVAL));
    assert_eq!(memory.unmap(0x800, 0x1800), Err(Errno::EINVAL));
    assert_eq!(memory.unmap(0x0, 0x1800), Err(Errno::EINVAL));
    assert_eq!(memory.unmap(0x4000, 0x1000), Ok(0), "nothing is there");
    assert_eq!(memory.unmap(0, 0x2000), Ok(0x2000), "two at once");
    assert_eq!(memory.unmap(0, 0x2000), Ok(0));
    assert_eq!(memory.read_obj::<u8>(0x2000), Ok(0));
    memory.unmap_all().unwrap();
    assert_eq!(memory.read_obj::<u8>(0x2000), Err(Errno::EFAULT));
}

#[test]
fn the_end_of_the_address_space_can_be_mapped() {
    let fd = memfd(PAGE);
    let memory = GuestMemory::default();
    let top = u64::MAX - 0xfff;
    memory.map(file(&fd, top, 0x1000, 0, RW)).unwrap();
    memory.write(u64::MAX - 1, &[1, 2]).unwrap();
    assert_eq!(memory.write(u64::MAX - 1, &[1, 2, 3]), Err(Errno::EFAULT));
    assert_eq!(memory.read_obj::<[u8; 2]>(u64::MAX - 1), Ok([1, 2]));
    memory.unmap(top, 0x1000).unwrap();
}

#[test]
fn mappings_are_limited() {
    let client = Arc::new(Client::default());
    let memory = GuestMemory::default();
    for n in 0..MAPPINGS_MAX as u64 {
        memory.map(remote(&client, n * 2, 1)).unwrap();
    }
    assert_eq!(memory.map(remote(&client, 1, 1)), Err(Errno::E2BIG));
    memory.unmap(0, 1).unwrap();
    assert_eq!(memory.map(remote(&client, 1, 1)), Ok(()));
    memory.unmap_all().unwrap();
    let (fd, half) = (memfd(PAGE), MAPPED_BYTES_MAX / 2);
    memory.map(file(&fd, 0, half, 0, RW)).unwrap();
    assert_eq!(memory.map(file(&fd, half, half + 1, 0, RW)), Err(Errno::E2BIG));
    memory.map(remote(&client, half, u64::MAX - half)).unwrap();
    memory.unmap(0, half).unwrap();
    memory.map(file(&fd, 0, half, 0, RW)).unwrap();
}

#[test]
fn a_file_cut_short_fails_its_accesses_and_no_other() {
    let (cut, whole) = (memfd(4 * PAGE), memfd(PAGE));
    let memory = GuestMemory::default();
    memory.map(file(&cut, 0, 4 * PAGE, 0, RW)).unwrap();
    memory.map(file(&whole, 4 * PAGE, PAGE, 0, RW)).unwrap();
    memory.write(PAGE, &[7; 16]).unwrap();
    ftruncate(&cut, PAGE).unwrap();
    assert_eq!(memory.read_obj::<u64>(8), Ok(0), "what is left can be used");
    assert_eq!(memory.read(PAGE, &mut [0; 16]), Err(Errno::EFAULT));
    assert_eq!(memory.write(2 * PAGE, &[1; 64]), Err(Errno::EFAULT));
    assert_eq!(memory.write(0, &[1; 64]), Ok(()), "what is left can still be used");
    assert_eq!(memory.write(PAGE - 8, &[1; 16]), Err(Errno::EFAULT), "a part is gone");
    assert_eq!(memory.write(4 * PAGE, &[5; 64]), Ok(()));
    assert_eq!(bytes_of(&whole, 0, 1), [5]);
    ftruncate(&cut, 4 * PAGE).unwrap();
    assert_eq!(memory.write(3 * PAGE, &[1; 64]), Ok(()), "the file is long enough again");
    assert_eq!(bytes_of(&cut, 3 * PAGE, 2), [1, 1]);
    ftruncate(&cut, 0).unwrap();
    assert_eq!(memory.write_obj(3 * PAGE, &1u64), Err(Errno::EFAULT), "a write faults too");
}

#[test]
fn files_cut_short_under_many_threads() {
    const THREADS: usize = 4;
    for _ in 0..20 {
        let (cut, whole) = (memfd(PAGE * 16), memfd(PAGE));
        let memory = GuestMemory::default();
        memory.map(file(&cut, 0, 16 * PAGE, 0, RW)).unwrap();
        memory.map(file(&whole, 16 * PAGE, PAGE, 0, RW)).unwrap();
        memory.write(0, &vec![0xaa; 16 * PAGE as usize]).unwrap();
        let ready = Barrier::new(THREADS + 1);
        std::thread::scope(|scope| {
            for thread in 0..THREADS as u64 {
                let (memory, ready) = (&memory, &ready);
                scope.spawn(move || {
                    let mut data = vec![0; 3 * PAGE as usize];
                    ready.wait();
                    loop {
                        let answer = memory.read(thread * 4 * PAGE, &mut data);
                        if answer == Err(Errno::EFAULT) {
                            break;
                        }
                        answer.unwrap();
                        assert!(data.iter().all(|byte| *byte == 0xaa), "zeros taken for memory");
                        memory.write(16 * PAGE + thread, &[thread as u8]).unwrap();
                    }
                });
            }
            ready.wait();
            ftruncate(&cut, 0).unwrap();
        });
    }
}

/// How many mappings this process has of files with this name.
fn kernel_mappings(name: &str) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(name)).count()
}

#[test]
fn a_client_that_maps_page_by_page_reached_the_limit_of_the_process() {
    let fd = memfd_create("page-by-page", MemfdFlags::CLOEXEC).unwrap();
    // Every other page, so that the kernel cannot join neighbours.
    ftruncate(&fd, 2 * MAPPINGS_MAX as u64 * 4096).unwrap();
    let memory = GuestMemory::default();
    for n in 0..MAPPINGS_MAX as u64 {
        memory.map(file(&fd, n * 8192, 4096, n * 8192, RW)).unwrap();
    }
    assert_eq!(memory.map(file(&fd, 4096, 4096, 0, RW)), Err(Errno::E2BIG), "as many as are announced");
    assert_eq!(kernel_mappings("page-by-page"), 1);
    let last = (MAPPINGS_MAX as u64 - 1) * 8192;
    memory.write_obj(last + 8, &7u64).unwrap();
    assert_eq!(bytes_of(&fd, last + 8, 1), [7]);
    assert_eq!(memory.write(4095, &[1, 2]), Err(Errno::EFAULT), "what is between is not reached");
    memory.unmap_all().unwrap();
    assert_eq!(kernel_mappings("page-by-page"), 0);
}

#[test]
fn after_unmap_returns_nobody_touches_the_memory() {
    let fd = memfd(PAGE);
    let memory = GuestMemory::default();
    let written = AtomicU64::new(0);
    for round in 1..=40u64 {
        memory.map(file(&fd, 0, PAGE, 0, RW)).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut value = round << 32;
                while memory.write_obj(0, &value).is_ok() {
                    value += 1;
                    written.store(value, Ordering::Relaxed);
                }
            });
            while written.load(Ordering::Relaxed) < round << 32 {
                std::hint::spin_loop();
            }
            memory.unmap(0, PAGE).unwrap();
            let after = bytes_of(&fd, 0, 8);
            std::thread::yield_now();
            assert_eq!(bytes_of(&fd, 0, 8), after);
        });
    }
}

#[test]
fn memory_that_waits_for_its_client_does_not_hold_up_an_unmap() {
    /// Answers a write only when the mapping is gone.
    struct Waits(Barrier, Barrier);
    impl RemoteMemory for Waits {
        fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
            Err(Errno::EIO)
        }
        fn write(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
            self.0.wait();
            self.1.wait();
            Ok(())
        }
    }
    let waits = Arc::new(Waits(Barrier::new(2), Barrier::new(2)));
    let memory = GuestMemory::default();
    memory.map(Mapping { iova: 0, size: 8, flags: RW, backing: Backing::Remote(waits.clone()) }).unwrap();
    std::thread::scope(|scope| {
        let write = scope.spawn(|| memory.write_obj(0, &1u64));
        waits.0.wait();
        memory.unmap(0, 8).unwrap();
        waits.1.wait();
        assert_eq!(write.join().unwrap(), Ok(()));
    });
}
