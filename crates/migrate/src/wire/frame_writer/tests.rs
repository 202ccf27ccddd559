//! Properties of the sending half of a link.

use limosa_stream::AbortCode;
use limosa_stream::body::encode_abort;

use super::super::FrameReader;
use super::*;
use crate::link::SocketLink;

const SILENCE_MAX: Duration = Duration::from_millis(50);

#[test]
fn a_keep_alive_on_a_full_link_waits_for_nothing_and_breaks_no_frame() {
    let (near, far) = SocketLink::pair().unwrap();
    let writer = FrameWriter::new(&near, SILENCE_MAX);
    let mut sent = 0;
    let large = vec![1; 100_000];
    while writer.send(&Frame::of(0, Kind::MEMORY_DATA, &large), None).is_ok() {
        sent += 1;
    }
    for _ in 0..100 {
        writer.keep_alive(Duration::ZERO).unwrap();
    }
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let mut reader = FrameReader::new(&far, Duration::from_secs(10));
            (0..=sent + 1).map(|_| reader.next(&far, "reading", None, None).unwrap().kind).last().unwrap()
        });
        // The frame that did not fit is whole in the end, and numbers go on behind it.
        while !reading.is_finished() {
            writer.keep_alive(Duration::ZERO).unwrap();
        }
        assert_eq!(reading.join().unwrap(), Kind::PROGRESS);
    });
}

#[test]
fn an_error_of_a_queued_frame_is_told_by_every_later_call() {
    let (near, far) = SocketLink::pair().unwrap();
    let writer = FrameWriter::new(&near, SILENCE_MAX);
    let turn = writer.turn(None);
    writer.post(&Frame::new(Kind::STOPPED, &[]), None).unwrap();
    // Nobody waits for a socket to be closed.
    far.cut();
    drop(turn);
    let small = Frame::new(Kind::STOPPED, &[]);
    for _ in 0..3 {
        assert!(matches!(writer.send(&small, None), Err(Error::Link { .. })));
        assert!(matches!(writer.post(&small, None), Err(Error::Link { .. })));
    }
}

/// A link on which every write waits until it may go on.
struct Gated {
    inner: SocketLink,
    /// The threads that wrote, and how many more may.
    state: Monitor<(Vec<std::thread::ThreadId>, usize)>,
}

impl Link for Gated {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let mut state = self.state.lock();
        state.0.push(std::thread::current().id());
        self.state.notify_all();
        while state.1 == 0 {
            (state, _) = self.state.wait(state, None);
        }
        state.1 -= 1;
        self.inner.write(slices, wait)
    }
    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        self.inner.read(into, wait)
    }
    fn finish(&self) {}
    fn peer(&self) -> &str {
        "the peer"
    }
}

#[test]
fn a_frame_that_was_left_to_a_keep_alive_held_up_the_thread_that_watches_the_guest() {
    let (near, _far) = SocketLink::pair().unwrap();
    let link = Gated { inner: near, state: Monitor::default() };
    let writer = FrameWriter::new(&link, SILENCE_MAX);
    std::thread::scope(|scope| {
        let alive = scope.spawn(|| writer.keep_alive(Duration::ZERO).unwrap());
        let mut state = link.state.lock();
        while state.0.is_empty() {
            (state, _) = link.state.wait(state, None);
        }
        drop(state);
        let posts = scope.spawn(|| writer.post(&Frame::new(Kind::STOPPED, &[]), None).unwrap());
        while writer.busy() < 2 {
            std::thread::yield_now();
        }
        link.state.lock().1 = 1;
        link.state.notify_all();
        // The frame is not sent yet, and this thread goes on.
        let (alive, thread) = (alive.thread().id(), alive.join());
        thread.unwrap();
        link.state.lock().1 = 1;
        link.state.notify_all();
        let poster = posts.thread().id();
        posts.join().unwrap();
        assert_eq!(link.state.lock().0, [alive, poster]);
    });
}

#[test]
fn an_abort_waits_for_no_frame_that_another_thread_has_queued() {
    let (near, far) = SocketLink::pair().unwrap();
    let writer = FrameWriter::new(&near, SILENCE_MAX);
    let turn = writer.turn(None);
    for _ in 0..100 {
        writer.post(&Frame::new(Kind::STOPPED, &[]), None).unwrap();
    }
    std::thread::scope(|scope| {
        let aborts = scope.spawn(|| {
            let abort = encode_abort(AbortCode::Cancelled, "cancelled");
            writer.last_word(&Frame::new(Kind::ABORT, &abort), &Error::Cancelled, Duration::from_secs(10))
        });
        while writer.busy() < 102 {
            std::thread::yield_now();
        }
        drop(turn);
        assert!(aborts.join().unwrap());
    });
    assert!(writer.post(&Frame::new(Kind::STOPPED, &[]), None).is_err(), "it was the last one");
    let mut reader = FrameReader::new(&far, Duration::from_secs(10));
    let first = reader.next(&far, "reading", None, None);
    assert!(matches!(first, Err(Error::Aborted { .. })), "{first:?}");
}

