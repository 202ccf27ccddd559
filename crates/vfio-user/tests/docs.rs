//! What the documentation shows is what compiles.

#[test]
fn the_device_in_the_documentation_is_the_example() {
    let page = include_str!("../../../docs/device.md");
    let example = include_str!("../examples/counter.rs");
    let shown = page.split("```rust\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    assert_eq!(shown, example, "docs/device.md does not show crates/vfio-user/examples/counter.rs as it is");
}
