//! Every decoder of what a peer sends, as a function of bytes that must not panic, hang or break
//! what it promises.
//!
//! The fuzzer runs them (`cargo +nightly fuzz run NAME`, see `fuzz/`), and `cargo test` replays
//! `fuzz/corpus/NAME/` through the same functions. A new decoder gets:
//!
//! 1. a module here with `run`, which takes any bytes, and `seeds`, a few inputs that mean
//!    something, and a line in [`TARGETS`];
//! 2. `fuzz/fuzz_targets/NAME.rs` and its `[[bin]]` in `fuzz/Cargo.toml`;
//! 3. its seeds in the corpus: `cargo test -p limosa-fuzz-targets -- --ignored`.
//!
//! A test tells when one of the three is missing. An input that the fuzzer found goes into the
//! corpus under the name of what went wrong.
#![forbid(unsafe_code)]

pub mod bitmap;
pub mod capability;
mod cell;
pub mod feature;
pub mod input;
pub mod inspect;
pub mod logging;
pub mod mtty;
pub mod names;
pub mod packed;
pub mod saved_state;
pub mod stream;
pub mod switch_over;
pub mod trace;
pub mod vfio_user_client;
pub mod vfio_user_request;
pub mod vfio_user_server;
pub mod vfio_user_version;

/// A decoder under test.
#[derive(Clone, Copy)]
pub struct Target {
    /// As in `fuzz/fuzz_targets/` and `fuzz/corpus/`.
    pub name: &'static str,
    /// Takes any bytes; panics when something is wrong.
    pub run: fn(&[u8]),
    /// Inputs to start from, by file name.
    pub seeds: fn() -> Vec<(&'static str, Vec<u8>)>,
}

macro_rules! targets {
    ($($module:ident),* $(,)?) => {
        [$(Target { name: stringify!($module), run: $module::run, seeds: $module::seeds },)*]
    };
}

/// Every target, by name.
pub const TARGETS: &[Target] = &targets![
    bitmap,
    capability,
    feature,
    inspect,
    logging,
    mtty,
    names,
    packed,
    saved_state,
    stream,
    switch_over,
    trace,
    vfio_user_client,
    vfio_user_request,
    vfio_user_server,
    vfio_user_version
];
