//! Many threads on one connection.

use super::*;

#[test]
fn many_threads_share_a_connection() {
    let served = Served::new();
    let client = client(&served);
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let client = &client;
            scope.spawn(move || {
                // Short and long replies, in each other's way.
                let bytes = if thread % 2 == 0 { 8 } else { 60_000 };
                let at = thread * (1 << 17);
                for round in 0..200u64 {
                    let data = vec![(thread * 31 + round) as u8; bytes];
                    if round % 3 == 0 {
                        client.region_write_posted(BAR0, at, &data).unwrap();
                    } else {
                        client.region_write(BAR0, at, &data).unwrap();
                    }
                    let mut read = vec![0; bytes];
                    client.region_read(BAR0, at, &mut read).unwrap();
                    assert!(read == data, "thread {thread}, round {round}");
                    if round % 10 == 0 {
                        assert!(client.region(BAR1).unwrap().fd.is_some());
                    }
                }
            });
        }
    });
}

#[test]
fn large_messages_both_ways_do_not_wait_for_each_other() {
    // Without a twin socket the device's DMA is on the way of the client's large writes.
    let served = Served::new();
    let client =
        Client::connect(served.path(), Options { twin_socket: false, ..Options::default() }).unwrap();
    let memory: Arc<dyn DmaTarget> = Arc::new(Memory(Mutex::new(vec![0; 1 << 20])));
    let map = DmaMap { iova: 0, size: 1 << 20, flags: rw(), memory: DmaMemory::Messages(&memory) };
    client.dma_map(&map).unwrap();
    std::thread::scope(|scope| {
        let client = &client;
        for _ in 0..2 {
            scope.spawn(move || {
                for _ in 0..30 {
                    run_engine(client, DMA_READ_LATER, 0, 1 << 20).unwrap();
                    run_engine(client, DMA_WRITE_LATER, 0, 1 << 20).unwrap();
                }
            });
            scope.spawn(move || {
                for _ in 0..60 {
                    client.region_write(BAR0, 0, &vec![7; 1 << 20]).unwrap();
                    client.region_read(BAR0, 0, &mut vec![0; 1 << 20]).unwrap();
                }
            });
        }
    });
}

#[test]
fn a_server_that_goes_is_noticed_by_every_thread() {
    let served = Served::new();
    let client = client(&served);
    let waiting = std::sync::Barrier::new(5);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let (client, waiting) = (&client, &waiting);
            scope.spawn(move || {
                waiting.wait();
                loop {
                    match client.region_read(BAR0, 0, &mut [0; 8]) {
                        Ok(()) => {}
                        Err(error) => break assert!(matches!(error, Error::Disconnected { .. }), "{error}"),
                    }
                }
            });
        }
        waiting.wait();
        drop(served);
    });
    assert!(client.info().unwrap_err().is_connection_lost());
}
