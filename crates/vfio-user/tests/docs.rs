//! What the documentation shows is what compiles.

/// A block of code of a page, by the fence that it begins with.
fn shown<'a>(page: &'a str, fence: &str, number: usize) -> &'a str {
    page.split(fence).nth(number).and_then(|rest| rest.split("```").next()).unwrap()
}

#[test]
fn the_device_in_the_documentation_is_the_example() {
    let example = include_str!("../examples/counter.rs");
    assert_eq!(shown(include_str!("../../../docs/device.md"), "```rust\n", 1), example);
}

#[test]
fn the_pci_device_in_the_documentation_is_the_example() {
    let example = include_str!("../examples/disk.rs");
    assert_eq!(shown(include_str!("../../../docs/device.md"), "```rust\n", 2), example);
}

#[test]
fn the_device_with_pre_copy_in_the_documentation_is_the_example() {
    let example = include_str!("../examples/notepad.rs");
    assert_eq!(shown(include_str!("../../../docs/device.md"), "```rust\n", 3), example);
}

#[test]
fn the_replaceable_server_in_the_documentation_is_the_example() {
    let example = include_str!("../examples/replaceable.rs");
    assert_eq!(shown(include_str!("../../../docs/device.md"), "```rust\n", 4), example);
}

#[test]
fn what_a_device_depends_on_is_what_it_is_built_with() {
    let (page, workspace) = (include_str!("../../../docs/device.md"), include_str!("../../../Cargo.toml"));
    let shown = shown(page, "```toml\n[dependencies]\n", 1);
    for line in shown.lines() {
        let (name, value) = line.split_once(" = ").unwrap();
        let path = value.strip_prefix(r#"{ path = "../limosa/"#).and_then(|rest| rest.split('"').next());
        let expected = path.map_or(line.to_owned(), |path| format!(r#"{name} = {{ path = "{path}""#));
        assert!(workspace.contains(&expected), "{expected}");
    }
    assert_eq!(shown.lines().count(), 4);
}

#[test]
fn the_vmm_in_the_documentation_is_the_example() {
    let example = include_str!("../examples/vmm.rs");
    assert_eq!(shown(include_str!("../../../docs/client.md"), "```rust\n", 1), example);
}
