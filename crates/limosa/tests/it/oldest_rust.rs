//! The oldest Rust that builds what is published (`rust-version`): no dependency needs a newer one. Clippy looks at the library items
//! that are used.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// A version such as 1.89, as numbers.
fn version(of: &str) -> Vec<u64> {
    let number = |number: &str| number.parse().unwrap_or_else(|_| panic!("{of} is no version"));
    let mut numbers: Vec<u64> = of.split('.').map(number).collect();
    numbers.resize(3, 0);
    numbers
}

#[test]
fn no_dependency_needs_a_newer_rust_than_the_oldest_that_is_named() {
    let cargo = std::env::var_os("CARGO").expect("a test is run by cargo");
    let mut command = Command::new(cargo);
    command.args(["metadata", "--locked", "--offline", "--format-version=1"]);
    // For others not all is downloaded.
    command.args(["--filter-platform", &format!("{}-unknown-linux-gnu", std::env::consts::ARCH)]);
    command.args(["--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")]);
    let told = command.output().unwrap();
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    let metadata: Value = serde_json::from_slice(&told.stdout).unwrap();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let packages: BTreeMap<_, _> =
        list(&metadata["packages"]).into_iter().map(|package| (package["id"].to_string(), package)).collect();
    let nodes: BTreeMap<_, _> =
        list(&metadata["resolve"]["nodes"]).into_iter().map(|node| (node["id"].to_string(), node)).collect();
    let published = |id: &String| packages[id]["publish"].is_null();
    let mut left: Vec<_> =
        list(&metadata["workspace_members"]).iter().map(Value::to_string).filter(published).collect();
    let mut needed = BTreeSet::new();
    while let Some(id) = left.pop() {
        if needed.contains(&id) {
            continue;
        }
        for dependency in list(&nodes[&id]["deps"]) {
            // A dependency of tests may need a newer one.
            if list(&dependency["dep_kinds"]).iter().any(|kind| kind["kind"] != "dev") {
                left.push(dependency["pkg"].to_string());
            }
        }
        needed.insert(id);
    }
    assert!(needed.len() > 100, "{}", needed.len());
    let oldest = version(env!("CARGO_PKG_RUST_VERSION"));
    for package in needed.iter().map(|id| &packages[id]) {
        if let Some(needs) = package["rust_version"].as_str() {
            assert!(
                version(needs) <= oldest,
                "{} {} needs Rust {needs}",
                package["name"],
                package["version"]
            );
        }
    }
}
