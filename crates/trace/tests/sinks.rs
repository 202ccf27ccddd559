//! What the sinks write, and what becomes of a trace when they cannot.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use limosa_protocol::{Errno, FeatureIndex, FeatureOp, State};
use limosa_trace::event::{Direction, Event, Outcome, Request, Transition};
use limosa_trace::recorder::{Recorder, Sink};
use limosa_trace::seen::{Message, Seen};
use limosa_trace::sink::{Json, Lines, Pcapng, Statistics, line};
use limosa_vfio_user::codec::{Command, Header};

#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Write for Memory {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Memory {
    fn taken(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

fn set(outcome: Outcome) -> Event {
    let transition = Some(Transition { from: Some(State::Stop), to: State::StopCopy });
    Event {
        // 12:01:02.123456 on some day.
        time_ns: (86_400 * 9 + 43_262) * 1_000_000_000 + 123_456_789,
        duration_ns: Some(1_240_000),
        pid: Some(4711),
        name: "a.sock".into(),
        direction: Direction::ToDevice,
        request: Request::Feature { index: FeatureIndex::MIG_DEVICE_STATE, op: FeatureOp::SET, transition },
        arguments: "STOP > STOP_COPY".into(),
        outcome,
        bytes: 0,
        session_of: None,
        fds: vec!["9".into()],
    }
}

#[test]
fn a_line_is_as_it_is_documented() {
    assert_eq!(
        line(&set(Outcome::Done("data_fd 9".into()))),
        "12:01:02.123456 [pid 4711] a.sock FEATURE SET MIG_DEVICE_STATE STOP > STOP_COPY -> data_fd 9 <1.2 ms>"
    );
    let refused = line(&set(Outcome::Refused(Errno::EINVAL)));
    assert!(refused.contains(" fds [9] -> EINVAL (invalid argument"), "{refused}");
    let asked = Event {
        direction: Direction::FromDevice,
        request: Request::Named("DMA_WRITE"),
        arguments: "0x1000+0x20".into(),
        duration_ns: Some(999),
        pid: None,
        fds: Vec::new(),
        ..set(Outcome::Done(String::new()))
    };
    assert_eq!(line(&asked), "12:01:02.123456 a.sock <- DMA_WRITE 0x1000+0x20 -> ok <999 ns>");
}

#[test]
fn json_has_the_same_fields_for_programs() {
    let memory = Memory::default();
    let mut json = Json::new("test", memory.clone());
    json.event(&set(Outcome::Refused(Errno::EINVAL))).unwrap();
    json.end().unwrap();
    let document: serde_json::Value = serde_json::from_slice(&memory.taken()).unwrap();
    assert_eq!(document["errno"], "EINVAL");
    assert_eq!((&document["from"], &document["to"]), (&"STOP".into(), &"STOP_COPY".into()));
    assert_eq!(document["outcome"], "refused");
    assert_eq!(document["time_ns"], set(Outcome::Posted).time_ns);
    assert!(document.get("bytes").is_none(), "{document}");
}

#[test]
fn statistics_are_bounded_and_give_an_arc_the_bytes_of_its_session() {
    let (mut sink, handle) = Statistics::new();
    sink.event(&set(Outcome::Done(String::new()))).unwrap();
    let read = Event {
        request: Request::Named("MIG_DATA_READ"),
        bytes: 70,
        session_of: Some("a.sock".into()),
        ..set(Outcome::Done(String::new()))
    };
    sink.event(&read).unwrap();
    for number in 0..10_000 {
        let unknown = Event { request: Request::Numbered("message", number), ..set(Outcome::Posted) };
        sink.event(&unknown).unwrap();
    }
    let table = handle.table();
    assert_eq!(table.arcs.len(), 1);
    assert_eq!((table.arcs[0].1.calls, table.arcs[0].1.bytes), (1, 70));
    assert_eq!(table.requests.len(), 513);
    assert_eq!(table.requests.iter().map(|(_, tally)| tally.calls).sum::<u64>(), 10_002);
    let text = table.text();
    assert!(text.contains("STOP > STOP_COPY") && text.contains("further ones"), "{text}");
}

#[test]
fn blocks_of_a_capture_file_have_their_lengths_at_both_ends() {
    let memory = Memory::default();
    let mut pcap = Pcapng::new("test", memory.clone()).unwrap();
    pcap.seen(&Seen::Opened {
        time_ns: 1,
        conversation: 1,
        name: "a.sock".into(),
        pid: Some(3),
        is_whole: true,
    })
    .unwrap();
    for kept in [0, 1, 2, 3, 64] {
        let header = Header::command(1, Command::REGION_WRITE, 4096).unwrap();
        let message = Message {
            began_ns: 1,
            ended_ns: 2,
            header,
            head: vec![7; kept],
            body_bytes: 4096,
            fds: Vec::new(),
        };
        pcap.seen(&Seen::Message { conversation: 1, direction: Direction::ToDevice, message }).unwrap();
    }
    pcap.end().unwrap();
    let bytes = memory.taken();
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    let (mut at, mut kinds) = (0, Vec::new());
    while at < bytes.len() {
        let length = word(at + 4) as usize;
        assert_eq!(length % 4, 0);
        assert_eq!(word(at + length - 4) as usize, length);
        kinds.push(word(at));
        if word(at) == 6 {
            assert_eq!(word(at + 24), 16 + 6 + 16 + 4096, "the whole packet");
        }
        at += length;
    }
    assert_eq!(kinds, [0x0a0d_0d0a, 1, 6, 6, 6, 6, 6]);
}

struct Broken;

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::StorageFull.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_sink_that_fails_is_left_out_and_said_to_have_failed() {
    let memory = Memory::default();
    let sinks: Vec<Box<dyn Sink>> =
        vec![Box::new(Lines::new("broken", Broken)), Box::new(Lines::new("memory", memory.clone()))];
    let (told, tells) = std::sync::mpsc::channel();
    let recorder = Recorder::start(sinks, move |failure| told.send(failure.name.clone()).unwrap()).unwrap();
    let handle = recorder.handle();
    let note = |text: &str| Seen::Note { time_ns: 0, pid: None, text: text.into() };
    handle.record(note("one"));
    assert_eq!(tells.recv().unwrap(), "broken");
    assert!(!handle.is_deaf());
    handle.record(note("two"));
    let failures = recorder.finish();
    assert_eq!(failures.len(), 1);
    let said = String::from_utf8(memory.taken()).unwrap();
    assert!(said.contains("*** one") && said.contains("*** two"), "{said}");
}

#[test]
fn nothing_is_recorded_once_no_sink_is_left() {
    let recorder = Recorder::start(vec![Box::new(Lines::new("broken", Broken))], |_| {}).unwrap();
    let handle = recorder.handle();
    let (told, tells) = std::sync::mpsc::channel();
    handle.when_deaf(move || told.send(()).unwrap());
    handle.record(Seen::Note { time_ns: 0, pid: None, text: "one".into() });
    tells.recv().unwrap();
    assert!(handle.is_deaf());
    for _ in 0..10_000 {
        handle.record(Seen::Note { time_ns: 0, pid: None, text: "more".into() });
    }
    assert_eq!(recorder.finish().len(), 1);
}
