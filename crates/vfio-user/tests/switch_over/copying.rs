//! What goes over while the old server serves: the state of devices with PRE_COPY, and connections.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use limosa_client::{Device, DeviceExt};
use limosa_models::synthetic::registers;
use limosa_protocol::State;
use limosa_switch_over::Refusal;
use limosa_vfio_user::client::{Client, Options as ClientOptions, Role};

use crate::bytes;
use crate::common::raw::*;
use crate::{MIB, Meanwhile, Running, map, memory, register, set_register, synthetic, synthetic_with};

#[test]
fn state_is_copied_while_the_vmm_uses_and_changes_its_device_and_nothing_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    for more in ["", "p2p=off", "precopy=50", "precopy=0", "pre-copy=off"] {
        let running = Running::bind(folder.path(), vec![synthetic_with(more)]);
        let client = Client::connect(folder.path().join("device0"), ClientOptions::default()).unwrap();
        let (mut rounds, mut changed) = (0, 0);
        let new = synthetic_with(more);
        let running = running.replaced_meanwhile(vec![new], |round| {
            rounds = round;
            // Fewer and fewer changes, so that rounds pay.
            let changes = 16 >> round;
            set_register(&client, registers::DIRTY, changes);
            changed += changes;
            assert_eq!(client.state().unwrap(), State::Running, "the VMM is not told");
            Ok(())
        });
        assert_eq!(register(&client, registers::DIRTIED), changed, "{more}");
        assert_eq!(register(&client, registers::BAD_BLOCKS), 0, "{more}");
        let copies = more != "precopy=0" && more != "pre-copy=off";
        assert_eq!(rounds > 1, copies, "{more}: {rounds} rounds");
        assert_eq!(client.state().unwrap(), State::Running);
        drop((client, running));
    }
}

#[test]
fn a_reset_by_the_vmm_while_its_device_is_copied_has_the_copy_begin_anew() {
    let folder = tempfile::tempdir().unwrap();
    for (at, changes) in [(1, 20), (2, 20), (1, 0)] {
        let running = Running::bind(folder.path(), vec![synthetic_with("")]);
        let client = Client::connect(folder.path().join("device0"), ClientOptions::default()).unwrap();
        set_register(&client, registers::DIRTY, 100);
        let running = running.replaced_meanwhile(vec![synthetic_with("")], |round| {
            if round == at {
                client.reset().unwrap();
                assert_eq!(client.state().unwrap(), State::Running);
            }
            set_register(&client, registers::DIRTY, changes / round as u64);
            Ok(())
        });
        let expected: u64 = register(&client, registers::DIRTIED);
        assert!(expected <= 2 * changes, "{expected}: what was changed before the reset is gone");
        assert_eq!(register(&client, registers::BAD_BLOCKS), 0);
        assert_eq!(client.reset_count().unwrap(), Some(1));
        drop((client, running));
    }
}

#[test]
fn a_reset_after_the_last_round_has_the_whole_state_go_over_in_the_freeze() {
    let folder = tempfile::tempdir().unwrap();
    let machine = synthetic_with("");
    let running = Running::bind(folder.path(), vec![Arc::clone(&machine)]);
    let client = Client::connect(folder.path().join("device0"), ClientOptions::default()).unwrap();
    let running = running.replaced_meanwhile(vec![synthetic_with("")], |round| {
        // The last round that there can be.
        if round == limosa_switch_over::ROUNDS_MAX {
            client.reset().unwrap();
        }
        // So much that another round always pays.
        set_register(&client, registers::REINIT, 1);
        Ok(())
    });
    assert_eq!(register(&client, registers::BAD_BLOCKS), 0);
    drop((client, running));
}

