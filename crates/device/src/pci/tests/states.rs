//! The state of a function: saved, loaded, refused.

use super::*;

#[test]
fn reset_brings_everything_back() {
    let mut function = function();
    let before = function.state(&Interrupts::default());
    let irqs = Irqs::new(&function.irqs());
    let fd = wire(&irqs, INTX, 0);
    for at in 0..4096 {
        function.config_write(at, &[0xfb], &irqs).unwrap();
    }
    function.bar_write(0, 0, &[0xff; 0x4000], &irqs);
    function.raise(1, &irqs);
    assert_ne!(function.state(&irqs), before);
    function.reset(&irqs);
    assert_eq!(function.state(&irqs), before);
    count(&fd);
    irqs.unmask(INTX, 0, 1).unwrap();
    assert_eq!(count(&fd), 0, "not held any more");
}

#[test]
fn a_state_is_loaded_and_takes_effect_when_settled() {
    let mut source = function();
    let irqs = Irqs::new(&source.irqs());
    source.config_write(4, &[7, 0], &irqs).unwrap();
    source.bar_write(0, TABLE, &[0x11; 24], &irqs);
    wire(&irqs, MSIX, 0);
    source.raise(0, &irqs);
    source.raise(1, &irqs);
    let state = source.state(&irqs);
    let fresh = function();
    let mut loaded = fresh.loaded("pci", &state).unwrap();
    assert_eq!(loaded.state(&Interrupts::default()), state);
    assert_eq!(fresh.state(&Interrupts::default()), function().state(&Interrupts::default()));
    let irqs = Irqs::new(&loaded.irqs());
    loaded.settle(&irqs);
    let intx = wire(&irqs, INTX, 0);
    assert_eq!(count(&intx), 1, "what was raised is heard by the new client");
}

#[test]
fn the_state_of_another_function_is_refused() {
    let here = function();
    let refused = |change: &dyn Fn(&mut FunctionState)| {
        let mut state = function().state(&Interrupts::default());
        change(&mut state);
        let refusal = here.loaded("pci", &state).unwrap_err();
        assert!(matches!(&refusal, Refusal::Unfit { name, .. } if name == "pci"));
        refusal.to_string()
    };
    let text = refused(&|state| state.config[2] ^= 1);
    assert!(text.ends_with("configuration space differs at 0x2: 0x79, here 0x78"), "{text}");
    refused(&|state| state.config.truncate(256));
    refused(&|state| state.msix_table.truncate(16));
    refused(&|state| state.msix_pending.push(0));
    refused(&|state| state.msix_written.push(70));
    refused(&|state| state.raised.push(70));
    refused(&|state| *state = FunctionState::default());
    let without = Function::builder(identity()).build();
    assert!(without.loaded("pci", &here.state(&Interrupts::default())).is_err());
}
