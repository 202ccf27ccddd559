//! `fuzz`: devices of this project have no difference; a device with a fault has, and it is shrunk to a handful of lines,
//! which show it again.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use limosa_check::{FuzzOptions, FuzzReport, Script, Target, Transport, fuzz, replay};
use limosa_device::{Loopback, Machine, SimpleModel};
use limosa_models::synthetic::{Synthetic, SyntheticConfig};
use limosa_models::uart::{Line, Mtty, Uart};
use limosa_protocol::State;

use crate::mutations::faults::Fault;
use crate::mutations::faulty::{Faulty, FaultyDevice};

fn synthetic() -> Box<dyn SimpleModel> {
    let config = SyntheticConfig { state_bytes: 64 << 10, block_bytes: 4096, ..SyntheticConfig::default() };
    Box::new(Synthetic::new(config).unwrap())
}

fn target(model: Box<dyn SimpleModel>, fault: Fault) -> Target {
    let shared = Arc::new(Faulty {
        inner: Loopback::new("loopback", Machine::simple(model)),
        fault,
        count: AtomicU64::new(0),
        memory: AtomicU64::new(0),
        broken: AtomicBool::new(false),
    });
    Target::new("loopback", Transport::VfioUser, move || Ok(Box::new(FaultyDevice(Arc::clone(&shared)))))
}

fn options(sequences: u64, threads: usize) -> FuzzOptions {
    FuzzOptions { sequences, seed: 7, threads, ..FuzzOptions::default() }
}

#[track_caller]
fn agrees(report: &FuzzReport, sequences: u64) {
    assert!(report.differences.is_empty(), "{:#?}", report.differences);
    assert_eq!((report.sequences, report.known, &report.ended_early), (sequences, 0, &None));
    assert!(report.requests > sequences, "{}", report.requests);
}

#[test]
fn the_devices_of_this_project_agree_with_the_model() {
    for threads in [1, 3] {
        agrees(&fuzz(&target(synthetic(), Fault::Nothing), &options(150, threads)).unwrap(), 150);
        let uart = Box::new(Uart::new(vec![Line::Echo]).unwrap());
        agrees(&fuzz(&target(uart, Fault::Nothing), &options(150, threads)).unwrap(), 150);
        agrees(
            &fuzz(&target(Box::new(Mtty::new(2).unwrap()), Fault::Nothing), &options(150, threads)).unwrap(),
            150,
        );
    }
}

#[test]
fn a_fault_is_found_and_shrunk_to_a_handful_of_lines() {
    let cases: [(Fault, &str, usize); 9] = [
        (Fault::TakesNumbers, "set-state ", 2),
        (Fault::Pair(State::Stop, State::StopCopy), "set-state STOP_COPY in STOP: EIO, expected success", 2),
        (Fault::Pair(State::StopCopy, State::PreCopy), "set-state PRE_COPY in STOP_COPY: success", 2),
        (Fault::NoStream, "no data stream, expected a data stream", 1),
        (Fault::EndsInPrecopy, "read in PRE_COPY: the end", 2),
        (Fault::StaleReads, "a read from a session that has ended: success", 4),
        (Fault::WritesWhileSaving, "expected EBADF", 2),
        (Fault::NoProbe, "feature in ", 2),
        (Fault::RefusesItsOwn, "in RESUMING", 3),
    ];
    for (fault, part, lines_max) in cases {
        let target = target(synthetic(), fault);
        let report = fuzz(&target, &options(200, 1)).unwrap();
        let found = report.differences.iter().find(|difference| difference.signature.contains(part));
        let found = found.unwrap_or_else(|| panic!("{fault:?}: {:#?}", report.differences));
        assert!(found.script.len() <= lines_max, "{fault:?}: {found:#?}");
        assert!(report.known > 0, "{fault:?} is met again and again, and told once");

        let script: Script = found.script.join("\n").parse().unwrap();
        let again = replay(&target, &script, &FuzzOptions::default().limits).unwrap();
        assert_eq!(again.map(|again| again.signature).as_ref(), Some(&found.signature), "{fault:?}");

        let known: BTreeSet<_> = report.differences.iter().map(|told| told.signature.clone()).collect();
        let report = fuzz(&target, &FuzzOptions { known, ..options(200, 1) }).unwrap();
        assert!(report.differences.is_empty() && report.known > 0, "{fault:?}: {:#?}", report.differences);
    }
}

#[test]
fn a_script_is_read_as_it_is_written() {
    let text = "set-state STOP\nset-state 9\n1: get-state\nread 64\nfeature 0x2 513 8\nlog-start 4096 0x1000 0x1000\n";
    let script: Script = text.parse().unwrap();
    assert_eq!((script.len(), script.to_string()), (6, text.to_owned()));
    let answered: Script = "# a comment\n\nset-state STOP = ok\n".parse().unwrap();
    assert_eq!(answered.to_string(), "set-state STOP\n");
    for (wrong, why) in [
        ("halt", "line 1: `halt` is no request"),
        ("\nread", "line 2: `read`: a number is missing"),
        ("read 99999999999", "expected at most 1048576 bytes"),
        ("read 1 2", "`2` is too much"),
        ("99: reset", "names no thread"),
        ("set-state NOWHERE", "`NOWHERE` is no state and no number"),
        ("log-report 1 0 0xffffffffffffffff", "pages"),
    ] {
        let error = wrong.parse::<Script>().unwrap_err();
        assert!(error.contains(why), "{wrong}: {error}");
    }
}
