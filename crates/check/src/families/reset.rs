//! Resets from every state and in mid-session (`vfio.h: VFIO_DEVICE_RESET`).

use limosa_client::Device;
use limosa_protocol::State;

use super::session::{needs_of, stale};
use crate::check::{Check, Family, Needs, Verdict, ensure};
use crate::trial::Trial;

pub(super) fn checks() -> Vec<Check> {
    let needs = Needs::MIGRATION | Needs::RESET;
    let check = |id: &'static str, needs, clauses: &[&'static str], body: fn(&mut Trial) -> Verdict| {
        Check::new(Family::Reset, id, needs, clauses, body).destructive()
    };
    let mut checks = vec![
        check("reset.again-and-again", needs, &["reset.running", "fsm.initial"], |t| {
            (0..5).try_for_each(|_| t.reset())
        }),
        check("reset.then-save", needs, &["reset.usable"], |t| {
            t.session(State::StopCopy)?;
            t.reset()?;
            t.go(State::Stop)?;
            let data = t.save()?;
            ensure(!data.is_empty(), || "after a reset STOP_COPY gave no data".into())
        }),
        check("reset.then-load", needs | Needs::SAMPLE, &["reset.usable"], |t| {
            let sample = t.sample()?;
            t.reset()?;
            t.load(&sample, 64 << 10)?;
            t.go(State::Running).map(drop)
        }),
        check("reset.with-a-half-read-session", needs, &["reset.session", "reset.running"], |t| {
            let mut stream = t.session(State::StopCopy)?;
            stream.read(&mut [0; 16])?;
            t.reset()?;
            stale(&mut stream, "a reset")
        }),
        check("reset.with-logging-on", needs | Needs::LOGGING, &["reset.running"], |t| {
            super::logging::start(t)?;
            t.reset()
        }),
        check("reset.without-migration", Needs::RESET | Needs::NO_MIGRATION, &["reset.running"], |t| {
            t.device()?.reset()?;
            t.device()?.info().map(drop).map_err(Into::into)
        }),
    ];
    for state in State::ALL.into_iter().filter(|state| *state != State::Error) {
        let name = state.name().to_lowercase();
        let id = format!("reset.from-{name}");
        let body = move |t: &mut Trial| {
            let _stream = t.go(state)?;
            t.reset()
        };
        let from =
            Check::new(Family::Reset, id, needs_of(state) | needs, &["reset.running", "fsm.initial"], body);
        checks.push(from.destructive());
        if state.is_saving() {
            let id = format!("reset.ends-the-session-of-{name}");
            let body = move |t: &mut Trial| {
                let mut stream = t.session(state)?;
                t.reset()?;
                stale(&mut stream, "a reset")
            };
            checks.push(
                Check::new(Family::Reset, id, needs_of(state) | needs, &["reset.session"], body)
                    .destructive(),
            );
        }
    }
    checks.push(check("reset.ends-the-session-of-resuming", needs, &["reset.session"], |t| {
        let mut stream = t.session(State::Resuming)?;
        t.reset()?;
        crate::trial::refused(
            stream.write(&[0; 16]),
            "a write to the old data stream after a reset",
            &[limosa_protocol::Errno::ENODEV],
        )
    }));
    checks
}
