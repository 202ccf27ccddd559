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
fn the_dependencies_in_the_documentation_are_those_of_the_workspace() {
    let workspace = include_str!("../../../Cargo.toml");
    for (page, lines) in [
        (include_str!("../../../docs/device.md"), 4),
        (include_str!("../../../docs/client.md"), 4),
        (include_str!("../../../docs/embedding.md"), 6),
    ] {
        let shown = shown(page, "```toml\n[dependencies]\n", 1);
        for line in shown.lines() {
            let (name, value) = line.split_once(" = ").unwrap();
            let path = value.strip_prefix(r#"{ path = "../limosa/"#).and_then(|rest| rest.split('"').next());
            // A program needs fewer features of a crate than the workspace.
            let version = value.split(", features").next().unwrap();
            let expected = match path {
                Some(path) => format!(r#"{name} = {{ path = "{path}""#),
                None => format!("{name} = {version}"),
            };
            assert!(workspace.contains(&expected), "{expected}");
        }
        assert_eq!(shown.lines().count(), lines, "{shown}");
    }
}

#[test]
fn the_vmm_in_the_documentation_is_the_example() {
    let example = include_str!("../examples/vmm.rs");
    assert_eq!(shown(include_str!("../../../docs/client.md"), "```rust\n", 1), example);
}
