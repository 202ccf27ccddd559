//! The processes that are admitted as the next client, and those that are not.

use super::*;

#[test]
fn nobody_is_admitted_who_was_not_named() {
    let served = Served::new();
    let mut first = served.peer();
    let mut second = Raw::connect(served.path());
    let id = second.ask(VERSION, &version());
    first.assert_usable();
    let other = Other::start();
    name(&mut first, other.pid()).ok();
    assert_eq!(named(&mut first), (other.pid(), 0));
    first.assert_usable();
    assert!(!second.has_something(), "another process was named");
    // It waits already when it is named.
    name(&mut first, this_process()).ok();
    let reply = second.receive().ok();
    assert_eq!(reply.id, id);
    assert_eq!(named(&mut second), (this_process(), THERE | THIS));
    // One at a time.
    let mut third = Raw::connect(served.path());
    third.ask(VERSION, &version());
    first.assert_usable();
    assert!(!third.has_something());
    assert_eq!(name(&mut first, other.pid()).refused(), EBUSY);
    drop(first);
    until("the device is the second's", || named(&mut second) == (0, 0));
    assert!(!third.has_something(), "the name was for one");
    let ended = other.pid();
    drop(other);
    assert_eq!(name(&mut second, ended).refused(), ESRCH);
    for (pid, flags) in [(-1, 0u32), (i32::MIN, 0), (i32::MAX, 0)] {
        assert_eq!(second.feature(SET | NEXT, &bytes![pid, flags], 16).refused(), ESRCH);
    }
    assert_eq!(second.feature(SET | NEXT, &bytes![this_process(), 1u32], 16).refused(), EINVAL);
    assert_eq!(second.feature(SET | NEXT, &[0; 7], 16).refused(), EINVAL);
    drop(second);
    third.receive().ok();
}

/// A VMM in a process of its own, which says when it was admitted and writes to BAR0 at each line that it reads.
fn vmm_in_a_process(path: &Path) -> Process {
    let mut command = this_test("admission::vmms_are_told_apart_by_their_processes");
    Process::start_with_input(command.env(VMM_OF, path), Stdio::piped())
}

const VMM_OF: &str = "LIMOSA_TEST_VMM_OF";

#[test]
fn vmms_are_told_apart_by_their_processes() {
    if let Some(path) = std::env::var_os(VMM_OF) {
        let mut vmm = Raw::connect(Path::new(&path));
        vmm.socket.set_read_timeout(None).unwrap();
        println!("connected");
        vmm.negotiate();
        println!("admitted");
        for line in std::io::stdin().lines() {
            vmm.region_write(BAR0, 0, line.unwrap().as_bytes()).ok();
            println!("written");
        }
        return;
    }
    let served = Served::new();
    let mut first = served.peer();
    let mut others: Vec<_> = (0..3).map(|_| vmm_in_a_process(served.path())).collect();
    for other in &others {
        other.line("connected");
    }
    let pid = |process: &Process| process.pid().parse::<i32>().unwrap();
    for _ in 0..2 {
        // It is killed while it prepares; the others wait on, and its name is nobody's.
        let mut named_one = others.pop().unwrap();
        let its = pid(&named_one);
        name(&mut first, its).ok();
        named_one.line("admitted");
        named_one.say("his!");
        assert_eq!(named(&mut first), (its, THERE));
        named_one.kill();
        until("it is forgotten", || named(&mut first) == (its, 0));
        assert_eq!(name(&mut first, its).refused(), ESRCH);
        assert_eq!(&first.region_read(BAR0, 0, 4).ok().body[16..], [0; 4]);
    }
    let mut last = others.pop().unwrap();
    assert!(!last.out().contains("admitted"));
    name(&mut first, pid(&last)).ok();
    last.line("admitted");
    last.say("mine");
    let mut control = Raw::control(served.path());
    until("it is there", || named(&mut control) == (pid(&last), THERE));
    drop(first);
    last.line("written");
    assert_eq!(named(&mut control), (0, 0));
    drop(last);
    let mut again = served.peer();
    assert_eq!(&again.region_read(BAR0, 0, 4).ok().body[16..], b"mine");
}

#[test]
fn a_process_that_has_ended_keeps_nobody_out_and_lends_its_name_to_nobody() {
    let served = Served::new();
    let mut first = served.peer();
    let other = Other::start();
    name(&mut first, other.pid()).ok();
    drop(other);
    let mut second = Raw::connect(served.path());
    second.ask(VERSION, &version());
    first.assert_usable();
    assert!(!second.has_something());
    drop(first);
    second.receive().ok();
    second.assert_usable();
    assert_eq!(
        named(&mut second),
        (0, 0),
        "who was to come after the first is not who comes after the second"
    );
}

#[test]
fn control_names_the_next_client_and_takes_the_name_back() {
    let served = Served::new();
    let mut control = Raw::control(served.path());
    assert_eq!(name(&mut control, this_process()).refused(), ENOTCONN, "there is nothing to inherit");
    assert_eq!(control.feature(PROBE | GET | SET | NEXT, &[], 8).flags, REPLY);
    name(&mut control, 0).ok();
    let mut first = served.peer();
    name(&mut control, this_process()).ok();
    let next = served.peer();
    assert_eq!(named(&mut control), (this_process(), THERE));
    name(&mut control, 0).ok();
    next.expect_end();
    until("it is forgotten", || named(&mut control) == (0, 0));
    first.assert_usable();
    // By the real client.
    let client =
        Client::connect(served.path(), ClientOptions { role: Role::Control, ..ClientOptions::default() });
    let client = client.unwrap();
    client.name_next(Some(this_process())).unwrap();
    assert_eq!(client.next_vmm().unwrap().pid, Some(this_process()));
    client.name_next(None).unwrap();
    assert_eq!(client.next_vmm().unwrap(), NextVmm::default());
    let refused = client.name_next(Some(i32::MAX)).unwrap_err();
    assert!(matches!(&refused, Error::Refused { errno: Errno::ESRCH, .. }), "{refused}");
    assert!(refused.to_string().contains("no such process"), "{refused}");
}

#[test]
fn the_next_client_is_of_the_vmms_user() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: it needs a second user, and so root");
        return;
    }
    let options =
        Options { socket: SocketAccess { mode: 0o666, ..SocketAccess::default() }, ..Options::default() };
    let served = Served::with(TestDevice::new().machine(), options);
    std::fs::set_permissions(served.path().parent().unwrap(), std::fs::Permissions::from_mode(0o755))
        .unwrap();
    let path = served.path();
    let (mut first, mut control) = (as_another(|| served.peer()), Raw::control(path));
    name(&mut control, this_process()).ok();
    // Root is not the VMM's user.
    let mut of_root = Raw::connect(path);
    of_root.ask(VERSION, &version());
    first.assert_usable();
    assert!(!of_root.has_something());
    assert_eq!(named(&mut control), (this_process(), 0));
    let mut next = as_another(|| served.peer());
    assert_eq!(named(&mut next), (this_process(), THERE | THIS));
    drop(first);
    until("the device is its own", || named(&mut next) == (0, 0));
    next.region_write(BAR0, 0, b"mine").ok();
    assert!(!of_root.has_something());
}
