//! What holds for memory in a file that is not mapped.

use std::os::fd::AsFd;

use super::*;

fn file_io(fd: impl AsFd, iova: u64, size: u64, offset: u64, flags: DmaMapFlags, any_file: bool) -> Mapping {
    let fd = fd.as_fd().try_clone_to_owned().unwrap().into();
    Mapping { iova, size, flags, backing: Backing::FileIo { fd, offset, any_file } }
}

#[test]
fn memory_that_should_not_be_mapped_is_read_and_written_by_system_calls() {
    let fd = memfd_create("not-mapped", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, PAGE).unwrap();
    let memory = GuestMemory::default();
    memory.map(file_io(&fd, 0x1000, 0x2000, 100, RW, false)).unwrap();
    memory.map(file_io(&fd, 0x3000, 0x1000, 0x4000, RW, false)).unwrap();
    memory.write(0x1005, b"by a call").unwrap();
    memory.write(0x2ffe, &[1, 2, 3, 4]).unwrap();
    assert_eq!(bytes_of(&fd, 105, 9), b"by a call");
    assert_eq!((bytes_of(&fd, 100 + 0x1ffe, 2), bytes_of(&fd, 0x4000, 2)), (vec![1, 2], vec![3, 4]));
    let mut data = [0; 4];
    memory.read(0x2ffe, &mut data).unwrap();
    assert_eq!(data, [1, 2, 3, 4]);
    assert_eq!(kernel_mappings("not-mapped"), 0);
    memory.logging_start(4096, &[]).unwrap();
    memory.write(0x3000, &[5]).unwrap();
    ftruncate(&fd, 0).unwrap();
    assert_eq!(memory.read(0x3000, &mut data), Err(Errno::EFAULT), "the file is too short");
    let mut words = [0];
    memory.unmap_report(0x1000, 0x3000, 4096, &mut words).unwrap();
    assert_eq!(words, [0b100]);
    assert_eq!(memory.read(0x1000, &mut data), Err(Errno::EFAULT));
}

#[test]
fn the_memory_of_a_process_is_reached_where_any_file_may_be_used() {
    let own = std::fs::File::options().read(true).write(true).open("/proc/self/mem").unwrap();
    let buffer = Box::new([AtomicU64::new(7), AtomicU64::new(8)]);
    let (address, memory) = (&raw const *buffer as u64, GuestMemory::default());
    assert_eq!(memory.map(file_io(&own, 0, 16, address, RW, false)), Err(Errno::ENOTSUP));
    memory.map(file_io(&own, 0, 16, address, RW, true)).unwrap();
    assert_eq!(memory.read_obj::<u64>(8), Ok(8));
    memory.write_obj(0, &9u64).unwrap();
    assert_eq!(buffer[0].load(Ordering::Relaxed), 9);
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    assert_eq!(memory.map(file_io(&pipe, 0x1000, 16, 0, RW, true)), Err(Errno::ENOTSUP));
}

#[test]
fn an_fd_that_is_not_open_for_it_is_refused() {
    let fd = memfd(PAGE);
    let open = |options: &mut std::fs::OpenOptions| {
        options.open(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
    };
    let memory = GuestMemory::default();
    let read_only = open(std::fs::File::options().read(true));
    let append = open(std::fs::File::options().read(true).append(true));
    assert_eq!(memory.map(file_io(&read_only, 0, 8, 0, RW, false)), Err(Errno::EACCES));
    assert_eq!(
        memory.map(file_io(&append, 0, 8, 0, RW, false)),
        Err(Errno::EINVAL),
        "all would go to its end"
    );
    assert_eq!(memory.map(file_io(&fd, 0, 8, u64::MAX, RW, false)), Err(Errno::EOVERFLOW));
    memory.map(file_io(&read_only, 0, 8, 0, DmaMapFlags::READ, false)).unwrap();
    memory.map(file_io(&append, 8, 8, 0, DmaMapFlags::READ, false)).unwrap();
}

#[test]
fn each_mapping_took_an_fd() {
    let (fd, memory) = (memfd(PAGE), GuestMemory::default());
    let stat = rustix::fs::fstat(&fd).unwrap();
    // Other tests of this process open and close files meanwhile.
    let fds_of_the_file = || {
        let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        open.filter(|entry| {
            rustix::fs::stat(entry.path())
                .is_ok_and(|of| (of.st_dev, of.st_ino) == (stat.st_dev, stat.st_ino))
        })
        .count()
    };
    let before = fds_of_the_file();
    for n in 0..1000 {
        memory.map(file_io(&fd, n * 16, 8, n, RW, false)).unwrap();
    }
    let mapped = fds_of_the_file();
    assert!(mapped <= before + 1, "{before} {mapped}");
    let own = std::fs::File::open("/proc/self/mem").unwrap();
    let refused =
        (0..1000).map(|n| memory.map(file_io(&own, (1 << 20) + n * 16, 8, n, DmaMapFlags::READ, true)));
    assert_eq!(refused.filter(|mapped| *mapped == Err(Errno::E2BIG)).count(), 1000 - 255);
}
