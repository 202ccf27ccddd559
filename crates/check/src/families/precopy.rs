//! Pre-copy and its info (`vfio.h: VFIO_DEVICE_STATE_PRE_COPY`, `VFIO_MIG_GET_PRECOPY_INFO`,
//! `VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2`).

use limosa_client::{Chunk, DeviceExt};
use limosa_protocol::{Errno, State};

use super::session::{needs_of, stale};
use crate::check::{Check, Family, Needs, Verdict, ensure, fail, skip};
use crate::trial::{Trial, refused, refused_somehow};

/// Bytes that are read in pre-copy before a check continues.
const SOME: u64 = 1 << 20;

pub(super) fn checks() -> Vec<Check> {
    let check =
        |id: &'static str, needs: Needs, clauses: &[&'static str], body: fn(&mut Trial) -> Verdict| {
            Check::new(Family::Precopy, id, Needs::MIGRATION | Needs::PRE_COPY | needs, clauses, body)
        };
    let (none, info, v2) = (Needs::empty(), Needs::PRECOPY_INFO, Needs::PRECOPY_INFO_V2);
    let mut checks = vec![
        check("precopy.has-no-end", none, &["precopy.no-end"], |t| {
            let mut stream = t.session(State::PreCopy)?;
            let (_, ran_dry) = t.read_precopy(&mut stream, t.limits.sample_bytes_max)?;
            if !ran_dry {
                return skip("the device has new data as fast as it is read");
            }
            for _ in 0..5 {
                let again = stream.read(&mut [0; 16])?;
                ensure(again != Chunk::End, || "the data stream ended in PRE_COPY, expected ENOMSG".into())?;
            }
            t.is(State::PreCopy)
        }),
        check("precopy.has-no-end-in-p2p", Needs::P2P, &["precopy.no-end"], |t| {
            let mut stream = t.session(State::PreCopyP2p)?;
            t.read_precopy(&mut stream, SOME)?;
            t.is(State::PreCopyP2p)
        }),
        check("precopy.ends-in-stop-copy", none, &["stream.end", "stream.one-session"], |t| {
            let mut stream = t.session(State::PreCopy)?;
            t.read_precopy(&mut stream, t.limits.sample_bytes_max)?;
            t.go(State::StopCopy)?;
            t.read_to_end(&mut stream, 64 << 10)?;
            let again = stream.read(&mut [0; 16])?;
            ensure(again == Chunk::End, || format!("after the end a read brought {again:?}"))
        }),
        check("precopy.unread-comes-in-stop-copy", Needs::SAMPLE, &["precopy.then-stop"], |t| {
            let mut stream = t.session(State::PreCopy)?;
            t.go(State::StopCopy)?;
            let data = t.read_to_end(&mut stream, 64 << 10)?;
            t.go(State::Stop)?;
            t.load(&data, 64 << 10)?;
            t.go(State::Running).map(drop)
        })
        .destructive(),
        check("precopy.then-stop-copy-loads", Needs::SAMPLE, &["precopy.then-stop"], |t| {
            let mut stream = t.session(State::PreCopy)?;
            let (mut data, _) = t.read_precopy(&mut stream, t.limits.sample_bytes_max)?;
            t.go(State::StopCopy)?;
            data.extend(t.read_to_end(&mut stream, 64 << 10)?);
            t.go(State::Stop)?;
            t.load(&data, 64 << 10)?;
            t.go(State::Running).map(drop)
        })
        .destructive(),
        check("precopy.half-read-then-stop-copy-loads", Needs::SAMPLE, &["precopy.then-stop"], |t| {
            let mut stream = t.session(State::PreCopy)?;
            let mut data = Vec::new();
            let mut first = [0; 16];
            if let Chunk::Data(bytes) = stream.read(&mut first)? {
                data.extend_from_slice(&first[..bytes]);
            }
            t.go(State::StopCopy)?;
            data.extend(t.read_to_end(&mut stream, 64 << 10)?);
            t.go(State::Stop)?;
            t.load(&data, 64 << 10)?;
            t.go(State::Running).map(drop)
        })
        .destructive(),
        check("precopy.cancelled-unread", none, &["precopy.cancel"], |t| {
            drop(t.session(State::PreCopy)?);
            t.go(State::Running).map(drop)
        }),
        check("precopy.cancelled-half-read", none, &["precopy.cancel", "stream.unread"], |t| {
            let mut stream = t.session(State::PreCopy)?;
            stream.read(&mut [0; 16])?;
            t.go(State::Running)?;
            let mut stream = t.session(State::StopCopy)?;
            let data = t.read_to_end(&mut stream, 64 << 10)?;
            ensure(!data.is_empty(), || "after a cancelled pre-copy STOP_COPY gave no data".into())
        }),
        check("precopy.again", none, &["precopy.cancel", "stream.stale"], |t| {
            let mut old = t.session(State::PreCopy)?;
            t.go(State::Running)?;
            let mut new = t.session(State::PreCopy)?;
            stale(&mut old, "pre-copy began anew")?;
            t.go(State::StopCopy)?;
            let data = t.read_to_end(&mut new, 64 << 10)?;
            ensure(!data.is_empty(), || "the second pre-copy gave no data".into())
        }),
        check("precopy.info-initial-does-not-grow", info, &["info.initial"], |t| {
            let mut stream = t.session(State::PreCopy)?;
            let mut last = stream.precopy_info()?.initial_bytes;
            for _ in 0..64 {
                if !matches!(stream.read(&mut [0; 4096])?, Chunk::Data(_)) {
                    break;
                }
                let now = stream.precopy_info()?.initial_bytes;
                ensure(now <= last, || {
                    format!("initial_bytes grew from {last} to {now} without MIG_PRECOPY_INFOv2")
                })?;
                last = now;
            }
            Ok(())
        }),
        check("precopy.info-initial-is-read", info, &["info.initial"], |t| {
            let mut stream = t.session(State::PreCopy)?;
            let before = stream.precopy_info()?.initial_bytes;
            let (read, ran_dry) = t.read_precopy(&mut stream, t.limits.sample_bytes_max)?;
            let after = stream.precopy_info()?.initial_bytes;
            ensure(!ran_dry || after == 0, || {
                format!("nothing is left to read for now, and initial_bytes is {after}")
            })?;
            ensure(!ran_dry || read.len() as u64 >= before, || {
                format!("initial_bytes was {before}, and {} bytes came", read.len())
            })
        }),
        check("precopy.info-flags-are-zero", info, &["info.flags"], |t| {
            let mut stream = t.session(State::PreCopy)?;
            let flags = stream.precopy_info()?.flags;
            ensure(flags == 0, || format!("without MIG_PRECOPY_INFOv2 the flags are {flags:#x}, expected 0"))
        }),
        check("precopy.info-in-stop-copy", info, &["info.precopy-states"], |t| {
            let mut stream = t.session(State::PreCopy)?;
            t.go(State::StopCopy)?;
            refused(stream.precopy_info().map(drop), "pre-copy info in STOP_COPY", &[Errno::EINVAL])
        }),
        check("precopy.info-in-stop-copy-alone", info, &["info.precopy-states"], |t| {
            let mut stream = t.session(State::StopCopy)?;
            let answer = stream.precopy_info().map(drop);
            refused(answer, "pre-copy info of a session without pre-copy", &[Errno::EINVAL, Errno::ENOTTY])
        }),
        check("precopy.info-in-resuming", info, &["info.precopy-states"], |t| {
            let mut stream = t.session(State::Resuming)?;
            refused_somehow(stream.precopy_info().map(drop), "pre-copy info in RESUMING")
        }),
        check("precopy.info-of-a-stale-session", info, &["info.stale"], |t| {
            let mut stream = t.session(State::PreCopy)?;
            t.go(State::Running)?;
            refused(stream.precopy_info().map(drop), "pre-copy info after the session", &[Errno::ENODEV])
        }),
        check("precopy.info-keeps-the-data", info, &["stream.independent"], |t| {
            let mut stream = t.session(State::PreCopy)?;
            for _ in 0..10 {
                stream.precopy_info()?;
            }
            t.go(State::StopCopy)?;
            let data = t.read_to_end(&mut stream, 64 << 10)?;
            ensure(!data.is_empty(), || "after pre-copy info the session gave no data".into())
        }),
        check("precopy.v2-opts-in", v2, &["info.v2"], |t| match t.device()?.precopy_info_v2()? {
            true => Ok(()),
            false => fail("the probe of MIG_PRECOPY_INFOv2 succeeds, and SET is refused"),
        }),
        check("precopy.v2-info", v2 | info, &["info.v2", "info.precopy-states"], |t| {
            t.device()?.precopy_info_v2()?;
            let mut stream = t.session(State::PreCopy)?;
            let first = stream.precopy_info()?;
            let (_, ran_dry) = t.read_precopy(&mut stream, t.limits.sample_bytes_max)?;
            let last = stream.precopy_info()?;
            ensure(!ran_dry || last.reinit() || last.initial_bytes <= first.initial_bytes, || {
                format!(
                    "initial_bytes went from {} to {} without REINIT",
                    first.initial_bytes, last.initial_bytes
                )
            })
        }),
    ];
    for state in [State::PreCopy, State::PreCopyP2p] {
        let id = format!("precopy.info-in-{}", state.name().to_lowercase());
        let needs = needs_of(state) | info;
        checks.push(Check::new(Family::Precopy, id, needs, &["info.precopy-states"], move |t| {
            let mut stream = t.session(state)?;
            stream.precopy_info().map(drop).map_err(Into::into)
        }));
    }
    checks
}
