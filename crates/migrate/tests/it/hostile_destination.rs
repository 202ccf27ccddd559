//! A destination that answers, and then only says that it is alive: it holds the guest of a source for no longer than
//! `standstill_max`, whatever the source waits for.

use std::io::IoSlice;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::hooked::{Hooked, ends_in_time};
use crate::common::options;
use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_migrate::{Error, MovedDevice, Outcome, Source, Vmm};
use limosa_protocol::{MigrationFlags, State};
use limosa_stream::{Decoded, Decoder, Header, Kind, Preface, PrefaceFlags};

/// More than a window and a socket's buffers hold.
const STATE_BYTES: usize = 8 << 20;

/// How a destination holds a source up after the stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    /// It gives no credit.
    NoCredit,
    /// It reads nothing any more.
    ReadsNothing,
    /// It reads so little that each wait of the source makes some progress.
    ReadsLittle,
    /// It takes everything and is never ready.
    NeverReady,
}

/// A destination that a test makes up.
struct Hostile {
    link: SocketLink,
    /// The number of its next frame.
    sequence: Mutex<u32>,
    has_answered: AtomicBool,
    ended: AtomicBool,
}

impl Hostile {
    /// Whether the source still takes what it is sent.
    fn say(&self, kind: Kind, section: u32, position: u64, payload: &[u8]) -> bool {
        let mut sequence = self.sequence.lock().unwrap();
        let header = Header::new(kind, section, position, *sequence, payload);
        *sequence += 1;
        self.write(&[&header.encode()[..], payload].concat())
    }

    fn write(&self, bytes: &[u8]) -> bool {
        let mut sent = 0;
        while sent < bytes.len() {
            let wait = Wait::within(Duration::from_secs(10), None);
            match self.link.write(&[IoSlice::new(&bytes[sent..])], wait) {
                Ok(some) => sent += some,
                Err(_) => return false,
            }
        }
        true
    }

    fn keep_alive(&self) {
        while !self.ended.load(Ordering::SeqCst) {
            if self.has_answered.load(Ordering::SeqCst) && !self.say(Kind::PROGRESS, 0, 0, &[0; 8]) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Reads until the source closes. After the stop it reads as it holds the source up.
    fn run(&self, holds: Holds) {
        let (mut decoder, mut is_stopped, mut taken) = (Decoder::new(), false, 0);
        loop {
            while let Some(decoded) = decoder.next().unwrap() {
                let header = match decoded {
                    Decoded::Preface(preface) => {
                        self.write(&Preface::new(preface.id, PrefaceFlags::empty()).encode());
                        continue;
                    }
                    Decoded::Frame { header, .. } => header,
                };
                match header.kind {
                    Kind::OFFER => {
                        let window = if holds == Holds::NoCredit { 64 << 10 } else { 1 << 30 };
                        let answer = format!(r#"{{"accepted":true,"window":{window}}}"#);
                        self.say(Kind::ANSWER, 0, 0, answer.as_bytes());
                        self.has_answered.store(true, Ordering::SeqCst);
                    }
                    Kind::FLUSH => {
                        self.say(Kind::FLUSHED, header.section, header.position, &[]);
                    }
                    Kind::DEVICE_DATA => taken = header.position + u64::from(header.length),
                    Kind::STOPPED => is_stopped = true,
                    Kind::SUM => {
                        assert_eq!(holds, Holds::NeverReady);
                        self.say(Kind::CREDIT, 0, taken, &[]);
                    }
                    _ => {}
                }
            }
            let mut piece = [0; 4096];
            let room = match holds {
                Holds::ReadsNothing if is_stopped => {
                    self.keep_alive();
                    piece.len()
                }
                Holds::ReadsLittle if is_stopped && !self.ended.load(Ordering::SeqCst) => {
                    std::thread::sleep(Duration::from_millis(20));
                    16
                }
                _ => piece.len(),
            };
            match self.link.read(&mut piece[..room], Wait::within(Duration::from_secs(60), None)) {
                Ok(read) => decoder.push(&piece[..read]),
                Err(LinkError::Closed) => return self.link.cut(),
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// Tells the destination when the guest goes on.
struct Resumed<'a>(&'a AtomicBool);

impl Vmm for Resumed<'_> {
    fn resume(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_destination_that_only_says_that_it_is_alive_holds_the_guest_no_longer_than_it_may() {
    for holds in [Holds::NoCredit, Holds::ReadsNothing, Holds::ReadsLittle, Holds::NeverReady] {
        ends_in_time(&format!("{holds:?}"), move || {
            let standstill_max = Duration::from_millis(300);
            // No other limit ends it.
            let options = options()
                .with_precopy(false)
                .with_unauthenticated_peers(true)
                .with_silence_max(Duration::from_secs(3600))
                .with_load_max(Duration::MAX)
                .with_standstill_max(standstill_max);
            let source = Hooked::new("source", MigrationFlags::SETS[3], &vec![7; STATE_BYTES]);
            let (near, far) = SocketLink::pair().unwrap();
            let hostile = Hostile {
                link: far,
                sequence: Mutex::new(0),
                has_answered: AtomicBool::new(false),
                ended: AtomicBool::new(false),
            };
            let outcome = std::thread::scope(|scope| {
                let hostile = &hostile;
                scope.spawn(move || hostile.run(holds));
                scope.spawn(move || hostile.keep_alive());
                let resumed = Resumed(&hostile.ended);
                let devices = [MovedDevice::new(&source)];
                let outcome = Source::new(&devices, &options).with_vmm(&resumed).send(&near);
                drop(near);
                outcome
            });
            let Outcome::Undone { why: Error::StoodStill { limit, .. }, .. } = outcome else {
                panic!("{holds:?}: {outcome:?}")
            };
            assert_eq!(limit, standstill_max);
            assert_eq!(source.state(), State::Running, "{holds:?}");
            assert!(hostile.ended.load(Ordering::SeqCst), "{holds:?}: the vCPUs go on");
        });
    }
}