#[test]
fn a_client_that_moves_a_device_which_is_copied_goes_first_and_the_device_is_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::bind(folder.path(), vec![synthetic_with("")]);
    let path = folder.path().join("device0");
    let client = Client::connect(&path, ClientOptions::default()).unwrap();
    let control =
        Client::connect(&path, ClientOptions { role: Role::Control, ..ClientOptions::default() }).unwrap();
    set_register(&client, registers::DIRTY, 40);
    for mover in [&client, &control] {
        for to in [State::Stop, State::StopCopy, State::PreCopy] {
            let taker = Meanwhile::new(vec![synthetic_with("")], |_| {
                // Its session is its own.
                let session = mover.set_state(to).unwrap();
                assert_eq!(session.is_some(), to != State::Stop);
                set_register_if_it_runs(&client, to);
                Ok(())
            });
            let refused = running.refuses_taker(taker);
            assert!(refused.contains("moves"), "{refused}");
            assert_eq!(mover.state().unwrap(), to);
            // A device that is moved already is refused at once.
            let refused = running.refuses(vec![synthetic_with("")]);
            assert!(refused.contains("moves"), "{refused}");
            mover.set_state(State::Running).unwrap();
            assert_eq!(register(&client, registers::BAD_BLOCKS), 0);
        }
    }
    let running = running.replaced_by(vec![synthetic_with("")]);
    assert_eq!(register(&client, registers::BAD_BLOCKS), 0);
    drop(running);
}

fn set_register_if_it_runs(client: &Client, state: State) {
    if state.is_running() {
        set_register(client, registers::DIRTY, 1);
    }
}

#[test]
fn a_device_whose_switch_over_failed_while_it_was_copied_runs_as_before() {
    let folder = tempfile::tempdir().unwrap();
    let machine = synthetic_with("");
    let running = Running::bind(folder.path(), vec![Arc::clone(&machine), synthetic("64K")]);
    let client = Client::connect(folder.path().join("device0"), ClientOptions::default()).unwrap();
    for fails_at in [1, 2] {
        let taker = Meanwhile::new(vec![synthetic_with(""), synthetic("64K")], |round| {
            set_register(&client, registers::DIRTY, 10);
            if round < fails_at { Ok(()) } else { Err(Refusal::new("another day")) }
        });
        let refused = running.refuses_taker(taker);
        assert!(refused.contains("another day"), "{refused}");
        // Once the old server has heard of it, the VMM has a session of its own.
        let session = client.set_state(State::PreCopy).unwrap();
        assert!(session.is_some());
        client.set_state(State::Running).unwrap();
    }
    let running = running.replaced_by(vec![synthetic_with(""), synthetic("64K")]);
    assert_eq!(register(&client, registers::DIRTIED), 10 + 20);
    assert_eq!(register(&client, registers::BAD_BLOCKS), 0);
    drop(running);
}

#[test]
fn arcs_that_fail_while_a_device_is_copied_or_stopped_leave_it_running() {
    let folder = tempfile::tempdir().unwrap();
    for (fault, is_replaced) in [
        ("fail:RUNNING>PRE_COPY", true),
        ("fail:PRE_COPY>PRE_COPY_P2P", false),
        ("fail:PRE_COPY_P2P>STOP_COPY", false),
    ] {
        let running = Running::bind(folder.path(), vec![synthetic_with(&format!("fault={fault}"))]);
        let client = Client::connect(folder.path().join("device0"), ClientOptions::default()).unwrap();
        set_register(&client, registers::DIRTY, 5);
        if !is_replaced {
            let refused = running.refuses(vec![synthetic_with("")]);
            assert!(refused.contains("device0: "), "{fault}: {refused}");
            assert_eq!(client.state().unwrap(), State::Running, "{fault}");
            set_register(&client, registers::DIRTY, 5);
        }
        // The arc fails once.
        let running = running.replaced_by(vec![synthetic_with("")]);
        assert_eq!(register(&client, registers::BAD_BLOCKS), 0, "{fault}");
        assert_eq!(register(&client, registers::DIRTIED), if is_replaced { 5 } else { 10 });
        drop((client, running));
    }
}

