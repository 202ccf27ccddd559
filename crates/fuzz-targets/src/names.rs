//! Names of states and of migration flags, as users write them.
//!
//! Input: the text.

use limosa_protocol::{MigrationFlags, State};

/// See the module.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(state) = text.parse::<State>() {
        assert_eq!(state.to_string().parse(), Ok(state));
    }
    if let Ok(flags) = text.parse::<MigrationFlags>() {
        assert_eq!(flags.to_string().parse(), Ok(flags));
    }
}

/// See [`Target::seeds`](crate::Target::seeds).
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("state", b"pre-copy-p2p".to_vec()),
        ("flags", b"STOP_COPY+P2P+0x10".to_vec()),
        ("none", b"none".to_vec()),
    ]
}
