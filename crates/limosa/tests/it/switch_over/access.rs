//! The mode and the group of a socket whose server is replaced.

use std::os::unix::fs::PermissionsExt;

use super::by_command::{Stranger, switch_over_by};
use super::*;
use crate::support::users::{OTHER, can_be_another, start_as_other};

/// A mode that was changed in the file was ignored.
#[test]
fn a_mode_that_changes_in_a_switch_over_is_given_to_the_socket() {
    let mut scene = Scene::new(ONE, &["state=1M"]);
    scene.options.push("block=64K".into());
    let server = scene.first("synthetic");
    let mode = || {
        let socket = std::fs::metadata(scene.folder.path("device")).unwrap();
        socket.permissions().mode() & 0o777
    };
    assert_eq!(mode(), 0o600);
    let to = |more: &[&str]| {
        let options: Vec<&str> = scene.own_options();
        switch_over_by(&scene.folder, &scene.serve("synthetic", &options, more))
    };
    let switched = to(&["--mode", "660"]);
    let second = Stranger::of(&switched.document);
    server.end().ok();
    assert_eq!(mode(), 0o660);
    // A change by another user stays, since the command line is the same.
    std::fs::set_permissions(scene.folder.path("device"), PermissionsExt::from_mode(0o666)).unwrap();
    let switched = to(&["--mode", "660"]);
    let third = Stranger::of(&switched.document);
    second.wait();
    assert_eq!(mode(), 0o666);
    let switched = to(&[]);
    let _fourth = Stranger::of(&switched.document);
    third.wait();
    assert_eq!(mode(), 0o600);
}

/// An ordinary user gives its socket to no group that it is not in, and the old server goes on with the one it has.
#[test]
fn a_group_that_may_not_be_given_in_a_switch_over_is_refused_by_name() {
    if !can_be_another("a_group_that_may_not_be_given_in_a_switch_over_is_refused_by_name") {
        return;
    }
    let folder = Folder::new().open_to_all();
    let others = folder.others("theirs");
    let [device, takeover] = ["device", "takeover"].map(|name| format!("{others}/{name}"));
    let args = ["serve", "synthetic", "-o", "state=64K", "--socket", &device, "--takeover", &takeover];
    let server = start_as_other(&args);
    server.line("listening on");
    let mode = || std::fs::metadata(&device).unwrap().permissions().mode() & 0o777;
    let client = Client::connect(&device, Options { server_users: None, ..Options::default() }).unwrap();
    let refused =
        start_as_other(&[&args[..], &["--take-from", &takeover, "--mode", "660", "--group", "0"]].concat());
    refused
        .end()
        .fails(3, &[&device, "cannot give its socket another mode or group", &OTHER.to_string(), "group 0"]);
    assert_eq!((mode(), client.state().unwrap()), (0o600, State::Running));
    // A mode alone may be given.
    let next = start_as_other(&[&args[..], &["--take-from", &takeover, "--mode", "660"]].concat());
    next.line("listening on");
    server.end().ok();
    assert_eq!((mode(), client.state().unwrap()), (0o660, State::Running));
    next.signal(Signal::TERM);
    next.end().ok();
}
