use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn wanted() -> Convergence {
    Convergence {
        downtime_goal: Duration::from_millis(100),
        stalled_rounds_max: 3,
        rounds_max: 50,
        when_stalled: WhenStalled::Abort,
        initial_max: Duration::from_secs(30),
    }
}

/// A GiB in a second, and nothing else takes time.
fn pace() -> Pace {
    Pace::new(Duration::ZERO, Duration::ZERO, Duration::ZERO)
}

struct Played {
    policy: StopPolicy,
    now: Instant,
    devices: Vec<DeviceLook>,
}

impl Played {
    fn new(wanted: Convergence, devices: Vec<DeviceLook>) -> Played {
        Played { policy: StopPolicy::new(wanted, None, devices.len()), now: Instant::now(), devices }
    }

    fn look(&mut self, is_round: bool, memory_dirty_bytes: u64) -> Next {
        self.now += Duration::from_millis(50);
        let (now, harvest) = (self.now, Duration::ZERO);
        let look = Look { now, is_round, memory_dirty_bytes, devices: &self.devices, harvest };
        self.policy.next(&look, &pace()).1
    }
}

fn rounds(played: &mut Played, dirty_mib: &[u64]) -> Vec<Next> {
    dirty_mib.iter().map(|dirty| played.look(true, dirty * MIB)).collect()
}

fn another() -> Next {
    Next::Continue(Duration::ZERO)
}

fn device(left: u64) -> DeviceLook {
    DeviceLook {
        name: "net0".into(),
        streams: true,
        initial_loaded: true,
        left: Some(left),
        stop_bytes: Some(left),
        ..DeviceLook::default()
    }
}

#[test]
fn the_stop_comes_below_the_goal_when_no_round_of_memory_helps_much() {
    let run = |dirty: &[u64]| rounds(&mut Played::new(wanted(), Vec::new()), dirty);
    assert_eq!(run(&[1000, 300, 90, 40, 35]), [another(), another(), another(), another(), Next::Stop]);
    assert_eq!(run(&[1000, 300, 90, 40, 5]).last(), Some(&Next::Stop), "a sixteenth");
    assert_eq!(run(&[0]), [Next::Stop], "nothing is left");
    assert_eq!(run(&[1000, 103, 100]), [another(), another(), Next::Stop]);
}

#[test]
fn rounds_that_do_not_get_better_stall_until_the_guest_is_slowed_down() {
    let mut played = Played::new(wanted(), Vec::new());
    let stalled = Next::Stalled(Obstacle::DirtyMemory { dirty_bytes: 510 * MIB });
    assert_eq!(rounds(&mut played, &[500, 490, 495, 510]), [another(), another(), another(), stalled]);
    played.policy.throttled();
    assert_eq!(rounds(&mut played, &[600, 300, 90]), [another(), another(), another()]);
    let mut played = Played::new(Convergence { rounds_max: 2, ..wanted() }, Vec::new());
    assert!(matches!(rounds(&mut played, &[9000, 3000])[1], Next::Stalled(_)), "the last round");
}

#[test]
fn a_quiet_device_with_gigabytes_is_streamed_to_its_end_however_small_each_step_is() {
    let mut played = Played::new(wanted(), vec![device(40 * GIB)]);
    let mut looks = 0;
    loop {
        looks += 1;
        let left = played.devices[0].left.unwrap();
        match played.look(false, 0) {
            Next::Continue(_) => {}
            Next::Stop => {
                assert!(pace().transfer(left) <= Duration::from_millis(2), "{left} bytes are left");
                break;
            }
            next => panic!("{left} bytes are left: {next:?}"),
        }
        let step = left.min(13 * MIB);
        played.devices[0].sent += step;
        played.devices[0].left = Some(left - step);
        played.devices[0].stop_bytes = Some(left - step);
    }
    assert!(looks > 3000, "{looks}");
}

#[test]
fn a_device_that_dirties_as_fast_as_it_gives_stalls_by_its_name_and_not_before_it_was_watched() {
    let mut played = Played::new(wanted(), vec![device(GIB)]);
    let stalled = (0..1000).find_map(|look| {
        played.devices[0].sent += 10 * MIB;
        match played.look(false, 0) {
            Next::Continue(_) => None,
            next => Some((look, next)),
        }
    });
    let (looks, next) = stalled.unwrap();
    assert!(looks >= 10, "{looks}");
    let left_bytes = GIB;
    assert_eq!(next, Next::Stalled(Obstacle::DirtyDevice { device: "net0".into(), left_bytes }));
}

#[test]
fn a_device_that_claims_to_have_endlessly_much_does_not_go_on_for_ever() {
    let mut played = Played::new(wanted(), vec![device(u64::MAX)]);
    played.devices[0].drained = true;
    assert!((0..100).any(|_| matches!(played.look(false, 0), Next::Stalled(_))));
    // Each look makes less of it, but it never ends.
    let mut played = Played::new(wanted(), vec![device(GIB)]);
    let ended = (0..100_000).any(|look| {
        played.devices[0].sent += 64 * MIB;
        played.devices[0].left = Some(if look % 2 == 0 { GIB / 2 } else { GIB });
        matches!(played.look(false, 0), Next::Stalled(_))
    });
    assert!(ended);
    let unknown = DeviceLook { left: None, ..device(0) };
    let mut played = Played::new(wanted(), vec![unknown]);
    assert!(matches!(played.look(false, 0), Next::Continue(_)), "it has not said that it has nothing");
    played.devices[0].sent = GIB + 1;
    assert!(matches!(played.look(false, 0), Next::Stop), "nor what is left, and it may never end");
    played.devices[0].sent = 0;
    played.devices[0].drained = true;
    assert_eq!(played.look(false, 0), Next::Stop);
}

