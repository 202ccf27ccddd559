//! Faults in migration, and in what a server keeps of clients that are gone.

use super::*;

pub(super) fn all() -> Vec<Case> {
    vec![
        // Migration
        answer("SET is answered by a header", "feature.reply", |m, r| {
            if state_op(m) == FeatureOp::SET && r.body.len() > 8 {
                r.set_body(r.body[..8].to_vec());
            }
        }),
        answer("PROBE is answered with data", "feature.reply", |m, r| {
            if state_op(m).contains(FeatureOp::PROBE) && !is_refusal(r) {
                r.set_body([&r.body[..], &[0; 8]].concat());
            }
        }),
        answer("GET does not say its size", "feature.reply", |m, r| {
            if state_op(m) == FeatureOp::GET && r.body.len() >= 8 {
                r.body[0] = 8;
            }
        }),
        answer("data is read at any time", "data.session", |m, r| {
            if m.is(Command::MIG_DATA_READ) && is_refusal(r) && m.u32(4) == 4096 {
                allow(r, [8u32.to_ne_bytes(), 0u32.to_ne_bytes()].concat());
            }
        }),
        answer("data is written at any time", "data.session", |m, r| {
            if m.is(Command::MIG_DATA_WRITE) && is_refusal(r) && m.u32(4) == 16 {
                allow(r, Vec::new());
            }
        }),
        answer("a read says more than it brings", "data.reply", |m, r| {
            if m.is(Command::MIG_DATA_READ) && r.body.len() >= 8 {
                r.body[4] = 65;
            }
        }),
        answer("a read of any size succeeds", "data.size", |m, r| {
            if m.is(Command::MIG_DATA_READ) && is_refusal(r) && m.u32(4) == u32::MAX {
                allow(r, [8u32.to_ne_bytes(), 0u32.to_ne_bytes()].concat());
            }
        }),
        ask("a read of nothing ends the session's connection", "wire.answered", |m, _| {
            when(m.is(Command::MIG_DATA_READ) && m.body.len() == 8 && m.u32(4) == 0, Do::Close)
        }),
        ask("a write may have less data than it says it has", "data.size", |m, _| {
            let less = m.body.len() >= 8 && m.body.len() - 8 < m.u32(4) as usize;
            when(m.is(Command::MIG_DATA_WRITE) && less, Do::Reply(Vec::new()))
        }),
        // Clients
        other("a device is reset when its client is gone", "gone.state", Fault::ResetsWhenGone),
        other("a device is stopped when its client is gone", "gone.state", Fault::StopsWhenGone),
        ask("mappings outlive their client", "gone.mappings", |m, c| {
            if !m.is(Command::DMA_MAP) || m.u64(16) != IOVA || c.messages != 1 {
                return Do::Pass;
            }
            let by = c.server.memory.swap(c.number, SeqCst);
            when(by + 1 == c.number, Do::Refuse(Errno::EEXIST))
        }),
        ask("eventfds outlive their client", "gone.interrupts", |m, c| {
            if m.is(Command::DEVICE_SET_IRQS) {
                let mut kept = c.server.kept.lock().unwrap();
                match m.u32(4) {
                    0x24 => kept.extend(m.fds.iter().map(|fd| fd.try_clone().unwrap())),
                    0x21 => kept.iter().for_each(|fd| {
                        // One that a check has no use for any more.
                        let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
                    }),
                    _ => {}
                }
            }
            Do::Pass
        }),
        Case {
            words: "a server serves twelve clients",
            clause: "gone.served",
            fault: Fault::Connections(12),
            only: Some("vfio-user.client-comes-and-goes"),
        },
        Case {
            words: "a client that says nothing kills the server",
            clause: "gone.served",
            fault: Fault::DiesAfter(0),
            only: Some("vfio-user.client-gone-before-its-version"),
        },
        other("a second client ends the first", "second.harmless", Fault::SecondEndsFirst),
    ]
}