#[test]
fn connections_that_come_and_go_while_the_device_is_copied_are_those_that_the_new_server_has() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device0");
    let running = Running::bind(folder.path(), vec![synthetic_with("")]);
    let client = Client::connect(&path, ClientOptions::default()).unwrap();
    let guest = memory(MIB);
    map(&client, 0, &guest, MIB);
    let (mut client, mut goes, mut next) = (Some(client), Some(UnixStream::connect(&path).unwrap()), None);
    let mut half = None;
    let running = running.replaced_meanwhile(vec![synthetic_with("")], |round| {
        if round == 1 {
            // The VMM and a client that said nothing go, another VMM comes, and one that has said half of it.
            (client, goes) = (None, None);
            let now = Client::connect(&path, ClientOptions::default()).unwrap();
            set_register(&now, registers::DIRTY, 9);
            next = Some(now);
            let mut socket = UnixStream::connect(&path).unwrap();
            socket.write_all(&header(1, VERSION, 20, 0)[..9]).unwrap();
            half = Some(socket);
        }
        Ok(())
    });
    drop((client, goes));
    let next = next.unwrap();
    assert_eq!(register(&next, registers::DIRTIED), 9);
    let mapped = running.machines[0].bus().memory.write(0, &[1]);
    assert!(mapped.is_err(), "the mappings went with their client");
    map(&next, 0, &guest, MIB);
    running.machines[0].bus().memory.write(0, &[1]).unwrap();
    drop(next);
    let mut half = half.unwrap();
    half.write_all(&header(1, VERSION, 20, 0)[9..]).unwrap();
    half.write_all(&bytes![0u16, 2u16]).unwrap();
    assert_eq!(Raw::new(half).receive().flags, REPLY);
    drop(running);
}

#[test]
fn clients_of_a_server_that_was_not_replaced_keep_their_connections() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device0");
    let running = Running::bind(folder.path(), vec![synthetic_with("")]);
    let client = Client::connect(&path, ClientOptions::default()).unwrap();
    let mut raw = UnixStream::connect(&path).unwrap();
    let refused =
        running.refuses_taker(Meanwhile::new(vec![synthetic_with("")], |_| Err(Refusal::new("no"))));
    assert!(refused.contains("no"), "{refused}");
    assert_eq!(client.state().unwrap(), State::Running);
    raw.write_all(&message(1, VERSION, 0, &bytes![0u16, 2u16])).unwrap();
    drop(client);
    assert_eq!(Raw::new(raw).receive().flags, REPLY);
    drop(running);
}

/// Which of the first 64 pages are dirty, by a report that clears them.
fn dirty_pages(client: &Client) -> u64 {
    let mut words = [0u64];
    client.dma_logging_report(0, 64 * 4096, 4096, &mut words).unwrap();
    words[0]
}

#[test]
fn pages_that_are_written_before_in_and_after_the_rounds_of_a_copy_are_each_reported_once() {
    // The rounds in which the VMM asks for a report, which takes pages out of the log.
    for reports_in in [&[][..], &[1], &[2], &[1, 2, 3]] {
        let folder = tempfile::tempdir().unwrap();
        let old = synthetic_with("");
        let running = Running::bind(folder.path(), vec![Arc::clone(&old)]);
        let client = Client::connect(folder.path().join("device0"), ClientOptions::default()).unwrap();
        let guest = memory(MIB);
        map(&client, 0, &guest, MIB);
        client.dma_logging_start(4096, &[]).unwrap();
        let (mut written, mut reported, mut rounds) = (0_u64, 0_u64, 0);
        let write = |machine: &limosa_device::Machine, page: u64| {
            machine.bus().memory.write(page * 4096 + 7, &[page as u8 + 1]).unwrap();
            1 << page
        };
        written |= write(&old, 0);
        let new = synthetic_with("");
        let running = running.replaced_meanwhile(vec![Arc::clone(&new)], |round| {
            rounds = round;
            written |= write(&old, round as u64);
            if reports_in.contains(&round) {
                let pages = dirty_pages(&client);
                assert_eq!((pages & reported, pages & !written), (0, 0), "round {round}");
                reported |= pages;
                // Again behind the report.
                written |= write(&old, 40 + round as u64);
            }
            // Fewer and fewer changes, so that rounds pay.
            set_register(&client, registers::DIRTY, 16 >> round);
            Ok(())
        });
        assert!(rounds > 1, "{rounds} rounds");
        written |= write(&new, 63);
        let pages = dirty_pages(&client);
        assert_eq!((pages & reported, pages | reported), (0, written), "{reports_in:?}");
        assert_eq!(dirty_pages(&client), 0);
        for page in (0..64).filter(|page| written >> page & 1 == 1) {
            let mut byte = [0];
            rustix::io::pread(&guest, &mut byte, page * 4096 + 7).unwrap();
            assert_eq!(byte, [page as u8 + 1]);
        }
        client.dma_logging_stop().unwrap();
        drop((client, running));
    }
}
