//! What holds for pins.

use std::sync::mpsc;
use std::time::Duration;

use super::*;

const P: u64 = 4096;

fn report(memory: &GuestMemory) -> u64 {
    let mut words = [0];
    memory.logging_report(0, 64 * P, P, &mut words).unwrap();
    words[0]
}

/// 64 pages at 0, in two mappings of one file, the second from page 32 on.
fn two(fd: &OwnedFd) -> GuestMemory {
    let memory = GuestMemory::default();
    memory.map(file(fd, 0, 32 * P, 0, RW)).unwrap();
    memory.map(file(fd, 32 * P, 32 * P, 32 * P, RW)).unwrap();
    memory
}

#[test]
fn data_goes_to_and_from_a_file_without_a_copy() {
    let (fd, disk) = (memfd(64 * P), memfd(PAGE));
    let memory = two(&fd);
    memory.logging_start(P, &[]).unwrap();
    rustix::io::pwrite(&disk, &vec![7; 8192], 100).unwrap();
    let pin = memory.dma.pin(31 * P, 2 * P, DmaMapFlags::WRITE).unwrap();
    assert_eq!(pin.parts().iter().map(|part| part.len()).collect::<Vec<_>>(), [4096, 4096]);
    assert_eq!(pin.read_from(&disk, 100), Ok(8192));
    assert_eq!(pin.write_to(&disk, 0), Err(Errno::EFAULT), "pinned for writing alone");
    assert_eq!(report(&memory), 0, "not before it is dropped");
    drop(pin);
    assert_eq!(report(&memory), 0b11 << 31);
    assert!(bytes_of(&fd, 31 * P, 8192).iter().all(|byte| *byte == 7));
    let pin = memory.dma.pin(32 * P, P, DmaMapFlags::READ).unwrap();
    assert_eq!(pin.write_to(&disk, 50_000), Ok(4096));
    assert_eq!(pin.read_from(&disk, 0), Err(Errno::EFAULT));
    drop(pin);
    assert_eq!(bytes_of(&disk, 50_000, 4096), [7; 4096]);
    assert_eq!(report(&memory), 0, "read, not written");
    let mut short = memory.dma.pin(0, 8 * P, RW).unwrap();
    short.written(P + 1);
    drop(short);
    assert_eq!(report(&memory), 0b11, "as much as was written");
    let mut nothing = memory.dma.pin(0, P, RW).unwrap();
    nothing.written(0);
    drop(nothing);
    assert_eq!(report(&memory), 0);
}

#[test]
fn what_cannot_be_pinned_is_refused() {
    let (fd, client) = (memfd(PAGE), Arc::new(Client::default()));
    let memory = GuestMemory::default();
    memory.map(file(&fd, 0, P, 0, DmaMapFlags::READ)).unwrap();
    memory.map(remote(&client, P, P)).unwrap();
    let pin = |iova, bytes, access| memory.dma.pin(iova, bytes, access).map(drop);
    assert_eq!(pin(0, P, DmaMapFlags::READ), Ok(()));
    assert_eq!(pin(0, P, RW), Err(Errno::EFAULT));
    assert_eq!(pin(0, 0, DmaMapFlags::READ), Err(Errno::EINVAL));
    assert_eq!(pin(0, P, DmaMapFlags::empty()), Err(Errno::EINVAL));
    assert_eq!(pin(0, 2 * P, DmaMapFlags::READ), Err(Errno::ENOTSUP), "a part is reached by messages");
    assert_eq!(pin(2 * P, 1, DmaMapFlags::READ), Err(Errno::EFAULT));
    assert_eq!(pin(u64::MAX, 2, DmaMapFlags::READ), Err(Errno::EFAULT));
    assert_eq!(memory.unmap(0, 2 * P), Ok(2 * P), "nothing was left pinned");
    memory.map(file(&fd, 0, P, 0, RW)).unwrap();
    ftruncate(&fd, 0).unwrap();
    let pin = memory.dma.pin(0, P, RW).unwrap();
    assert_eq!(pin.read_from(memfd(PAGE), 0), Err(Errno::EFAULT), "the file is truncated");
}

