//! Connections that are paused while others come.

use super::*;
use limosa_foreign_fd::Foreign;
use std::os::unix::net::UnixStream;

const PATIENCE: Duration = Duration::from_secs(20);

/// The server's end of a connection, and the client's.
fn link() -> (Arc<Link>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Arc::new(Link::new(Foreign::new(ours), 4096, PATIENCE, PATIENCE).unwrap()), theirs)
}

#[test]
fn a_switch_over_waited_for_a_connection_that_waited_for_the_place_of_a_paused_one() {
    let doors = Doors::default();
    let ((first, _client), (second, _other)) = (link(), link());
    assert!(doors.expect());
    let id = doors.enter(&first, false, None);
    let state = State::default;
    std::thread::scope(|scope| {
        // It was accepted before the pause, and ends the first to have its place.
        assert!(doors.expect());
        scope.spawn(|| {
            assert!(doors.make_room(1, Duration::from_secs(3600)));
            let id = doors.enter(&second, false, None);
            doors.pause_here(id, &state).unwrap();
        });
        while !first.has_hung_up() {
            std::thread::yield_now();
        }
        // The first is paused before it leaves.
        scope.spawn(|| {
            while doors.is_open() {
                std::thread::yield_now();
            }
            doors.pause_here(id, &state).unwrap();
        });
        doors.begin_pause();
        let paused = doors.await_pause(Instant::now() + PATIENCE);
        doors.go_on();
        doors.leave(id);
        assert_eq!(paused, Ok(()));
    });
}
