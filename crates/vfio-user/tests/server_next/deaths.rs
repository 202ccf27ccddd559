//! Next clients and VMMs that die at any step, or are hostile.

use super::*;

#[test]
fn a_next_client_that_dies_at_any_step_leaves_nothing_behind() {
    let served = Served::new();
    let mut first = served.peer();
    let (memory, wired) = (memory(1 << 20), event());
    first.dma_map(0, 1 << 20, 0, Some(memory.as_fd())).ok();
    wire(&mut first, MSI, 0, &wired);
    name(&mut first, this_process()).ok();
    let others = self::memory(1 << 20);
    for steps in 0..7 {
        let mut next = Raw::connect(served.path());
        if steps > 0 {
            next.negotiate();
            assert_eq!(named(&mut first), (this_process(), THERE), "the name still holds");
        }
        if steps > 1 {
            next.dma_map(0, 1 << 20, 0, Some(others.as_fd())).ok();
            next.dma_map(1 << 30, 1 << 20, 0, None).ok();
        }
        if steps > 2 {
            wire(&mut next, MSI, 0, &event());
        }
        if steps > 3 {
            next.post(REGION_WRITE, &[bytes![0u64, BAR0, 4u32], b"his1".to_vec()].concat());
        }
        if steps > 4 {
            next.ask(REGION_READ, &bytes![0u64, BAR0, 4u32]);
        }
        if steps > 5 {
            next.send(&message(9, DMA_MAP, 0, &[0; 32])[..30], &[]);
        }
        drop(next);
        until("it is forgotten", || named(&mut first) == (this_process(), 0));
        assert_eq!(&first.region_read(BAR0, 0, 4).ok().body[16..], [0; 4]);
        let bus = served.machine.bus();
        bus.memory.write(0, b"its").unwrap();
        assert_eq!(bus.memory.write(1 << 30, b"x"), Err(Errno::EFAULT));
        bus.interrupts.raise(MSI, 0);
        assert_eq!(count(&wired), 1, "after {steps} steps");
    }
    // One that comes after all of them.
    let mut next = served.peer();
    drop(first);
    until("the device is its own", || named(&mut next) == (0, 0));
    next.assert_usable();
    assert_eq!(served.machine.bus().memory.write(0, b"x"), Err(Errno::EFAULT));
}

#[test]
fn a_vmm_that_dies_at_any_step_of_the_next_client_hands_the_device_over() {
    for steps in 0..6 {
        let served = Served::new();
        let mut first = served.peer();
        let wired = event();
        wire(&mut first, MSI, 0, &wired);
        first.dma_map(0, 4096, 0, Some(memory(4096).as_fd())).ok();
        name(&mut first, this_process()).ok();
        let mut next = Raw::connect(served.path());
        let (its, half) = (memory(4096), message(7, DMA_MAP, 0, &bytes![32u32, 3u32, 0u64, 0u64, 4096u64]));
        let mut parked = None;
        if steps > 0 {
            next.negotiate();
        }
        if steps > 1 {
            next.dma_map(1 << 20, 4096, 0, Some(its.as_fd())).ok();
        }
        if steps > 2 {
            wire(&mut next, MSI, 0, &wired);
        }
        if steps > 3 {
            parked = Some(next.ask(REGION_READ, &bytes![0u64, BAR0, 4u32]));
        }
        if steps > 4 {
            next.send(&half[..20], &[its.as_fd()]);
        }
        drop(first);
        if let Some(parked) = parked {
            assert_eq!(next.receive().ok().id, parked);
        }
        if steps > 4 {
            next.send(&half[20..], &[]);
            assert_eq!(next.receive().ok().id, 7);
        }
        if steps == 0 {
            next.negotiate();
        }
        until("the device is its own", || named(&mut next) == (0, 0));
        next.assert_usable();
        next.region_write(BAR0, 0, b"mine").ok();
        next.set_state(STOP).ok();
        let bus = served.machine.bus();
        assert_eq!(bus.memory.read(1 << 20, &mut [0; 4]).is_ok(), steps > 1);
        assert_eq!(bus.memory.read(0, &mut [0; 4]).is_ok(), steps > 4);
    }
}

#[test]
fn a_hostile_next_client_hurts_neither_the_vmm_nor_control() {
    let served = Served::new();
    let mut first = served.peer();
    let mut control = Raw::control(served.path());
    let theirs = memory(1 << 20);
    first.dma_map(0, 1 << 20, 0, Some(theirs.as_fd())).ok();
    let check = |first: &mut Raw, control: &mut Raw| {
        first.region_write(BAR0, 0, b"mine").ok();
        assert_eq!(&first.region_read(BAR0, 0, 4).ok().body[16..], b"mine");
        control.set_state(STOP_COPY).ok();
        control.mig_read(1024).ok();
        control.set_state(RUNNING).ok();
        served.machine.bus().memory.write(0, b"its").unwrap();
    };
    for deed in 0..6 {
        name(&mut first, this_process()).ok();
        let mut next = served.peer();
        match deed {
            // More maps than a client can have.
            0 => {
                let mut all = Vec::new();
                for at in 0..65_600u64 {
                    let map = bytes![32u32, 3u32, 0u64, at << 13, 4096u64];
                    all.extend(message(next.next_id(), DMA_MAP, NO_REPLY, &map));
                }
                next.send(&all, &[]);
                assert_eq!(next.dma_map(1 << 40, 4096, 0, None).refused(), 7, "E2BIG");
            }
            // More accesses than are kept: the server reads no further.
            1 => {
                next.socket.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
                let write =
                    message(1, REGION_WRITE, 0, &[bytes![0u64, BAR0, 4u32], b"his1".to_vec()].concat());
                let many = write.repeat(1000);
                let full = (0..1000).find_map(|_| next.try_send(&many, &[]).err());
                assert_eq!(full, Some(rustix::io::Errno::AGAIN), "it must end somewhere");
            }
            // Half a message, and silence.
            2 => next.send(&message(1, REGION_WRITE, 0, &[0; 64])[..40], &[]),
            3 => {}
            // Floods of what is answered, and of what is refused, with no reply taken.
            4 => {
                next.socket.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
                let ask = message(1, GET_INFO, 0, &bytes![16u32, 0u32, 0u32, 0u32]).repeat(1000);
                let full = (0..1000).find_map(|_| next.try_send(&ask, &[]).err());
                assert_eq!(full, Some(rustix::io::Errno::AGAIN));
            }
            _ => {
                let _ = next.try_send(&[0xff; 4096], &[]);
            }
        }
        for _ in 0..20 {
            check(&mut first, &mut control);
        }
        name(&mut control, 0).ok();
        until("it is gone", || named(&mut control).1 == 0);
        drop(next);
    }
    // Now with one that has prepared all that it may, and gets the device.
    name(&mut first, this_process()).ok();
    let mut next = served.peer();
    let mut all = Vec::new();
    for at in 0..65_535u64 {
        all.extend(message(next.next_id(), DMA_MAP, NO_REPLY, &bytes![32u32, 3u32, 0u64, at << 13, 4096u64]));
    }
    next.send(&all, &[]);
    next.assert_usable();
    drop(first);
    until("the device is its own", || named(&mut next) == (0, 0));
    assert_eq!(next.call(DMA_UNMAP, &bytes![24u32, 2u32, 0u64, 0u64]).ok().u64(16), 65_535 * 4096);
}
