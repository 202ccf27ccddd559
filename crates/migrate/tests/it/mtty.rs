//! Serial cards of both kinds: what moves to what.

use crate::common::options;
use limosa_client::{Device, DeviceExt};
use limosa_device::{Loopback, Machine, SimpleModel};
use limosa_migrate::{Destination, Ledger, MovedDevice, Outcome, Received, Source, move_local};
use limosa_models::uart::{Line, Mtty, Uart};
use limosa_protocol::State;

fn device(name: &str, model: impl SimpleModel) -> Loopback {
    Loopback::new(name, Machine::simple(model))
}

fn moved(from: &Loopback, to: &Loopback) -> (Outcome, Received) {
    let (options, ledger) = (options(), Ledger::new());
    let (from, to) = ([MovedDevice::new(from)], [MovedDevice::new(to)]);
    move_local(Source::new(&from, &options), Destination::new(&to, &ledger, &options))
}

#[test]
fn an_mtty_card_moves_with_the_bytes_in_its_fifos() {
    for ports in [1, 2] {
        let (from, to) = (device("from", Mtty::new(ports).unwrap()), device("to", Mtty::new(ports).unwrap()));
        let last = ports as u32 - 1;
        b"limosa".iter().for_each(|byte| from.region_write(last, 0, &[*byte]).unwrap());
        let (outcome, received) = moved(&from, &to);
        let (Outcome::Moved(report), Received::Runs(_)) = (&outcome, &received) else {
            panic!("{outcome:?} {received:?}")
        };
        assert_eq!(report.devices[0].precopy_bytes, 24, "the header, before it stopped");
        assert_eq!(report.bytes.device_bytes, 24 + 36 * ports as u64);
        assert_eq!((from.state().unwrap(), to.state().unwrap()), (State::Stop, State::Running));
        let mut text = [0; 6];
        text.iter_mut().for_each(|byte| to.region_read(last, 0, std::slice::from_mut(byte)).unwrap());
        assert_eq!(&text, b"limosa");
    }
}

#[test]
fn cards_of_different_kinds_are_refused_with_what_differs_and_the_source_runs_on() {
    let mtty = |ports| device("mtty", Mtty::new(ports).unwrap());
    let uart = || device("uart", Uart::new(vec![Line::Echo]).unwrap());
    let identity = "the source's PCI identification is 4348:3253 (4348:3253, class 070002)";
    for (from, to, reason) in [
        (mtty(1), uart(), identity),
        (uart(), mtty(1), "this one's is 4348:3253"),
        (mtty(1), mtty(2), "region sizes is [8, 0, 0, 0, 0, 0, 0, 255, 0], this one's is [8, 8,"),
    ] {
        from.region_write(0, 7, &[0x5a]).unwrap();
        let (outcome, _) = moved(&from, &to);
        let Outcome::Undone { why, .. } = outcome else { panic!("{outcome:?}") };
        assert!(why.to_string().contains(reason), "{why}");
        assert_eq!((from.state().unwrap(), to.state().unwrap()), (State::Running, State::Running));
        let mut scratch = [0];
        from.region_read(0, 7, &mut scratch).unwrap();
        assert_eq!(scratch, [0x5a]);
    }
}