#[test]
fn initial_data_holds_the_stop_back_until_it_is_loaded_and_again_when_it_grows_again() {
    let mut played = Played::new(wanted(), vec![DeviceLook { initial: 1, ..device(1) }]);
    let held = |next| assert!(matches!(next, Next::Continue(wait) if wait > Duration::ZERO), "{next:?}");
    (0..200).for_each(|_| held(played.look(false, 0)));
    (played.devices[0].initial, played.devices[0].left) = (0, Some(0));
    played.devices[0].initial_loaded = false;
    held(played.look(true, 0));
    played.devices[0].initial_loaded = true;
    assert_eq!(played.look(false, 0), Next::Stop);
    played.devices[0].initial = 100;
    held(played.look(false, 0));
}

#[test]
fn initial_data_that_never_ends_is_named_when_its_limit_has_passed() {
    let lying = DeviceLook { initial: 4096, drained: true, ..device(4096) };
    let mut played = Played::new(wanted(), vec![lying.clone()]);
    let looks = (0..2000).take_while(|_| matches!(played.look(false, 0), Next::Continue(_))).count();
    assert!((599..=602).contains(&looks), "{looks} of 50 ms");
    let limit = Duration::from_secs(30);
    let obstacle = Obstacle::InitialData { device: "net0".into(), left_bytes: 4096, limit };
    assert_eq!(played.look(false, 0), Next::Stalled(obstacle));
    let keep = Convergence { when_stalled: WhenStalled::KeepTrying, ..wanted() };
    let mut played = Played::new(keep, vec![lying]);
    assert!((0..2000).all(|_| matches!(played.look(false, 0), Next::Continue(_))));
}

#[test]
fn what_is_not_known_is_not_promised() {
    let unknown = DeviceLook { streams: false, left: None, stop_bytes: None, ..device(0) };
    let mut played = Played::new(wanted(), vec![unknown]);
    let next = played.look(false, 0);
    assert_eq!(next, Next::Stalled(Obstacle::SizeUnknown { device: "net0".into() }));
}

#[test]
fn rounds_made_while_a_device_streams_are_not_counted_for_memory() {
    let wanted = Convergence { rounds_max: 3, ..wanted() };
    let mut played = Played::new(wanted, vec![device(10 * GIB)]);
    for _ in 0..100 {
        played.devices[0].sent += 50 * MIB;
        let left = played.devices[0].left.unwrap() - 50 * MIB;
        played.devices[0].left = Some(left);
        assert!(matches!(played.look(true, 5 * MIB), Next::Continue(_)), "{left}");
    }
}

#[test]
fn a_device_with_more_to_give_than_fits_is_named() {
    let large = DeviceLook { streams: false, left: None, stop_bytes: Some(GIB), ..device(0) };
    let mut played = Played::new(wanted(), vec![large]);
    let obstacle = Obstacle::DeviceState { device: "net0".into(), bytes: GIB };
    assert_eq!(played.look(false, 0), Next::Stalled(obstacle));
}

fn slow_look(policy: &mut StopPolicy, latency: Duration, harvest: Duration) -> Next {
    let now = Instant::now();
    let small = DeviceLook { streams: false, left: None, ..device(616) };
    let look = Look { now, is_round: true, memory_dirty_bytes: 0, devices: &[small], harvest };
    policy.next(&look, &Pace::new(latency, Duration::ZERO, Duration::ZERO)).1
}

#[test]
fn a_stop_that_is_too_long_without_data_is_named_so_and_not_by_a_device_with_a_few_bytes() {
    let slow = |policy: &mut StopPolicy| slow_look(policy, Duration::from_secs(1), Duration::ZERO);
    let mut policy = StopPolicy::new(wanted(), None, 1);
    for _ in 0..3 {
        assert!(matches!(slow(&mut policy), Next::Continue(wait) if wait > Duration::ZERO));
    }
    assert_eq!(slow(&mut policy), Next::Stalled(Obstacle::Latency));
}

#[test]
fn a_harvest_that_was_slow_once_does_not_end_pre_copy() {
    let mut policy = StopPolicy::new(wanted(), None, 1);
    for _ in 0..10 {
        let next = slow_look(&mut policy, Duration::ZERO, Duration::from_secs(1));
        assert!(matches!(next, Next::Continue(_)), "{next:?}");
        assert_eq!(slow_look(&mut policy, Duration::ZERO, Duration::ZERO), Next::Stop);
    }
}

#[test]
fn data_that_is_still_being_loaded_is_waited_for_as_long_as_it_becomes_less() {
    // 200 ms of it, which the destination takes in steps.
    let mut played =
        Played::new(wanted(), vec![DeviceLook { drained: true, on_the_way: 200 * MIB, ..device(0) }]);
    played.devices[0].sent = 500 * MIB;
    let mut looks = 0;
    let next = loop {
        match played.look(false, 0) {
            Next::Continue(_) if looks < 1000 => {}
            next => break next,
        }
        looks += 1;
        // Once in a window, so that several looks find no change.
        if looks % 5 == 0 {
            played.devices[0].on_the_way = played.devices[0].on_the_way.saturating_sub(10 * MIB);
        }
    };
    assert_eq!((next, played.devices[0].on_the_way), (Next::Stop, 0));
    played.devices[0].on_the_way = 200 * MIB;
    let next = (0..100).map(|_| played.look(false, 0)).find(|next| !matches!(next, Next::Continue(_)));
    let obstacle = Obstacle::SlowToLoad { device: "net0".into(), bytes: 200 * MIB };
    assert_eq!(next, Some(Next::Stalled(obstacle)), "the destination takes nothing");
}
