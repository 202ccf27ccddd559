//! The DMA engine: its writes go on after a move where they stopped.

use super::*;

#[test]
fn dma_goes_on_after_a_move_where_it_stopped() {
    for pattern in [Pattern::Sequential, Pattern::Random, Pattern::OnePage] {
        let guest = Guest::new(Window { seed: 4, pages: 50, pattern });
        let (source, destination) =
            (synthetic("state=64K,block=4K,seed=4"), synthetic("state=64K,block=4K,seed=5"));
        guest.wire(&source);
        guest.wire(&destination);
        guest.set_up(&source, 5_000);
        // Wherever it is just then.
        let state = save(&source);
        let stopped_at = get(&source, DMA_SEQUENCE);
        guest.check(stopped_at);
        load(&destination, &state, 1 << 20).unwrap();
        assert_eq!(get(&destination, DMA_SEQUENCE), stopped_at);
        guest.check(stopped_at);
        destination.set_state(State::Running).unwrap();
        guest.wait();
        assert_eq!((get(&destination, DMA_SEQUENCE), get(&destination, DMA_CONTROL)), (5_000, 0));
        guest.check(5_000);
        assert_eq!(get(&source, DMA_SEQUENCE), stopped_at, "only one of them runs");
    }
}

#[test]
fn the_engine_stops_when_it_is_told_to_and_has_nothing_under_way() {
    let guest = Guest::new(Window { seed: 1, pages: 8, pattern: Pattern::Sequential });
    let device = synthetic(SMALL);
    assert_eq!(
        refused(device.region_write(0, DMA_CONTROL, &1_u64.to_le_bytes())),
        Errno::EINVAL,
        "no window"
    );
    guest.wire(&device);
    guest.set_up(&device, 0);
    assert_eq!(refused(device.region_write(0, DMA_PAGES, &9_u64.to_le_bytes())), Errno::EBUSY);
    assert_eq!(refused(device.region_write(0, DMA_PATTERN, &9_u64.to_le_bytes())), Errno::EINVAL);
    set(&device, DMA_CONTROL, 0);
    guest.check(get(&device, DMA_SEQUENCE));
    // And on from there.
    let limit = get(&device, DMA_SEQUENCE) + 100;
    set(&device, DMA_LIMIT, limit);
    set(&device, DMA_CONTROL, 1);
    guest.wait();
    guest.check(limit);
    device.reset().unwrap();
    assert_eq!((get(&device, DMA_SEQUENCE), get(&device, DMA_PAGES)), (0, 0));
}

#[test]
fn a_write_that_memory_refuses_turns_the_engine_off() {
    let guest = Guest::new(Window { seed: 1, pages: 8, pattern: Pattern::Sequential });
    let device = synthetic(SMALL);
    guest.wire(&device);
    device.dma_unmap(BASE, 8 * PAGE_BYTES as u64, None).unwrap();
    guest.set_up(&device, 0);
    guest.wait();
    assert_eq!((get(&device, DMA_FAILED), get(&device, DMA_CONTROL), get(&device, DMA_SEQUENCE)), (1, 0, 0));
    device.set_irqs(pci_index::IRQ_MSI, 0, IrqAction::Disable).unwrap();
    guest.wire(&device);
    set(&device, DMA_LIMIT, 8);
    set(&device, DMA_CONTROL, 1);
    guest.wait();
    assert_eq!(get(&device, DMA_FAILED), 0);
    guest.check(8);
}
