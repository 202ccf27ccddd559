//! The choices of a caller: [`Options`], and [`Convergence`] among them.

use std::num::NonZeroU32;
use std::time::Duration;

use limosa_stream::Compression;

/// Options of a move. The default suits a machine in one rack.
///
/// ```
/// use std::time::Duration;
/// use limosa_migrate::{Convergence, Options, WhenStalled};
///
/// let convergence = Convergence::default()
///     .with_downtime_goal(Duration::from_millis(50))
///     .with_when_stalled(WhenStalled::Abort);
/// let options = Options::default().with_convergence(convergence).with_silence_max(Duration::from_secs(10));
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Whether devices that have PRE_COPY use it. Some device servers cannot load the data that they gave in PRE_COPY.
    /// Without PRE_COPY they still move, with a longer stop.
    pub precopy: bool,
    /// The maximum number of links, 1 to [`LINKS_MAX`](limosa_stream::LINKS_MAX): the source opens at most this many, and
    /// the destination accepts at most this many. More than one needs a way to make further links: see
    /// [`Source::send_over`](crate::Source::send_over).
    pub links: NonZeroU32,
    /// Whether the source measures, while memory moves, how many links make the transfer faster, and uses only that many.
    /// Otherwise it uses all.
    pub links_measured: bool,
    /// How a source compresses memory and device data, on links and in snapshots. A payload that would not become shorter
    /// is sent as it is. A destination accepts either compression. Compression pays on links that are slower than a
    /// processor core compresses.
    pub compress: Option<Compression>,
    /// On the destination: how many bytes of device data may have arrived without being loaded, for all devices
    /// together. Each device gets an equal part, at least [`WINDOW_BYTES_MIN`](limosa_stream::WINDOW_BYTES_MIN) and at most
    /// 4 MiB. A small part costs speed if the latency to the source is high. If a device says that it gives more than its part in the
    /// stop, each part is as large as that and a quarter, up to 4 MiB and to its part of
    /// [`windows_bytes_max`](Self::windows_bytes_max): the devices' data is then sent without a wait.
    pub windows_bytes: u64,
    /// On the destination: the limit to which the windows of all devices together may grow. A device's window doubles,
    /// to at most 64 MiB, when the source finds it full and the device loads as fast as data arrives, because the
    /// product of bandwidth and latency then exceeds the window. Windows do not grow if this is at most
    /// [`windows_bytes`](Self::windows_bytes).
    pub windows_bytes_max: u64,
    /// The largest number of bytes of data that one device may send or load, pre-copy included. Without it, a device
    /// may send after the stop four times the largest size that it reported (MIG_DATA_SIZE, pre-copy info, or
    /// [`MovedDevice::stop_bytes`](crate::MovedDevice::stop_bytes)), and at least 1 GiB. Before the stop it may send
    /// [`Convergence::rounds_max`] times as much, and at least 2 GiB; with [`WhenStalled::KeepTrying`] there is no
    /// limit. The destination applies the limit after the stop to the sizes that the source reported. A device whose
    /// data exceeds its limit fails the move ([`Misbehaviour::Endless`](crate::Misbehaviour::Endless)).
    pub state_max: Option<u64>,
    /// When pre-copy stops.
    pub convergence: Convergence,
    /// Longest time without a byte from the other side, on each link. Each side sends a keep-alive four times a second,
    /// or as often within its own limit: a limit below a second has to be the same on both sides.
    pub silence_max: Duration,
    /// Longest time that the other side may take to answer the offer, or to handle data that was sent while the guest
    /// runs. Keep-alives do not renew it.
    pub load_max: Duration,
    /// On the destination: longest time for which the source may send nothing but keep-alives before everything has
    /// arrived. It does not count while a device is loading what the source has sent. After the stop the limit is
    /// [`standstill_max`](Self::standstill_max), if that is longer. A source sends nothing while it compares all of its
    /// memory with fingerprints ([`FingerprintLog`](crate::FingerprintLog)), so a large guest may need more.
    pub idle_max: Duration,
    /// On the destination: longest time from the offer until everything has arrived. Nothing renews it.
    pub move_max: Duration,
    /// Longest time that the destination holds for COMMIT, and that the source waits for RUNNING.
    pub commit_max: Duration,
    /// Longest time that the guest stands still: from the stop of its vCPUs until the destination has loaded
    /// everything. Nothing renews it. When it has passed, the move is undone and the guest runs on at the source. A
    /// move that is predicted to take longer does not stop the guest at all. For a snapshot, the time ends when
    /// everything is written.
    pub standstill_max: Duration,
    /// Whether peers that prove nothing are believed: those of the first versions, and records and notes of moves without a
    /// secret (`docs/stream.md: Proofs`). Without it a move with such a peer is refused before a device is touched.
    pub unauthenticated_peers: bool,
    /// Which links carry memory with checksums. A link goes without them only if both sides agree; device data and all
    /// other frames always have checksums.
    pub memory_checksums: MemoryChecksums,
}

