//! Options for the link between two hosts.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use limosa_migrate::Options;

use super::resolving::Moves;
use super::values::seconds;

#[derive(Debug, Args)]
#[command(next_help_heading = "Link")]
pub struct Link {
    /// Seconds of silence after which the link counts as lost. A source in doubt keeps asking for the same time,
    /// and a destination stays available for questions for twice that time.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub silence: Duration,

    #[command(flatten)]
    pub checksums: Checksums,

    #[command(flatten)]
    pub moves: Moves,

    #[command(flatten)]
    pub tls: Tls,
}

/// Whether links carry memory with checksums.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Link")]
pub struct Checksums {
    /// Whether guest memory is sent with checksums. `auto`: except under TLS, which has its own. `never` is faster, but
    /// damage on the path is not detected: only for a path that alters nothing, such as a UNIX socket. It has to be given
    /// on both sides.
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub memory_checksums: MemoryChecksums,
}

/// When memory is sent with checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MemoryChecksums {
    Auto,
    Always,
    Never,
}

impl Checksums {
    /// The options of a move with them.
    pub fn of(self, options: Options) -> Options {
        use limosa_migrate::MemoryChecksums as Engine;
        options.with_memory_checksums(match self.memory_checksums {
            MemoryChecksums::Auto => Engine::UnlessAuthenticated,
            MemoryChecksums::Always => Engine::Always,
            MemoryChecksums::Never => Engine::Never,
        })
    }
}

/// TLS 1.3 with both sides authenticated: all three files, on both sides.
#[derive(Debug, Args)]
#[command(next_help_heading = "TLS")]
pub struct Tls {
    /// The authorities that may have issued the other side's certificate, PEM.
    #[arg(long, value_name = "FILE", requires_all = ["tls_cert", "tls_key"])]
    pub tls_ca: Option<PathBuf>,

    /// This side's certificate, followed by intermediate certificates, PEM.
    #[arg(long, value_name = "FILE", requires_all = ["tls_ca", "tls_key"])]
    pub tls_cert: Option<PathBuf>,

    /// The key of this side's certificate, PEM.
    #[arg(long, value_name = "FILE", requires_all = ["tls_ca", "tls_cert"])]
    pub tls_key: Option<PathBuf>,

    /// The name that the other side's certificate must have. Without it, send and resolve expect the host that they
    /// connect to; receive and answer need it, or --tls-any-name.
    #[arg(long, value_name = "NAME", requires_all = ["tls_ca", "tls_cert", "tls_key"])]
    pub tls_name: Option<String>,

    /// Accept unauthenticated peers: allows TCP to another host without TLS, where anyone on the path can read and
    /// alter guest memory and device state, and take over the devices; and peers without proofs: those of older
    /// versions, and the other end of a move without a recorded secret.
    #[arg(long)]
    pub insecure: bool,
}

/// The certificates that a listening side accepts.
#[derive(Debug, Args)]
#[command(next_help_heading = "TLS")]
pub struct Names {
    /// Accept every certificate of the authorities, whatever its name. Any holder of such a certificate can send,
    /// or ask.
    #[arg(long, requires_all = ["tls_ca", "tls_cert", "tls_key"], conflicts_with = "tls_name")]
    pub tls_any_name: bool,
}
