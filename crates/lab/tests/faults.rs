//! Everything that can fail between two of the kernel's devices, failing at every frame: after each, the
//! source runs with what it had, or the destination does; what was in doubt is known by asking; and both
//! devices can be used again, by the very guest that was to be moved.

#[path = "../../migrate/tests/it/common/links.rs"]
#[allow(dead_code, reason = "it uses a part")]
mod links;
mod serial;

use std::io::IoSlice;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use limosa_client::{Device, DeviceExt};
use limosa_lab::{Kind, Mdev, kinds};
use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_migrate::{Ledger, Options, Outcome, Received};
use limosa_protocol::State;
use limosa_testing::forward_link;
use limosa_vfio_kernel::{Door, KernelDevice};
use links::{Fault, FaultyLink, Way};
use serial::gate::{HEADER, frames};
use serial::{kernel, options, peek, registers, send, set_up, with_destination, with_source};

/// Two devices of one kind.
struct Pair {
    // Closed before they go.
    source: KernelDevice,
    destination: KernelDevice,
    kind: Kind,
    _homes: [Mdev; 2],
}

/// Kinds that can be moved, each through one door; mtty through both.
fn subjects() -> Vec<(Kind, Door)> {
    let movable = kinds().into_iter().filter(|kind| kind.name != "limosa-none");
    let doors =
        |kind: &Kind| if kind.parent == "mtty" { vec![Door::Cdev, Door::Group] } else { vec![Door::Cdev] };
    movable.flat_map(|kind| doors(&kind).into_iter().map(move |door| (kind.clone(), door))).collect()
}

/// The kernel's own and the lab's, each as it can do most.
fn is_one_of(kind: &Kind, door: Door) -> bool {
    door == Door::Cdev && ["mtty-1", "limosa-full"].contains(&&*kind.name)
}

impl Pair {
    fn new(kind: &Kind, door: Door) -> Pair {
        let homes = [kind.create(), kind.create()];
        if kind.parent == "limosa" {
            for home in &homes {
                home.set("limosa/block_bytes", 1024);
                home.set("limosa/state_bytes", 4096);
            }
        }
        let [source, destination] = homes.each_ref().map(|home| kernel(home, door));
        Pair { source, destination, kind: kind.clone(), _homes: homes }
    }

    fn is_serial(&self) -> bool {
        self.kind.parent == "mtty"
    }

    /// Puts a guest into the source.
    fn fill(&self, guest: u8) {
        if self.is_serial() {
            self.source.reset().unwrap();
            set_up(&self.source, 0);
            send(&self.source, 0, &[b'b', b'y', b't', b'e', b's', b' ', guest]);
        } else {
            self.source.region_write(0, 0x38, &u64::from(guest).to_le_bytes()).unwrap();
            self.source.region_write(0, 0xc0, &[guest; 8]).unwrap();
        }
    }

    /// What tells one guest from another.
    fn guest(&self, device: &KernelDevice) -> Vec<u8> {
        if self.is_serial() {
            return [peek(device), registers(device, 0).into()].concat();
        }
        let mut check = [0; 8];
        device.region_read(0, 0x30, &mut check).unwrap();
        check.into()
    }

    /// One move over these links.
    fn run(
        &self,
        near: impl Link,
        far: impl Link,
        ledger: &Ledger,
        options: &Options,
    ) -> (Outcome, Received) {
        std::thread::scope(|scope| {
            let received = scope.spawn(move || {
                with_destination(&self.destination, ledger, options, |destination| destination.receive(&far))
            });
            let outcome = with_source(&self.source, options, |source| source.send(&near));
            drop(near);
            (outcome, received.join().unwrap())
        })
    }

    /// One move with a fault in what one side sends.
    fn with_fault(&self, way: Way, at: u64, fault: Fault, options: &Options) -> bool {
        let what = format!("{} {fault:?} at byte {at}, {way:?}", self.kind.name);
        let ledger = Ledger::new();
        let (near, far) = SocketLink::pair().unwrap();
        let guest = self.guest(&self.source);
        let (outcome, received) = match way {
            Way::Out => self.run(FaultyLink::new(near, Way::Out, at, fault), far, &ledger, options),
            Way::In => self.run(near, FaultyLink::new(far, Way::Out, at, fault), &ledger, options),
        };
        self.check(outcome, received, &guest, &ledger, &what)
    }

    /// What must hold, whatever happened; a move in doubt is resolved first. Whether it was moved.
    fn check(&self, outcome: Outcome, received: Received, guest: &[u8], ledger: &Ledger, what: &str) -> bool {
        let outcome = match outcome {
            Outcome::InDoubt(doubt) => {
                let state = self.source.state().unwrap();
                assert!(!state.is_running(), "{what}: in doubt, and in {state}");
                let (near, far) = SocketLink::pair().unwrap();
                std::thread::scope(|scope| {
                    let answered = scope.spawn(move || {
                        let answer = |destination: limosa_migrate::Destination<'_>| destination.receive(&far);
                        with_destination(&self.destination, ledger, &options(), answer)
                    });
                    let outcome =
                        with_source(&self.source, &options(), |source| source.resolve(doubt, &near));
                    drop(near);
                    let answered = answered.join().unwrap();
                    assert!(matches!(answered, Received::Answered { .. }), "{what}: {answered:?}");
                    outcome
                })
            }
            outcome => outcome,
        };
        match &outcome {
            Outcome::Moved(_) => {
                assert!(matches!(received, Received::Runs(_)), "{what}: {received:?}");
                assert_eq!(self.source.state().unwrap(), State::Stop, "{what}");
                assert_eq!(self.destination.state().unwrap(), State::Running, "{what}");
                assert_eq!(self.guest(&self.destination), guest, "{what}");
                true
            }
            Outcome::Undone { report, .. } => {
                assert!(matches!(received, Received::Discarded { .. }), "{what}: {received:?}");
                assert_eq!(self.source.state().unwrap(), State::Running, "{what}: {:?}", report.notes);
                assert_eq!(self.guest(&self.source), guest, "{what}: the source lost something");
                assert_eq!(self.destination.state().unwrap(), State::Running, "{what}: found so");
                // mtty's reset leaves registers and FIFO as they are.
                let holds = !self.is_serial() && self.guest(&self.destination) == guest;
                assert!(!holds, "{what}: what was loaded is still there");
                false
            }
            Outcome::InDoubt(doubt) => panic!("{what}: still in doubt: {doubt:?}"),
        }
    }