/// A link that notes how many bytes each write took. It takes no more than `left` until it has failed once.
struct Ending {
    inner: SocketLink,
    state: Monitor<(Vec<usize>, usize)>,
}

impl Ending {
    fn new(inner: SocketLink, left: usize) -> Ending {
        Ending { inner, state: Monitor::new((Vec::new(), left)) }
    }
}

impl Link for Ending {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let mut state = self.state.lock();
        if state.1 == 0 {
            state.1 = usize::MAX;
            return Err(LinkError::TimedOut);
        }
        let mut bytes = slices.iter().map(|slice| &**slice).collect::<Vec<_>>().concat();
        bytes.truncate(state.1);
        let sent = self.inner.write(&[IoSlice::new(&bytes)], wait)?;
        state.0.push(sent);
        state.1 -= sent;
        Ok(sent)
    }
    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        self.inner.read(into, wait)
    }
    fn finish(&self) {}
    fn peer(&self) -> &str {
        "the peer"
    }
}

/// Sends a frame of `bytes` from another thread, behind eight frames that are queued before it.
fn send_behind_queued(writer: &FrameWriter<'_>, bytes: usize) -> Result<()> {
    std::thread::scope(|scope| {
        let turn = writer.turn(None);
        (0..8).for_each(|section| {
            writer.post(&Frame::of(section, Kind::DEVICE_BEGIN, &[]), None).unwrap();
        });
        let sends =
            scope.spawn(move || writer.send(&Frame::of(8, Kind::DEVICE_DATA, &vec![7; bytes]).at(9), None));
        while writer.busy() < 10 {
            std::thread::yield_now();
        }
        drop(turn);
        sends.join().unwrap()
    })
}

#[test]
fn each_queued_frame_was_a_write_of_its_own() {
    let (near, far) = SocketLink::pair().unwrap();
    let link = Ending::new(near, usize::MAX);
    let writer = FrameWriter::new(&link, Duration::from_secs(10));
    send_behind_queued(&writer, 2000).unwrap();
    assert_eq!(link.state.lock().0, [9 * HEADER_BYTES + 2000]);
    let mut reader = FrameReader::new(&far, Duration::from_secs(10));
    let sections: Vec<_> =
        (0..9).map(|_| reader.next(&far, "reading", None, None).unwrap().section).collect();
    assert_eq!(sections, [0, 1, 2, 3, 4, 5, 6, 7, 8]);
    // Without a thread behind them as well.
    let turn = writer.turn(None);
    (0..8).for_each(|_| writer.post(&Frame::new(Kind::STOPPED, &[]), None).unwrap());
    drop(turn);
    assert_eq!(link.state.lock().0[1..], [8 * HEADER_BYTES]);
}

#[test]
fn a_write_of_several_frames_that_ends_anywhere_leaves_whole_frames() {
    const BYTES: usize = 70;
    for left in 1..9 * HEADER_BYTES + BYTES {
        let (near, far) = SocketLink::pair().unwrap();
        let link = Ending::new(near, left);
        let writer = FrameWriter::new(&link, Duration::from_secs(10));
        assert!(send_behind_queued(&writer, BYTES).is_err(), "{left}");
        // A queued frame may be lost, or all of them were sent.
        assert!(writer.post(&Frame::new(Kind::STOPPED, &[]), None).is_err(), "{left}");
        let abort = encode_abort(AbortCode::Cancelled, "cancelled");
        let abort = Frame::new(Kind::ABORT, &abort);
        assert!(writer.last_word(&abort, &Error::Cancelled, Duration::from_secs(10)), "{left}");
        let mut reader = FrameReader::new(&far, Duration::from_secs(10));
        let mut frames = 0;
        let end = loop {
            match reader.next(&far, "reading", None, None) {
                Ok(header) => assert_eq!(header.section, frames, "{left}"),
                Err(end) => break end,
            }
            frames += 1;
        };
        assert!(matches!(end, Error::Aborted { .. }), "{left}: {end}");
        // Those that had begun.
        assert_eq!(frames as usize, left.div_ceil(HEADER_BYTES).min(9), "{left}");
    }
}
