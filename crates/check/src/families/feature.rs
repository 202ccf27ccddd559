//! The FEATURE multiplexer (`vfio.h: VFIO_DEVICE_FEATURE`): what it answers to each misuse.

use limosa_client::{Device, DeviceExt, FeatureReply, FeatureRequest, Refers, Result};
use limosa_protocol::feature::{FeatureMigState, FeatureMigration};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, MigrationFlags, State};
use zerocopy::IntoBytes;

use crate::check::{Check, Family, Needs, Verdict, ensure, fail};
use crate::trial::{Trial, refused};

const GET: FeatureOp = FeatureOp::GET;
const SET: FeatureOp = FeatureOp::SET;
const PROBE: FeatureOp = FeatureOp::PROBE;

/// An index that no document assigns.
const UNKNOWN: FeatureIndex = FeatureIndex(0x7ff3);

/// The kernel's answer to a missing feature: EINVAL where the driver has no features at all.
const NOT_THERE: [Errno; 2] = [Errno::ENOTTY, Errno::EINVAL];

fn ask(t: &Trial, index: FeatureIndex, op: FeatureOp, payload: &mut [u8]) -> Result<FeatureReply> {
    let device = t.device.as_deref().ok_or_else(|| limosa_client::Error::Usage {
        device: t.target.name.clone(),
        what: "the device is not open".into(),
    })?;
    device.feature(&mut FeatureRequest { index, op, payload, refers: Refers::Nothing })
}