    /// A move without a fault: the guest is where it was, in what was the destination.
    fn moves_on(&mut self, what: &str) {
        let guest = self.guest(&self.source);
        let ledger = Ledger::new();
        let (near, far) = SocketLink::pair().unwrap();
        let (outcome, received) = self.run(near, far, &ledger, &options());
        assert!(self.check(outcome, received, &guest, &ledger, what), "{what}: and then nothing moved");
        self.turn();
    }

    /// The guest has moved: what it left is free.
    fn turn(&mut self) {
        self.source.reset().unwrap();
        std::mem::swap(&mut self.source, &mut self.destination);
    }

    /// The bytes of a whole move, each way. The guest is where it was.
    fn record(&mut self) -> [Vec<u8>; 2] {
        let sent = [(); 2].map(|()| Arc::new(Mutex::new(Vec::new())));
        let (near, far) = SocketLink::pair().unwrap();
        let [near, far] =
            [(near, &sent[0]), (far, &sent[1])].map(|(inner, sent)| Tee { inner, sent: Arc::clone(sent) });
        let (outcome, received) = self.run(near, far, &Ledger::new(), &options());
        let (Outcome::Moved(_), Received::Runs(_)) = (&outcome, &received) else {
            panic!("{outcome:?} {received:?}")
        };
        self.turn();
        sent.map(|sent| std::mem::take(&mut *sent.lock().unwrap()))
    }
}

/// A link that keeps what is sent.
struct Tee {
    inner: SocketLink,
    sent: Arc<Mutex<Vec<u8>>>,
}

impl Link for Tee {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let bytes = self.inner.write(slices, wait)?;
        let all = slices.iter().flat_map(|slice| slice.iter().copied());
        self.sent.lock().unwrap().extend(all.take(bytes));
        Ok(bytes)
    }

    forward_link!(|this| this.inner; read, finish, peer);
}

/// Where to fail: in each frame its first byte, or everywhere that is different: within its header, at its payload,
/// within that, its last.
fn places(sent: &[u8], everywhere: bool) -> Vec<u64> {
    if !everywhere {
        return frames(sent);
    }
    let begins = frames(sent);
    let ends = begins[1..].iter().copied().chain([sent.len() as u64]);
    let mut places: Vec<u64> = (begins.iter().zip(ends))
        .flat_map(|(begin, end)| [*begin, begin + 9, begin + HEADER, begin.midpoint(end), end - 1])
        .filter(|at| *at < sent.len() as u64)
        .collect();
    places.sort_unstable();
    places.dedup();
    places
}

/// Each of these faults at every place, both ways, with these kinds of devices. After each the guest moves on,
/// so both devices were usable.
fn sweep(subjects: &[(Kind, Door)], faults: &[Fault], options: &Options) {
    for (kind, door) in subjects {
        let mut pair = Pair::new(kind, *door);
        pair.fill(1);
        let sent = pair.record();
        // Where what differs is the device alone, the first byte of each frame will do.
        let everywhere = is_one_of(kind, *door) && options.silence_max >= Duration::from_secs(1);
        let mut guest = 1_u8;
        for (way, sent) in [Way::Out, Way::In].into_iter().zip(&sent) {
            for at in places(sent, everywhere) {
                for fault in faults {
                    // One that nobody was before, so that nothing old is taken for it.
                    guest = guest.wrapping_add(1);
                    pair.fill(guest);
                    if pair.with_fault(way, at, *fault, options) {
                        pair.turn();
                    }
                    pair.moves_on(&format!("{} after {fault:?} at byte {at}, {way:?}", kind.name));
                }
            }
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_link_cut_in_any_frame_leaves_one_side_running_and_both_devices_usable() {
    sweep(&subjects(), &[Fault::Cut], &options());
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_bit_flipped_in_any_frame_is_noticed_and_never_reaches_the_guest() {
    sweep(&subjects(), &[Fault::Flip(3)], &options());
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_link_that_falls_silent_or_loses_a_byte_in_any_frame_is_given_up() {
    // Such a fault shows by silence alone. A machine so slow that silence comes by itself is one fault more.
    let short = Duration::from_millis(60);
    let hasty = options().with_silence_max(short).with_load_max(short).with_commit_max(short);
    let some =
        |(kind, door): &(Kind, Door)| *door == Door::Cdev && ["mtty-1", "limosa-full"].contains(&&*kind.name);
    let subjects: Vec<_> = subjects().into_iter().filter(some).collect();
    assert!(!subjects.is_empty());
    sweep(&subjects, &[Fault::Swallow, Fault::Drop], &hasty);
}