#[test]
fn an_unmap_waits_until_the_device_has_let_go() {
    let fd = memfd(64 * P);
    let memory = two(&fd);
    memory.set_unmap_wait(Duration::from_secs(600));
    memory.logging_start(P, &[]).unwrap();
    let held = Arc::new(Mutex::new(Some(memory.dma.pin(P, P, RW).unwrap())));
    let (told, asked) = mpsc::channel();
    memory.dma.before_unmap(move |iova, size| told.send((iova, size)).unwrap());
    std::thread::scope(|scope| {
        let unmap = scope.spawn(|| {
            let mut words = [0];
            (memory.unmap_report(0, 32 * P, P, &mut words), words)
        });
        assert_eq!(asked.recv(), Ok((0, 32 * P)));
        // Accesses go on meanwhile, and new pins end.
        memory.write(2 * P, &[1]).unwrap();
        while memory.dma.pin(0, P, RW).map(drop) != Err(Errno::EBUSY) {
            std::thread::yield_now();
        }
        assert!(memory.dma.pin(32 * P, P, RW).is_ok(), "what is not in the range");
        assert!(!unmap.is_finished());
        drop(held.lock().unwrap().take());
        let (unmapped, words) = unmap.join().unwrap();
        assert_eq!(unmapped, Ok(32 * P));
        assert_eq!(words[0] & 0b110, 0b110, "what was pinned is in the bitmap of the unmap");
    });
    assert_eq!(memory.write(0, &[1]), Err(Errno::EFAULT));
}

#[test]
fn an_unmap_of_what_stays_pinned_fails_and_leaves_the_mapping() {
    let fd = memfd(64 * P);
    let memory = two(&fd);
    memory.set_unmap_wait(Duration::ZERO);
    memory.logging_start(P, &[]).unwrap();
    let pin = memory.dma.pin(31 * P, 2 * P, RW).unwrap();
    assert_eq!(memory.unmap(0, 32 * P), Err(Errno::EBUSY));
    assert_eq!(memory.unmap(32 * P, 32 * P), Err(Errno::EBUSY));
    assert_eq!(memory.unmap_all(), Err(Errno::EBUSY));
    assert_eq!(memory.unmap_report(0, 64 * P, P, &mut [0]), Err(Errno::EBUSY));
    memory.write(P, &[1]).unwrap();
    drop(memory.dma.pin(2 * P, P, RW).unwrap());
    assert_eq!(report(&memory), 0b110, "and nothing was taken from the log");
    drop(pin);
    assert_eq!(memory.unmap_all(), Ok(64 * P));
    // A client that is gone takes its mappings along, and a late pin still has its memory.
    memory.map(file(&fd, 0, P, 0, RW)).unwrap();
    let late = memory.dma.pin(0, P, RW).unwrap();
    memory.clear();
    assert_eq!(memory.write(0, &[1]), Err(Errno::EFAULT));
    let disk = memfd(PAGE);
    rustix::io::pwrite(&disk, &[9; 4096], 0).unwrap();
    assert_eq!(late.read_from(&disk, 0), Ok(4096));
    assert_eq!(bytes_of(&fd, 0, 1), [9]);
}

#[test]
fn a_hook_lets_go_of_pins_that_many_threads_make() {
    let fd = memfd(64 * P);
    let memory = two(&fd);
    memory.set_unmap_wait(Duration::from_secs(600));
    let pins = Arc::new(Mutex::new(Vec::new()));
    let kept = pins.clone();
    memory.dma.before_unmap(move |_, _| kept.lock().unwrap().clear());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            let (memory, pins) = (&memory, &pins);
            scope.spawn(move || {
                for n in 0..5000u64 {
                    match memory.dma.pin(n % 32 * P, P, RW) {
                        // Some are kept until the hook comes, others dropped at once.
                        Ok(pin) if n % 7 == 0 && n < 4900 => {
                            let mut pins = pins.lock().unwrap();
                            pins.truncate(100);
                            pins.push(pin);
                        }
                        Ok(pin) => drop(pin),
                        Err(errno) => assert!(matches!(errno, Errno::EBUSY | Errno::EFAULT), "{errno}"),
                    }
                    // What came after the hook would be waited for.
                    pins.lock().unwrap().clear();
                }
            });
        }
        for _ in 0..200 {
            assert_eq!(memory.unmap(0, 32 * P), Ok(32 * P));
            memory.map(file(&fd, 0, 32 * P, 0, RW)).unwrap();
        }
    });
}
