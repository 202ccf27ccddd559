//! Clients that answer late, wrong or never.

use super::*;

#[test]
fn a_client_that_does_not_answer_costs_the_request_and_not_the_connection() {
    let options = Options { dma_limit: Duration::from_secs(1), ..Options::default() };
    let served = Served::with(TestDevice::new().machine(), options);
    let mut raw = Raw::connect(served.path());
    raw.version(r#"{"capabilities":{"max_data_xfer_size":64}}"#).ok();
    raw.dma_map(IOVA, 1 << 20, 0, None).ok();
    let id = start(&mut raw, DMA_READ_NOW, 64);
    let late = command(&raw, DMA_READ, IOVA, 64);
    assert_eq!(reply_to(&raw, id).refused(), ETIMEDOUT);
    // The late answer is dropped, with its body.
    answer_read(&raw, &late, &[1; 64]);
    raw.assert_usable();
    let id = start(&mut raw, DMA_READ_NOW, 64);
    let read = command(&raw, DMA_READ, IOVA, 64);
    answer_read(&raw, &late, &[1; 64]);
    answer_read(&raw, &read, &[2; 64]);
    reply_to(&raw, id).ok();
    assert_eq!(raw.region_read(BAR2, 64 << 10, 64).ok().body[16..], [2; 64]);
}

#[test]
fn wrong_answers_fail_the_transfer_and_keep_the_connection_in_step() {
    let served = Served::new();
    let mut raw = peer(&served);
    let answers: [(u32, u32, Vec<u8>, u32); 8] = [
        (REPLY | ERROR, 14, vec![], 14),
        (REPLY | ERROR, 0, vec![], EIO),
        (REPLY | ERROR, 22, vec![1; 5000], 22),
        (REPLY, 0, vec![], EPROTO),
        (REPLY, 0, bytes![IOVA, 8u64], EPROTO),
        (REPLY, 0, bytes![IOVA, 8u64, 0u32], EPROTO),
        (REPLY, 0, bytes![IOVA + 1, 8u64, 0u64], EPROTO),
        (REPLY, 0, [bytes![IOVA, 8u64], vec![0; 100_000]].concat(), EPROTO),
    ];
    for operation in [DMA_READ_NOW, DMA_READ_LATER, DMA_READ_JOINED] {
        for (flags, error, body, expected) in &answers {
            let id = start(&mut raw, operation, 8);
            let read = loop {
                let message = raw.receive();
                if message.command == DMA_READ {
                    break message;
                }
                assert_eq!(message.ok().id, id);
            };
            let mut bytes = header(read.id, DMA_READ, 16 + body.len() as u32, *flags);
            bytes[12..].copy_from_slice(&error.to_ne_bytes());
            bytes.extend_from_slice(body);
            raw.send(&bytes, &[]);
            if operation == DMA_READ_LATER {
                // The reply came before the command, or comes now.
                let mut probe = raw.region_read_later(BAR2, 24, 4);
                while probe.0 != probe.1.id {
                    assert_eq!(probe.1.ok().id, id);
                    probe.1 = raw.receive();
                }
                assert_eq!(probe.1.ok().u32(16), *expected);
            } else {
                assert_eq!(reply_to(&raw, id).refused(), *expected, "{flags} {error} {}", body.len());
            }
            raw.assert_usable();
        }
    }
    // For writes too.
    for body in [vec![], bytes![IOVA, 7u32], bytes![IOVA, 7u64], bytes![IOVA, 8u64, 0u64], bytes![IOVA]] {
        let id = start(&mut raw, DMA_WRITE_NOW, 8);
        let write = command(&raw, DMA_WRITE, IOVA, 8);
        raw.send(&message(write.id, DMA_WRITE, REPLY, &body), &[]);
        assert_eq!(reply_to(&raw, id).refused(), EPROTO, "{body:?}");
        raw.assert_usable();
    }
}

#[test]
fn more_requests_than_there_is_room_for_fail_the_transfer_only() {
    let served = Served::new();
    let mut raw = peer(&served);
    let first = start(&mut raw, DMA_READ_NOW, 8);
    let read = command(&raw, DMA_READ, IOVA, 8);
    let body = bytes![0u64, BAR0, 4u32, 1u32];
    let many: Vec<u8> = (0..3000).flat_map(|_| message(1, REGION_WRITE, NO_REPLY, &body)).collect();
    raw.send(&many, &[]);
    assert_eq!(reply_to(&raw, first).refused(), ENOMEM);
    answer_read(&raw, &read, &[0; 8]);
    raw.assert_usable();
    assert_eq!(raw.region_read(BAR0, 0, 4).ok().u32(16), 1);
}

#[test]
fn fds_that_pile_up_behind_a_transfer_are_bounded() {
    let served = Served::new();
    let mut raw = peer(&served);
    let first = start(&mut raw, DMA_READ_NOW, 8);
    command(&raw, DMA_READ, IOVA, 8);
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    // As many of each as are taken at all.
    for _ in 0..17 {
        raw.send(&message(9, GET_INFO, NO_REPLY, &[0; 16]), &vec![event.as_fd(); 253]);
    }
    assert_eq!(reply_to(&raw, first).refused(), ENOMEM);
    raw.assert_usable();
}

#[test]
fn a_client_that_dies_fails_the_transfer_at_once() {
    let options = Options { dma_limit: Duration::from_secs(3600), ..Options::default() };
    for operation in [DMA_READ_LATER, DMA_WRITE_LATER, DMA_READ_NOW, DMA_READ_JOINED] {
        let served = Served::with(TestDevice::new().machine(), options.clone());
        let mut raw = peer(&served);
        start(&mut raw, operation, 8);
        while ![DMA_READ, DMA_WRITE].contains(&raw.receive().command) {}
        drop(raw);
        let mut next = served.peer();
        assert_eq!(outcome(&mut next), ECONNRESET);
        // Its mappings went with it.
        assert_ne!(next.region_write(BAR2, 0, &engine(DMA_READ_NOW, 8)[16..]).refused(), 0);
    }
}

#[test]
fn the_limit_of_a_transfer_holds_within_an_answer_that_drips() {
    let options = Options { dma_limit: Duration::from_millis(50), ..Options::default() };
    let served = Served::with(TestDevice::new().machine(), options);
    let mut raw = peer(&served);
    let id = start(&mut raw, DMA_READ_NOW, 64);
    let read = command(&raw, DMA_READ, IOVA, 64);
    let answer = message(read.id, DMA_READ, REPLY, &[bytes![IOVA, 64u64], vec![1; 64]].concat());
    for part in answer[..60].chunks(1) {
        raw.send(part, &[]);
    }
    assert_eq!(reply_to(&raw, id).refused(), ETIMEDOUT);
    raw.send(&answer[60..], &[]);
    raw.assert_usable();
}

#[test]
fn a_command_that_drips_does_not_hold_up_the_device() {
    let options = Options { dma_limit: Duration::from_millis(50), ..Options::default() };
    let served = Served::with(TestDevice::new().machine(), options);
    let mut raw = peer(&served);
    let id = start(&mut raw, DMA_READ_NOW, 64);
    let late = command(&raw, DMA_READ, IOVA, 64);
    // In the stead of an answer comes a part of a command.
    let info = message(7, GET_INFO, 0, &bytes![16u32, 0u32, 0u32, 0u32]);
    raw.send(&info[..20], &[]);
    assert_eq!(reply_to(&raw, id).refused(), ETIMEDOUT);
    assert_eq!(reply_to(&raw, 7).refused(), ETIMEDOUT, "nobody waited for the rest of it");
    raw.send(&info[20..], &[]);
    answer_read(&raw, &late, &[1; 64]);
    raw.assert_usable();
}
