//! What holds for the files of a client.

use limosa_testing::proc_path;

use super::*;

const RW: (bool, bool) = (true, true);
const READ: (bool, bool) = (true, false);

fn kernel_mappings(name: &str) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(&format!("memfd:{name} "))).count()
}

/// As from a message: a file description that many fds may have.
fn map(
    files: &MappedFiles,
    fd: &File,
    offset: u64,
    bytes: u64,
    access: (bool, bool),
) -> Result<FileMapping, Errno> {
    files.map(ForeignFd::harmless(fd.try_clone().unwrap().into()), offset, bytes, access, false)
}

#[test]
fn a_file_is_mapped_once_for_each_access_mode() {
    let (files, fd) = (MappedFiles::default(), memfd_named("once", 100 * 4096));
    let first = map(&files, &fd, 4096, 4096, RW).unwrap();
    let rest: Vec<_> = (0..99).map(|page| map(&files, &fd, page * 4096 + 7, 4096, RW).unwrap()).collect();
    assert_eq!(kernel_mappings("once"), 1);
    first.write(7, b"shared").unwrap();
    let mut seen = [0; 6];
    rest[1].read(0, &mut seen).unwrap();
    assert_eq!(&seen, b"shared");
    assert_eq!(first.read(4095, &mut [0; 2]), Err(Errno::EFAULT), "the window is larger, the piece is not");
    let read_only = map(&files, &fd, 0, 4096, READ).unwrap();
    assert_eq!(kernel_mappings("once"), 2);
    assert_eq!(read_only.write(0, &[1]), Err(Errno::EFAULT));
    let write_only = map(&files, &fd, 0, 4096, (false, true)).unwrap();
    assert_eq!(kernel_mappings("once"), 2, "written in the window for both");
    assert_eq!(write_only.read(0, &mut [0]), Err(Errno::EFAULT));
    drop((first, write_only));
    assert_eq!(kernel_mappings("once"), 2);
    drop(rest);
    assert_eq!(kernel_mappings("once"), 1);
    drop(read_only);
    assert_eq!(kernel_mappings("once"), 0);
    map(&files, &fd, 0, 4096, RW).unwrap();
}

#[test]
fn a_file_that_grows_takes_few_windows() {
    let (files, fd) = (MappedFiles::default(), memfd_named("grows", 0));
    let pieces: Vec<_> = (0..2000)
        .map(|page| {
            ftruncate(&fd, (page + 1) * 4096).unwrap();
            map(&files, &fd, page * 4096, 4096, RW).unwrap()
        })
        .collect();
    assert!(kernel_mappings("grows") <= 12, "{}", kernel_mappings("grows"));
    pieces[1999].write(4088, &[1; 8]).unwrap();
    pieces[0].write(0, &[1; 8]).unwrap();
}

#[test]
fn a_page_of_a_vast_file_takes_what_is_needed() {
    let (files, fd) = (MappedFiles::default(), memfd_named("vast", 1 << 60));
    let far: Vec<_> = (0..200u64).map(|n| map(&files, &fd, (n << 50) + 4096, 4096, RW).unwrap()).collect();
    assert!(kernel_mappings("vast") <= 200);
    far[199].write(0, b"far").unwrap();
    let mut seen = [0; 3];
    assert_eq!(rustix::io::pread(&fd, &mut seen, (199 << 50) + 4096).unwrap(), 3);
    assert_eq!(&seen, b"far");
    // Across the border of two windows, and larger than any.
    map(&files, &fd, (1 << 40) - 4096, 8192, RW).unwrap().write(4090, &[1; 12]).unwrap();
    map(&files, &fd, 5, 1 << 44, READ).unwrap().read((1 << 44) - 1, &mut [0]).unwrap();
    assert_eq!(map(&files, &fd, 0, (1 << 46) + 1, RW).unwrap_err(), Errno::E2BIG);
    assert_eq!(map(&files, &fd, u64::MAX, 4096, RW).unwrap_err(), Errno::EOVERFLOW);
}

#[test]
fn the_files_and_windows_of_a_client_are_limited() {
    let files = MappedFiles::default();
    let mut kept = Vec::new();
    let refused = loop {
        match map(&files, &memfd_named("many", 4096), 0, 4096, RW) {
            Ok(mapping) => kept.push(mapping),
            Err(errno) => break errno,
        }
    };
    assert_eq!(refused, Errno::E2BIG);
    assert!((16..=FILES_MAX as usize).contains(&kept.len()), "{}", kept.len());
    kept.pop();
    kept.push(map(&files, &memfd_named("many", 4096), 0, 4096, RW).unwrap());
    // Those of another client are counted apart.
    let other = MappedFiles::default();
    map(&other, &memfd_named("many", 4096), 0, 4096, RW).unwrap();
    drop(kept);
    // Pieces so far apart in one file that none shares a window.
    let (vast, mut kept) = (memfd_named("windows", i64::MAX as u64), Vec::new());
    let refused = loop {
        match map(&files, &vast, ((kept.len() as u64 + 1) << 50) - 4096, 8192, RW) {
            Ok(mapping) => kept.push(mapping),
            Err(errno) => break errno,
        }
    };
    assert_eq!((refused, kept.len() as u64), (Errno::E2BIG, WINDOWS_MAX));
    assert!(WINDOWS_MAX <= kernel_mappings_max() && kernel_mappings_max() <= 65530 / 2);
}

#[test]
fn a_shared_window_does_not_lend_its_rights() {
    let (files, fd) = (MappedFiles::default(), memfd_named("rights", PAGE));
    let _writable = map(&files, &fd, 0, PAGE, RW).unwrap();
    let read_only = File::open(proc_path(&fd)).unwrap();
    assert_eq!(map(&files, &read_only, 0, 8, RW).unwrap_err(), Errno::EACCES);
    assert_eq!(map(&files, &read_only, 0, 8, (false, true)).unwrap_err(), Errno::EACCES);
    map(&files, &read_only, 0, 8, READ).unwrap();
    let write_only = File::options().write(true).open(proc_path(&fd)).unwrap();
    assert_eq!(map(&files, &write_only, 0, 8, READ).unwrap_err(), Errno::EACCES);
    assert_eq!(map(&files, &fd, 0, 0, RW).unwrap_err(), Errno::EINVAL);
}
