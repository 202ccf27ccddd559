//! INTx, MSI and MSI-X: what is held, masked, pending and signalled.

use super::*;

#[test]
fn intx_is_held_until_all_is_lowered() {
    let mut function = function();
    let irqs = Irqs::new(&function.irqs());
    let fd = wire(&irqs, INTX, 0);
    function.raise(0, &irqs);
    function.raise(3, &irqs);
    assert_eq!(count(&fd), 1);
    assert_eq!(read::<1>(&function, 6)[0] & 8, 8, "the status says so");
    function.lower(0, &irqs);
    irqs.unmask(INTX, 0, 1).unwrap();
    assert_eq!(count(&fd), 1, "one is left");
    function.lower(3, &irqs);
    irqs.unmask(INTX, 0, 1).unwrap();
    assert_eq!(count(&fd), 0);
    assert_eq!(read::<1>(&function, 6)[0] & 8, 0);
}

#[test]
fn intx_disable_is_respected() {
    let mut function = function();
    let irqs = Irqs::new(&function.irqs());
    let fd = wire(&irqs, INTX, 0);
    function.config_write(5, &[4], &irqs).unwrap();
    function.raise(0, &irqs);
    assert_eq!(count(&fd), 0);
    assert_eq!(read::<1>(&function, 6)[0] & 8, 8);
    function.config_write(5, &[0], &irqs).unwrap();
    assert_eq!(count(&fd), 1, "held when it is allowed again");
}

#[test]
fn messages_go_by_what_is_wired() {
    let mut function = function();
    let irqs = Irqs::new(&function.irqs());
    let intx = wire(&irqs, INTX, 0);
    let (msi0, msi1) = (wire(&irqs, MSI, 0), wire(&irqs, MSI, 1));
    function.raise(1, &irqs);
    function.raise(3, &irqs);
    function.raise(3, &irqs);
    assert_eq!(
        (count(&msi0), count(&msi1), count(&intx)),
        (2, 1, 0),
        "those without a vector share the first"
    );
    let msix = wire(&irqs, MSIX, 3);
    function.raise(3, &irqs);
    function.raise(4, &irqs);
    function.raise(1000, &irqs);
    assert_eq!((count(&msi0), count(&msix), count(&intx)), (0, 1, 0));
}

#[test]
fn msi_masks_hold_messages_back() {
    let mut function = function();
    let irqs = Irqs::new(&function.irqs());
    let fd = wire(&irqs, MSI, 2);
    let at = capability(&function, 5);
    let changes = function.config_write(at + 16, &[0xff; 4], &irqs).unwrap();
    assert_eq!(changes, Changes::MSI);
    assert_eq!(u32_at(&function, at + 16), 0xf, "as many as there are vectors");
    function.raise(2, &irqs);
    assert_eq!((count(&fd), u32_at(&function, at + 20)), (0, 4));
    function.config_write(at + 20, &[0; 4], &irqs).unwrap();
    assert_eq!(u32_at(&function, at + 20), 4, "pending bits cannot be written");
    function.config_write(at + 16, &[0xb], &irqs).unwrap();
    assert_eq!((count(&fd), u32_at(&function, at + 20)), (1, 0));
    assert!(!function.msi_enabled());
    function.config_write(at + 2, &[1], &irqs).unwrap();
    assert!(function.msi_enabled());
}

#[test]
fn an_msix_table_that_the_client_never_touches_masks_nothing() {
    let mut function = function();
    let irqs = Irqs::new(&function.irqs());
    let fd = wire(&irqs, MSIX, 69);
    let mut control = [0];
    assert!(function.bar_read(0, TABLE + 69 * 16 + 12, &mut control, &irqs));
    assert_eq!(control, [1], "masked from reset on");
    function.raise(69, &irqs);
    assert_eq!(count(&fd), 1);
}

#[test]
fn msix_masks_that_the_client_wrote_hold_messages_back() {
    let mut function = function();
    let irqs = Irqs::new(&function.irqs());
    let fd = wire(&irqs, MSIX, 69);
    let control = TABLE + 69 * 16 + 12;
    assert!(function.bar_write(0, control, &[0xff; 4], &irqs));
    let mut entry = [0; 4];
    function.bar_read(0, control, &mut entry, &irqs);
    assert_eq!(entry, [1, 0, 0, 0], "one bit can be written");
    function.raise(69, &irqs);
    let mut pending = [0; 16];
    assert!(function.bar_read(0, PENDING, &mut pending, &irqs));
    assert_eq!((count(&fd), pending[8]), (0, 1 << 5));
    assert!(function.bar_write(0, PENDING, &[0; 16], &irqs), "without effect");
    assert!(function.bar_write(0, control, &[0; 4], &irqs));
    assert_eq!(count(&fd), 1);
    assert!(function.bar_read(0, PENDING, &mut pending, &irqs));
    assert_eq!(pending, [0; 16]);
}