pub(super) fn checks() -> Vec<Check> {
    let check = |id: &'static str, needs, clauses: &[&'static str], body: fn(&mut Trial) -> Verdict| {
        Check::new(Family::Feature, id, needs, clauses, body)
    };
    let migration = Needs::MIGRATION;
    let mut checks = vec![
        check("feature.migration-has-stop-copy", migration, &["mig.mandatory"], |t| {
            let flags = t.device()?.migration_flags()?;
            ensure(flags.contains(MigrationFlags::STOP_COPY), || {
                format!("the flags are {flags}, without STOP_COPY")
            })
        }),
        check("feature.migration-flags-are-known", migration, &["mig.flags"], |t| {
            let flags = t.device()?.migration_flags()?;
            let unknown = flags.difference(MigrationFlags::SETS[3]);
            ensure(unknown.is_empty(), || format!("the flags are {flags}: {unknown} is not assigned"))
        }),
        check("feature.migration-answers-all", migration, &["feature.argsz"], |t| {
            let mut payload = FeatureMigration::default();
            let bytes = ask(t, FeatureIndex::MIGRATION, GET, payload.as_mut_bytes())?.payload_bytes;
            ensure(bytes == 8, || format!("GET MIGRATION filled in {bytes} bytes, expected 8"))
        }),
        check("feature.long-payload", migration, &["feature.argsz"], |t| {
            let mut payload = [0; 64];
            ask(t, FeatureIndex::MIGRATION, GET, &mut payload)?;
            let flags = u64::from_ne_bytes(std::array::from_fn(|at| payload[at]));
            ensure(flags == t.flags().bits(), || {
                format!("with room for 64 bytes GET MIGRATION answers {flags:#x}, expected {}", t.flags())
            })
        }),
        check("feature.get-and-set", migration, &["feature.one-op"], |t| {
            let mut payload = FeatureMigState::new(State::Running);
            let answer = ask(t, FeatureIndex::MIG_DEVICE_STATE, GET | SET, payload.as_mut_bytes());
            refused(answer, "GET with SET", &[Errno::EINVAL])
        }),
        check("feature.no-operation", migration, &["feature.one-op"], |t| {
            let answer = ask(t, FeatureIndex::MIGRATION, FeatureOp::empty(), &mut [0; 8]);
            refused(answer, "a request without GET, SET and PROBE", &[Errno::EINVAL])
        }),
        check("feature.unknown-flag", migration, &["feature.flags"], |t| {
            let answer =
                ask(t, FeatureIndex::MIGRATION, GET | FeatureOp::from_bits_retain(1 << 19), &mut [0; 8]);
            refused(answer, "GET MIGRATION with flag 1 << 19", &[Errno::EINVAL])
        }),
        check("feature.highest-flag", migration, &["feature.flags"], |t| {
            let answer =
                ask(t, FeatureIndex::MIGRATION, GET | FeatureOp::from_bits_retain(1 << 31), &mut [0; 8]);
            refused(answer, "GET MIGRATION with flag 1 << 31", &[Errno::EINVAL])
        }),
        check("feature.unknown-flag-probe", migration, &["feature.flags"], |t| {
            let answer =
                ask(t, FeatureIndex::MIGRATION, PROBE | FeatureOp::from_bits_retain(1 << 20), &mut []);
            refused(answer, "PROBE MIGRATION with flag 1 << 20", &[Errno::EINVAL])
        }),
        check("feature.unknown-index-get", Needs::empty(), &["feature.unknown"], |t| {
            refused(ask(t, UNKNOWN, GET, &mut [0; 64]), "GET of an unknown feature", &NOT_THERE)
        }),
        check("feature.unknown-index-set", Needs::empty(), &["feature.unknown"], |t| {
            refused(ask(t, UNKNOWN, SET, &mut [0; 64]), "SET of an unknown feature", &NOT_THERE)
        }),
        check("feature.unknown-index-probe", Needs::empty(), &["feature.unknown"], |t| {
            refused(ask(t, UNKNOWN, PROBE | GET, &mut []), "PROBE of an unknown feature", &NOT_THERE)
        }),
        check("feature.probe-alone", migration, &["feature.probe"], |t| {
            ask(t, FeatureIndex::MIG_DEVICE_STATE, PROBE, &mut [])?;
            Ok(())
        }),
        check("feature.probe-get-and-set", migration, &["feature.probe"], |t| {
            ask(t, FeatureIndex::MIG_DEVICE_STATE, PROBE | GET | SET, &mut [])?;
            Ok(())
        }),
        check("feature.probe-has-no-effect", migration, &["feature.probe"], |t| {
            let mut payload = FeatureMigState::new(State::Stop);
            let reply = ask(t, FeatureIndex::MIG_DEVICE_STATE, PROBE | SET, payload.as_mut_bytes())?;
            ensure(reply.stream.is_none(), || "PROBE of a SET handed out a data stream".into())?;
            t.is(State::Running)
        }),
        check("feature.state-answers-all", migration, &["feature.argsz"], |t| {
            let mut payload = FeatureMigState::default();
            let bytes = ask(t, FeatureIndex::MIG_DEVICE_STATE, GET, payload.as_mut_bytes())?.payload_bytes;
            ensure(bytes == 8, || format!("GET MIG_DEVICE_STATE filled in {bytes} bytes, expected 8"))
        }),
        check("feature.absent-migration", Needs::NO_MIGRATION, &["mig.absent"], |t| {
            refused(ask(t, FeatureIndex::MIGRATION, GET, &mut [0; 8]), "GET MIGRATION", &NOT_THERE)
        }),
        check("feature.absent-state", Needs::NO_MIGRATION, &["mig.absent"], |t| {
            refused(
                ask(t, FeatureIndex::MIG_DEVICE_STATE, GET, &mut [0; 8]),
                "GET MIG_DEVICE_STATE",
                &NOT_THERE,
            )?;
            let mut stop = FeatureMigState::new(State::Stop);
            let set = ask(t, FeatureIndex::MIG_DEVICE_STATE, SET, stop.as_mut_bytes());
            refused(set, "SET MIG_DEVICE_STATE STOP", &NOT_THERE)
        }),
        check("feature.absent-data-size", Needs::NO_MIGRATION, &["mig.absent"], |t| {
            refused(ask(t, FeatureIndex::MIG_DATA_SIZE, GET, &mut [0; 8]), "GET MIG_DATA_SIZE", &NOT_THERE)
        }),
    ];
    checks.extend(numbers());
    checks.extend(short_payloads());
    checks.extend(operations());
    checks
}

/// SET of numbers that are not states.
fn numbers() -> impl Iterator<Item = Check> {
    [8u32, 9, 255, 256, 1 << 16, 1 << 31, u32::MAX].into_iter().map(|number| {
        let clauses = &["state.unknown"];
        Check::new(Family::Feature, format!("feature.state-{number}"), Needs::MIGRATION, clauses, move |t| {
            let mut payload = FeatureMigState { device_state: number, data_fd: -1 };
            let answer = ask(t, FeatureIndex::MIG_DEVICE_STATE, SET, payload.as_mut_bytes());
            refused(answer, &format!("SET of state {number}"), &[Errno::EINVAL])?;
            t.is(State::Running)
        })
    })
}

