//! [`Facts`]: facts about a device, collected before the checks and without judging them.

use std::sync::Arc;
use std::time::Instant;

use limosa_client::{Device, DeviceExt, FeatureRequest, Refers, Result};
use limosa_protocol::feature::{DmaLoggingRange, FeatureMigration};
use limosa_protocol::info::DeviceFlags;
use limosa_protocol::{FeatureIndex, FeatureOp, MigrationFlags, State};
use serde::Serialize;
use zerocopy::IntoBytes;

use crate::check::Needs;
use crate::run::Limits;
use crate::target::{Target, Transport};
use crate::trial::{Stream, read_to_end};

/// Facts about a device.
#[derive(Clone, Debug, Serialize)]
pub struct Facts {
    /// How the device is reached.
    pub transport: Transport,
    /// The migration flags; empty for a device without migration.
    #[serde(serialize_with = "as_list")]
    pub flags: MigrationFlags,
    /// The features that the device says it has.
    pub features: Vec<String>,
    /// Bytes of its state when the suite began.
    pub state_bytes: Option<u64>,
    /// Whether two saves of the stopped device gave the same bytes, so that states can be compared.
    pub comparable: bool,
    #[serde(skip)]
    pub(crate) sample: Option<Arc<Vec<u8>>>,
    #[serde(skip)]
    pub(crate) has: Needs,
}

fn as_list<S: serde::Serializer>(flags: &MigrationFlags, to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(flags.iter_names().map(|(name, _)| name))
}

impl Facts {
    /// Why a check with these needs does not apply, if it does not.
    pub(crate) fn lacks(&self, needs: Needs) -> Option<&'static str> {
        let missing = needs - self.has;
        let (first, _) = missing.iter_names().next()?;
        Some(match first {
            "MIGRATION" => "the device has no migration",
            "P2P" => "the device lacks the flag P2P",
            "PRE_COPY" => "the device lacks the flag PRE_COPY",
            "LOGGING" => "the device has no DMA logging",
            "DATA_SIZE" => "the device lacks MIG_DATA_SIZE",
            "PRECOPY_INFO" => "the device or its transport has no pre-copy info",
            "PRECOPY_INFO_V2" => "the device lacks MIG_PRECOPY_INFOv2",
            "RESET" => "the device has no reset",
            "SAMPLE" => "there is no state of its own to load: it could not be saved, or is too large",
            "PEER" => "no second device was named",
            "BREAK" => "no way to bring the device into ERROR was named",
            "VIEW" => "the kernel shows no view of its state",
            "NO_MIGRATION" => "the device has migration",
            "NO_LOGGING" => "the device has DMA logging",
            "WIRE" => "the device is not behind a socket",
            _ => "vfio-user gives ranges another meaning",
        })
    }
}

/// Examines a device in RUNNING, and returns it to RUNNING if it performs the arcs.
pub(crate) fn survey(device: &dyn Device, target: &Target, limits: &Limits, until: Instant) -> Result<Facts> {
    let mut flags = FeatureMigration::default();
    let got = device.feature(&mut FeatureRequest {
        index: FeatureIndex::MIGRATION,
        op: FeatureOp::GET,
        payload: flags.as_mut_bytes(),
        refers: Refers::Nothing,
    });
    let flags = match got {
        Ok(_) => MigrationFlags::from_bits_retain(flags.flags),
        Err(limosa_client::Error::Refused { .. }) => MigrationFlags::empty(),
        Err(error) => return Err(error),
    };
    let mut has = Needs::empty();
    has.set(Needs::MIGRATION, !flags.is_empty());
    has.set(Needs::NO_MIGRATION, flags.is_empty());
    has.set(Needs::P2P, flags.contains(MigrationFlags::P2P));
    has.set(Needs::PRE_COPY, flags.contains(MigrationFlags::PRE_COPY));
    let mut features = Vec::new();
    for index in (0..).map(FeatureIndex) {
        let Some(rules) = index.rules() else { break };
        let op = if rules.get { FeatureOp::GET } else { FeatureOp::SET };
        if device.probe(index, op)? {
            features.push(index.to_string());
            has.set(Needs::LOGGING, has.contains(Needs::LOGGING) || index == FeatureIndex::DMA_LOGGING_START);
            has.set(Needs::DATA_SIZE, has.contains(Needs::DATA_SIZE) || index == FeatureIndex::MIG_DATA_SIZE);
            let v2 = has.contains(Needs::PRECOPY_INFO_V2) || index == FeatureIndex::MIG_PRECOPY_INFO_V2;
            has.set(Needs::PRECOPY_INFO_V2, v2);
        }
    }
    has.set(Needs::NO_LOGGING, !has.contains(Needs::LOGGING));
    has.set(Needs::KERNEL_RANGES, target.transport == Transport::Kernel);
    has.set(Needs::PEER, target.peer.is_some());
    has.set(Needs::BREAK, target.breaks.is_some());
    has.set(Needs::VIEW, target.view.is_some());
    has.set(Needs::WIRE, target.dial.is_some());
    let info = device.info()?;
    has.set(Needs::RESET, DeviceFlags::from_bits_retain(info.flags).contains(DeviceFlags::RESET));

    let mut facts = Facts {
        transport: target.transport,
        flags,
        features,
        state_bytes: None,
        comparable: false,
        sample: None,
        has,
    };
    if facts.has.contains(Needs::MIGRATION) {
        sample(device, &mut facts, limits, until);
        if facts.has.contains(Needs::PRE_COPY)
            && let Ok(Some(mut stream)) = device.set_state(State::PreCopy)
        {
            let answer = stream.precopy_info();
            facts.has.set(
                Needs::PRECOPY_INFO,
                !answer.is_err_and(|error| error.is_refused(limosa_protocol::Errno::ENOTTY)),
            );
        }
        let _ = device.set_state(State::Running);
    }
    Ok(facts)
}

/// Saves the device's state twice while it is stopped, if that is possible.
fn sample(device: &dyn Device, facts: &mut Facts, limits: &Limits, until: Instant) {
    let _ = device.set_state(State::Stop);
    let one = || -> Option<Vec<u8>> {
        let mut stream: Stream = device.set_state(State::StopCopy).ok()??;
        let saved = read_to_end(&mut stream, 1 << 20, limits.sample_bytes_max, until).ok();
        let _ = device.set_state(State::Stop);
        saved
    };
    let (first, second) = (one(), one());
    facts.comparable = first.is_some() && first == second;
    if let Some(saved) = first.filter(|saved| !saved.is_empty()) {
        facts.state_bytes = Some(saved.len() as u64);
        facts.sample = Some(Arc::new(saved));
        facts.has.insert(Needs::SAMPLE);
    }
}

/// The range that checks of DMA logging log: 16 MiB at 256 MiB.
pub(crate) const LOGGED: DmaLoggingRange = DmaLoggingRange { iova: 0x1000_0000, length: 0x100_0000 };