#[test]
fn the_function_mask_of_msix_holds_all_back() {
    let mut function = function();
    let irqs = Irqs::new(&function.irqs());
    let fd = wire(&irqs, MSIX, 5);
    let at = capability(&function, 0x11);
    assert_eq!(u32_at(&function, at) >> 16, 69);
    assert_eq!((u32_at(&function, at + 4), u32_at(&function, at + 8)), (TABLE as u32, PENDING as u32));
    assert_eq!(function.config_write(at + 2, &[0xff, 0xff], &irqs), Ok(Changes::MSIX));
    assert!(function.msix_enabled());
    function.raise(5, &irqs);
    assert_eq!(count(&fd), 0);
    function.config_write(at + 3, &[0x80], &irqs).unwrap();
    assert_eq!(count(&fd), 1);
}

#[test]
fn a_message_on_a_vector_that_is_not_wired_is_pending_until_it_is() {
    let mut function = function();
    let irqs = Irqs::new(&function.irqs());
    let _first = wire(&irqs, MSIX, 0);
    function.raise(69, &irqs);
    let mut pending = [0; 16];
    assert!(function.bar_read(0, PENDING, &mut pending, &irqs));
    assert_eq!(pending[8], 1 << 5);
    assert_eq!(function.state(&irqs).msix_pending[8], 1 << 5);
    assert_eq!(count(&wire(&irqs, MSIX, 69)), 1);
    assert!(function.bar_read(0, PENDING, &mut pending, &irqs));
    assert_eq!(pending, [0; 16]);
}

#[test]
fn a_message_while_the_client_rewires_the_whole_index_is_not_lost() {
    let mut function = function();
    let irqs = Irqs::new(&function.irqs());
    let intx = wire(&irqs, INTX, 0);
    let at = capability(&function, 0x11);
    function.config_write(at + 3, &[0x80], &irqs).unwrap();
    drop(wire(&irqs, MSIX, 3));
    irqs.client.set(MSIX, 0, SetIrqs::Disable).unwrap();
    function.settle(&irqs);
    function.raise(3, &irqs);
    assert_eq!((count(&wire(&irqs, MSIX, 3)), count(&intx)), (1, 0));
}

#[test]
fn a_pending_message_of_a_loaded_state_is_signalled_when_its_vector_is_wired() {
    for kind in [MSI, MSIX] {
        let mut source = function();
        let irqs = Irqs::new(&source.irqs());
        let at = capability(&source, if kind == MSI { 5 } else { 0x11 });
        source.config_write(at + 2, &[1, 0x80], &irqs).unwrap();
        source.raise(0, &irqs);
        let mut loaded = function().loaded("pci", &source.state(&irqs)).unwrap();
        let irqs = Irqs::new(&loaded.irqs());
        loaded.settle(&irqs);
        assert_eq!(count(&wire(&irqs, kind, 0)), 1, "index {kind}");
    }
}

#[test]
fn intx_settles_when_messages_are_wired_and_unwired() {
    let mut function = function();
    let irqs = Irqs::new(&function.irqs());
    let intx = wire(&irqs, INTX, 0);
    function.raise(0, &irqs);
    assert_eq!(count(&intx), 1);
    wire(&irqs, MSI, 0);
    function.settle(&irqs);
    irqs.unmask(INTX, 0, 1).unwrap();
    assert_eq!(count(&intx), 0, "the client uses messages");
    irqs.client.set(MSI, 0, SetIrqs::Disable).unwrap();
    function.settle(&irqs);
    assert_eq!(count(&intx), 1, "what is raised is held again");
}

#[test]
fn a_client_may_wire_msix_vectors_one_by_one() {
    let flags = function().irqs()[MSIX as usize].flags;
    assert!(!flags.contains(IrqFlags::NORESIZE));
}

#[test]
fn accesses_beside_the_msix_table_are_the_models() {
    let mut function = function();
    let irqs = Irqs::new(&function.irqs());
    let mut data = [0x55; 8];
    assert!(!function.bar_read(0, TABLE - 4, &mut data, &irqs));
    assert_eq!(data, [0x55, 0x55, 0x55, 0x55, 0, 0, 0, 0]);
    assert!(!function.bar_read(1, TABLE, &mut data, &irqs));
    assert!(!function.bar_write(0, TABLE - 4, &[0xff; 8], &irqs));
    assert!(function.bar_read(0, TABLE, &mut data, &irqs));
    assert_eq!(data, [0xfc, 0xff, 0xff, 0xff, 0, 0, 0, 0], "the lowest address bits are zero");
    assert!(!function.bar_read(0, u64::MAX - 3, &mut data, &irqs));
}
