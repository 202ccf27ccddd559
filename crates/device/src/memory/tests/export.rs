//! What holds for mappings and a log that go to another process.

use limosa_protocol::bitmap::words_for;
use limosa_protocol::feature::DmaLoggingRange;
use proptest::prelude::*;

use super::*;

const P: u64 = 4096;

/// A second memory, made of what the first one exports.
fn imported(memory: &GuestMemory, client: &Arc<Client>) -> GuestMemory {
    let second = GuestMemory::default();
    let remote: Arc<dyn RemoteMemory> = client.clone();
    for mapping in memory.export() {
        second.map(mapping.to_mapping(true, &remote).unwrap()).unwrap();
    }
    if let Some(log) = memory.export_log() {
        second.import_log(&log).unwrap();
        assert_eq!(second.export_log(), Some(log));
    }
    second
}

#[test]
fn a_memory_made_of_an_export_is_the_same() {
    let (fd, client) = (memfd(PAGE), Arc::new(Client::default()));
    client.bytes.lock().unwrap().resize(0x10000, 0);
    let memory = GuestMemory::default();
    memory.map(file(&fd, 0x1000, 0x1000, 4096 + 10, RW)).unwrap();
    memory.map(file(&fd, 0x2000, 0x1000, 0, DmaMapFlags::READ)).unwrap();
    let backing = Backing::FileIo { fd: fd.try_clone().unwrap().into(), offset: 0x8000, any_file: false };
    memory.map(Mapping { iova: 0x3000, size: 0x1000, flags: DmaMapFlags::WRITE, backing }).unwrap();
    memory.map(remote(&client, 0x4000, 0x1000)).unwrap();
    memory.map(file(&fd, u64::MAX - 0xfff, 0x1000, 0, RW)).unwrap();
    let exported = memory.export();
    let seen: Vec<_> = exported.iter().map(|it| (it.iova, it.size, it.flags, it.kind, it.offset)).collect();
    let (file, by_io) = (MemoryKind::File, MemoryKind::FileIo);
    assert_eq!(
        seen,
        [
            (0x1000, 0x1000, RW, file, 4106),
            (0x2000, 0x1000, DmaMapFlags::READ, file, 0),
            (0x3000, 0x1000, DmaMapFlags::WRITE, by_io, 0x8000),
            (0x4000, 0x1000, RW, MemoryKind::Remote, 0),
            (u64::MAX - 0xfff, 0x1000, RW, file, 0),
        ]
    );
    let fds = [0, 4].map(|at| exported[at].fd.clone().unwrap());
    assert!(Arc::ptr_eq(&fds[0], &fds[1]), "one fd for what is mapped once");
    assert!(exported[3].fd.is_none());

    memory.logging_start(P, &[]).unwrap();
    memory.write(0x1000, &[1; 16]).unwrap();
    memory.write(0x3ff8, &[2; 16]).unwrap();
    let second = imported(&memory, &client);
    for both in [&memory, &second] {
        let mut words = [0];
        both.logging_report(0, 64 * P, P, &mut words).unwrap();
        assert_eq!(words, [0b11010]);
        both.write(u64::MAX, &[3]).unwrap();
        assert_eq!(both.write(0x2000, &[1]), Err(Errno::EFAULT));
        assert_eq!(both.read(0x3000, &mut [0]), Err(Errno::EFAULT));
        assert_eq!(both.logging_start(P, &[]), Err(Errno::EINVAL), "it is on");
        let mut words = [0];
        both.unmap_report(u64::MAX - 0xfff, 0x1000, P, &mut words).unwrap();
        assert_eq!(words, [1]);
    }
    // It grows with what is mapped later, as the first does.
    second.map(super::file(&fd, 1 << 40, 0x1000, 0, RW)).unwrap();
    second.write(1 << 40, &[1]).unwrap();
    let mut words = [0];
    second.logging_report(1 << 40, P, P, &mut words).unwrap();
    assert_eq!(words, [1]);
}

