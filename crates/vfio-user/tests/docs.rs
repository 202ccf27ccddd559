//! What the documentation shows is what compiles.

fn shown(page: &str) -> &str {
    page.split("```rust\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap()
}

#[test]
fn the_device_in_the_documentation_is_the_example() {
    let example = include_str!("../examples/counter.rs");
    assert_eq!(shown(include_str!("../../../docs/device.md")), example);
}

#[test]
fn the_vmm_in_the_documentation_is_the_example() {
    let example = include_str!("../examples/vmm.rs");
    assert_eq!(shown(include_str!("../../../docs/client.md")), example);
}