/// Which links carry memory with checksums (`docs/stream.md: Unchecked payloads`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryChecksums {
    /// Links that are not authenticated ([`Link::is_authenticated`](crate::link::Link::is_authenticated)): TLS has its own
    /// checksums, with a key.
    #[default]
    UnlessAuthenticated,
    /// All links.
    Always,
    /// No link. Whatever the path to the peer damages, and its own checksums do not find, damages the guest's memory unseen.
    Never,
}

impl MemoryChecksums {
    /// Whether a link does without.
    pub(crate) fn are_waived(self, link: &dyn crate::link::Link) -> bool {
        match self {
            MemoryChecksums::UnlessAuthenticated => link.is_authenticated(),
            MemoryChecksums::Always => false,
            MemoryChecksums::Never => true,
        }
    }
}

impl Default for Options {
    fn default() -> Options {
        Options {
            precopy: true,
            links: NonZeroU32::MIN,
            links_measured: false,
            compress: None,
            windows_bytes: 32 << 20,
            windows_bytes_max: 256 << 20,
            state_max: None,
            convergence: Convergence::default(),
            silence_max: Duration::from_secs(30),
            load_max: Duration::from_secs(600),
            idle_max: Duration::from_secs(120),
            move_max: Duration::from_secs(86_400),
            commit_max: Duration::from_secs(30),
            standstill_max: Duration::from_secs(60),
            unauthenticated_peers: false,
            memory_checksums: MemoryChecksums::default(),
        }
    }
}

/// The costs of a move that a caller accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Convergence {
    /// How long the stop may take. Pre-copy goes on until the predicted downtime is no longer than this, and after that
    /// as long as it still gains much. It is a goal: [`Convergence::when_stalled`] says what happens when it cannot be
    /// met. With [`WhenStalled::Abort`] it is a limit on the prediction, at the decision to stop and once more when the
    /// last dirty pages are known.
    pub downtime_goal: Duration,
    /// After this many successive rounds of memory, or looks at a device, without gain, pre-copy has stalled.
    pub stalled_rounds_max: u32,
    /// The largest number of rounds of memory, and how many times over a device may send as much as it had at first.
    pub rounds_max: u32,
    /// What to do when pre-copy has stalled above the goal, and [`Vmm::throttle`](crate::Vmm::throttle) cannot help.
    pub when_stalled: WhenStalled,
    /// How long a device's initial bytes (`vfio.h: struct vfio_precopy_info`) hold the stop back. While any are
    /// left to be read at the source or to be loaded at the destination nothing stops; after this time they are taken
    /// for ordinary pre-copy data.
    pub initial_max: Duration,
}

/// What to do when the downtime goal cannot be met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenStalled {
    /// Keep trying, until the move is called off or the guest becomes quieter; also beyond the last round.
    KeepTrying,
    /// Stop all the same: the move succeeds, with a longer downtime.
    SwitchOver,
    /// Call the move off ([`Error::NotConverging`](crate::Error::NotConverging)).
    Abort,
}

impl Default for Convergence {
    fn default() -> Convergence {
        Convergence {
            downtime_goal: Duration::from_millis(300),
            stalled_rounds_max: 5,
            rounds_max: 100,
            when_stalled: WhenStalled::SwitchOver,
            initial_max: Duration::from_secs(30),
        }
    }
}

macro_rules! with {
    ($of:ty { $($with:ident: $field:ident: $type:ty,)* }) => {
        impl $of {
            $(
                #[doc = concat!("The same with another [`", stringify!($field), "`](Self::", stringify!($field), ").")]
                #[must_use]
                pub fn $with(self, $field: $type) -> Self {
                    Self { $field, ..self }
                }
            )*
        }
    };
}

with!(Options {
    with_precopy: precopy: bool,
    with_links: links: NonZeroU32,
    with_links_measured: links_measured: bool,
    with_compress: compress: Option<Compression>,
    with_windows_bytes: windows_bytes: u64,
    with_windows_bytes_max: windows_bytes_max: u64,
    with_state_max: state_max: Option<u64>,
    with_convergence: convergence: Convergence,
    with_silence_max: silence_max: Duration,
    with_load_max: load_max: Duration,
    with_idle_max: idle_max: Duration,
    with_move_max: move_max: Duration,
    with_commit_max: commit_max: Duration,
    with_standstill_max: standstill_max: Duration,
    with_unauthenticated_peers: unauthenticated_peers: bool,
    with_memory_checksums: memory_checksums: MemoryChecksums,
});

with!(Convergence {
    with_downtime_goal: downtime_goal: Duration,
    with_stalled_rounds_max: stalled_rounds_max: u32,
    with_rounds_max: rounds_max: u32,
    with_when_stalled: when_stalled: WhenStalled,
    with_initial_max: initial_max: Duration,
});