#[test]
fn a_log_that_cannot_be_is_refused() {
    let memory = GuestMemory::default();
    let range = |iova, length| DmaLoggingRange { iova, length };
    let good = ExportedLog {
        page_size: P,
        everything: false,
        ranges: vec![range(P, 2 * P), range(8 * P, 64 * P)],
        dirty: vec![DirtyWords { iova: 9 * P, pages: 3, words: vec![0b101] }],
    };
    let refused = |change: &dyn Fn(&mut ExportedLog)| {
        let mut log = good.clone();
        change(&mut log);
        memory.import_log(&log).unwrap_err()
    };
    assert_eq!(refused(&|log| log.page_size = 0), Errno::EINVAL);
    assert_eq!(refused(&|log| log.page_size = 12288), Errno::EINVAL);
    assert_eq!(refused(&|log| log.page_size = 512), Errno::EINVAL);
    assert_eq!(refused(&|log| log.page_size = 1 << 40), Errno::EINVAL);
    assert_eq!(refused(&|log| log.ranges[0].length = 0), Errno::EINVAL);
    assert_eq!(refused(&|log| log.ranges[0].length = P + 1), Errno::EINVAL);
    assert_eq!(refused(&|log| log.ranges[1].iova = u64::MAX - P + 1), Errno::EINVAL);
    assert_eq!(refused(&|log| log.ranges[0].length = 8 * P), Errno::EINVAL, "they overlap");
    assert_eq!(refused(&|log| log.ranges.swap(0, 1)), Errno::EINVAL);
    assert_eq!(refused(&|log| log.ranges[1].length = (LOGGED_PAGES_MAX + 1) * P), Errno::E2BIG);
    assert_eq!(refused(&|log| log.dirty[0].iova = 0), Errno::EINVAL);
    assert_eq!(refused(&|log| log.dirty[0].iova = 5 * P), Errno::EINVAL);
    assert_eq!(refused(&|log| log.dirty[0].iova = 1 << 50), Errno::EINVAL);
    assert_eq!(refused(&|log| log.dirty[0].iova += 1), Errno::EINVAL);
    assert_eq!(refused(&|log| log.dirty[0].pages = 64), Errno::EINVAL, "beyond the range");
    assert_eq!(refused(&|log| log.dirty[0].pages = u64::MAX), Errno::EINVAL);
    assert_eq!(refused(&|log| log.dirty[0].words.clear()), Errno::EINVAL);
    memory.import_log(&good).unwrap();
    assert_eq!(memory.import_log(&good), Err(Errno::EINVAL), "logging is on");
    let mut words = [0];
    memory.logging_report(8 * P, 64 * P, P, &mut words).unwrap();
    assert_eq!(words, [0b1010]);
    assert!(memory.export_log().unwrap().dirty.is_empty());
    memory.logging_stop().unwrap();
    assert_eq!(memory.export_log(), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_page_is_lost_on_the_way_to_another_process(
        everything in any::<bool>(),
        before in prop::collection::vec((0u64..1 << 20, 1u64..40_000), 0..20),
        after in prop::collection::vec((0u64..1 << 20, 1u64..40_000), 0..20),
        reported in 0u64..256,
    ) {
        let (fd, client) = (memfd(256 * P), Arc::new(Client::default()));
        let memory = GuestMemory::default();
        memory.map(file(&fd, 0, 256 * P, 0, RW)).unwrap();
        let named = DmaLoggingRange { iova: 16 * P, length: 200 * P };
        let ranges = if everything { vec![] } else { vec![named] };
        memory.logging_start(P, &ranges).unwrap();
        let write = |to: &GuestMemory, writes: &[(u64, u64)]| for (iova, len) in writes {
            to.write(*iova, &vec![1; (*len).min((1 << 20) - iova) as usize]).unwrap();
        };
        write(&memory, &before);
        let mut words = vec![0; words_for(256)];
        if reported > 0 {
            memory.logging_report(0, reported * P, P, &mut words).unwrap();
        }
        let second = imported(&memory, &client);
        // Both go on in the same way.
        for both in [&memory, &second] {
            write(both, &after);
        }
        let report = |of: &GuestMemory| {
            let mut words = vec![0; words_for(256)];
            of.logging_report(0, 256 * P, P, &mut words).unwrap();
            words
        };
        prop_assert_eq!(report(&memory), report(&second));
    }
}