/// A name in the form of ids.
fn id_of(index: FeatureIndex) -> String {
    index.to_string().to_lowercase().replace('_', "-")
}

/// Payloads that lack their last byte, or all bytes.
fn short_payloads() -> Vec<Check> {
    let state = FeatureMigState::new(State::Stop);
    let whole = [
        (FeatureIndex::MIGRATION, GET, Needs::MIGRATION, vec![0; 8]),
        (FeatureIndex::MIG_DEVICE_STATE, GET, Needs::MIGRATION, vec![0; 8]),
        (FeatureIndex::MIG_DEVICE_STATE, SET, Needs::MIGRATION, state.as_bytes().to_vec()),
        (FeatureIndex::MIG_DATA_SIZE, GET, Needs::DATA_SIZE, vec![0; 8]),
        (FeatureIndex::DMA_LOGGING_START, SET, Needs::LOGGING, vec![0; 16]),
        (FeatureIndex::DMA_LOGGING_REPORT, GET, Needs::LOGGING, vec![0; 24]),
    ];
    let mut checks = Vec::new();
    for (index, op, needs, payload) in whole {
        let word = if op == GET { "get" } else { "set" };
        for (what, bytes) in [("short", payload.len() - 1), ("empty", 0)] {
            let id = format!("feature.{what}-{word}-{}", id_of(index));
            let payload = payload[..bytes].to_vec();
            checks.push(Check::new(Family::Feature, id, needs, &["feature.argsz"], move |t| {
                let answer = ask(t, index, op, &mut payload.clone());
                refused(answer, &format!("{index} with a payload of {bytes} bytes"), &[Errno::EINVAL])?;
                if t.facts.flags.is_empty() { Ok(()) } else { t.is(State::Running) }
            }));
        }
    }
    checks
}

/// Operations that a feature does not have, requested and probed.
fn operations() -> Vec<Check> {
    let wrong = [
        (FeatureIndex::MIGRATION, SET, Needs::MIGRATION),
        (FeatureIndex::MIG_DATA_SIZE, SET, Needs::DATA_SIZE),
        (FeatureIndex::DMA_LOGGING_START, GET, Needs::LOGGING),
        (FeatureIndex::DMA_LOGGING_STOP, GET, Needs::LOGGING),
        (FeatureIndex::DMA_LOGGING_REPORT, SET, Needs::LOGGING),
        (FeatureIndex::MIG_PRECOPY_INFO_V2, GET, Needs::PRECOPY_INFO_V2),
    ];
    let mut checks = Vec::new();
    for (index, op, needs) in wrong {
        let word = if op == GET { "get" } else { "set" };
        let clauses: &[&'static str] = match index {
            FeatureIndex::MIG_PRECOPY_INFO_V2 => &["feature.operation", "info.v2"],
            _ => &["feature.operation"],
        };
        let id = format!("feature.no-{word}-{}", id_of(index));
        checks.push(Check::new(Family::Feature, id, needs, clauses, move |t| {
            refused(ask(t, index, op, &mut [0; 64]), &format!("{word} of {index}"), &[Errno::EINVAL])
        }));
        let id = format!("feature.probe-no-{word}-{}", id_of(index));
        checks.push(Check::new(Family::Feature, id, needs, clauses, move |t| {
            refused(
                ask(t, index, op | PROBE, &mut []),
                &format!("PROBE of {word} of {index}"),
                &[Errno::EINVAL],
            )
        }));
        let (right, right_word) = if op == GET { (SET, "set") } else { (GET, "get") };
        let id = format!("feature.probe-{right_word}-{}", id_of(index));
        checks.push(Check::new(Family::Feature, id, needs, &["feature.probe"], move |t| {
            match ask(t, index, right | PROBE, &mut []) {
                Ok(_) => Ok(()),
                Err(error) => {
                    fail(format!("the device has {index}, and refuses the probe of {right_word}: {error}"))
                }
            }
        }));
    }
    checks
}
