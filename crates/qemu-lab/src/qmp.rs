//! QEMU's machine protocol (`qemu-qmp-ref`): one JSON object a line, commands answered in order, events in between.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use limosa_testing::{LIMIT, Transcript};
use serde_json::{Value, json};

/// A connection in command mode.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    /// Events that came and were not looked at.
    events: Vec<Value>,
    /// Of QEMU, which says why it ends.
    transcript: Transcript,
}

impl Qmp {
    pub(crate) fn new(stream: UnixStream, transcript: Transcript) -> Qmp {
        stream.set_read_timeout(Some(LIMIT)).expect("a socket of ours");
        let writer = stream.try_clone().expect("an fd");
        let mut qmp = Qmp { reader: BufReader::new(stream), writer, events: Vec::new(), transcript };
        let greeting = qmp.next();
        assert!(greeting.get("QMP").is_some(), "not QMP's greeting: {greeting}");
        qmp.execute("qmp_capabilities", json!({}));
        qmp
    }

    /// What a command returns.
    ///
    /// # Panics
    ///
    /// When QEMU refuses it.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.writer, "{request}").expect("QEMU reads its commands");
        loop {
            let mut answer = self.next();
            if let Some(value) = answer.get_mut("return") {
                return value.take();
            }
            assert!(answer.get("event").is_some(), "{request}: {answer}");
            self.events.push(answer);
        }
    }

    /// What a command of the human monitor prints.
    pub fn monitor(&mut self, line: &str) -> String {
        let said = self.execute("human-monitor-command", json!({ "command-line": line }));
        said.as_str().unwrap_or_default().to_owned()
    }

    /// The data of the next event of this name.
    pub fn event(&mut self, name: &str) -> Value {
        if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
            return self.events.remove(at)["data"].take();
        }
        loop {
            let mut message = self.next();
            if message["event"] == name {
                return message["data"].take();
            }
            self.events.push(message);
        }
    }

    fn next(&mut self) -> Value {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(1..) => {}
            other => panic!("QEMU does not answer: {other:?}; it said: {}", self.transcript.err()),
        }
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }
}
