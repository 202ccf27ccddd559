//! A server of many devices that is replaced by one whose devices are others, and files that describe none.

use super::by_command::{Stranger, switch_over_by};
use super::*;

const STATE: &[&str] = &["state=1M"];

fn by_file(folder: &Folder, names: &[&str], more: &[&str]) -> Vec<String> {
    let devices: Vec<_> = names.iter().map(|name| (*name, STATE)).collect();
    let file = file(folder, "synthetic", &devices);
    let takeover = folder.text("takeover");
    let args = [&["-vv", "serve", "--config", &file, "--takeover", &takeover], more].concat();
    args.into_iter().map(String::from).collect()
}

#[test]
fn a_device_that_the_old_server_does_not_have_is_served_beside_those_that_it_has() {
    let folder = Folder::new();
    let old = start(&by_file(&folder, &["b"], &[]));
    old.line("listening on ");
    let client = connect(&folder, "b");
    set(&client, SCRATCH, 5);
    // Something that cannot be listened at ends the attempt while the old server serves.
    std::fs::write(folder.path("a"), "").unwrap();
    let refused = switch_over_by(&folder, &by_file(&folder, &["a", "b"], &[]));
    refused.fails(1, &["serves as before", &format!("device {}: ", folder.text("a")), "cannot listen"]);
    assert_eq!(get(&client, SCRATCH), 5);
    std::fs::remove_file(folder.path("a")).unwrap();
    let switched = switch_over_by(&folder, &by_file(&folder, &["a", "b"], &[]));
    let new = Stranger::of(&switched.document);
    old.end().ok();
    assert_eq!(get(&client, SCRATCH), 5, "it is the device that the client had");
    let fresh = connect(&folder, "a");
    assert_eq!((get(&fresh, SCRATCH), fresh.state().unwrap()), (0, State::Running));
    let guest = Guest::start(&fresh);
    guest.check(&fresh);
    guest.is_interrupted(&fresh);
    drop(new);
    assert!(!folder.path("a").exists() && !folder.path("b").exists());
}

#[test]
fn a_device_that_the_new_server_lacks_is_refused_by_name_while_it_has_a_client() {
    let folder = Folder::new();
    let old = start(&by_file(&folder, &["a", "b"], &[]));
    old.line("listening on ");
    let [a, b] = ["a", "b"].map(|name| connect(&folder, name));
    set(&b, SCRATCH, 6);
    let only_b = by_file(&folder, &["b"], &[]);
    let refused = switch_over_by(&folder, &only_b);
    refused.fails(1, &["serves as before", &format!("device {}: ", folder.text("a")), "a client uses it"]);
    assert_eq!((a.state().unwrap(), get(&b, SCRATCH)), (State::Running, 6));
    drop(a);
    // Its connection is over once another client has the device.
    drop(connect(&folder, "a"));
    let switched = (0..).map(|_| switch_over_by(&folder, &only_b)).find(|switched| {
        if switched.code != 0 {
            switched.fails(1, &["a client uses it"]);
        }
        switched.code == 0
    });
    let _new = Stranger::of(&switched.unwrap().document);
    old.end().ok();
    assert_eq!(get(&b, SCRATCH), 6);
    assert!(!folder.path("a").exists(), "the socket of a device that is dropped is removed");
}

#[test]
fn a_server_that_the_command_line_describes_is_replaced_by_one_with_a_file() {
    let scene = Scene::new(ONE, STATE);
    let old = scene.first("synthetic");
    let client = connect(&scene.folder, "device");
    set(&client, SCRATCH, 8);
    let switched = switch_over_by(&scene.folder, &by_file(&scene.folder, &["device", "second"], &[]));
    let _new = Stranger::of(&switched.document);
    old.end().ok();
    assert_eq!((get(&client, SCRATCH), get(&connect(&scene.folder, "second"), SCRATCH)), (8, 0));
}

#[test]
fn a_file_that_describes_no_server_is_refused_and_nothing_is_left() {
    let folder = Folder::new();
    let path = folder.text("devices.toml");
    let refused = |text: &[u8], code, parts: &[&str]| {
        std::fs::write(&path, text).unwrap();
        limosa(&["serve", "--config", &path]).fails(code, &[&[path.as_str()], parts].concat());
        assert!(!folder.path("a").exists());
    };
    let a = format!("[[device]]\nsocket = {:?}\nmodel = \"synthetic\"\n", folder.text("a"));
    refused(b"", 2, &["[[device]]"]);
    refused(b"[[device]]\n\xff", 2, &[":2:", "UTF-8"]);
    refused(&vec![b'\n'; (1 << 20) + 1], 2, &["1048576 bytes"]);
    refused(format!("{a}colour = 1\n").as_bytes(), 2, &[":4:", "`colour`", "`socket`", "`control`"]);
    refused(format!("{a}options = [\"state=none\"]\n").as_bytes(), 2, &[":4: options", "state"]);
    std::os::unix::fs::symlink(folder.path(""), folder.path("link")).unwrap();
    let again = format!("{a}[[device]]\nsocket = {:?}\nmodel = \"uart\"\n", folder.text("link/a"));
    refused(again.as_bytes(), 2, &[":5: ", "is taken by line 2"]);
    // A later device that cannot be served: the sockets of those before it are removed.
    std::fs::write(folder.path("taken"), "").unwrap();
    let taken = format!("{a}[[device]]\nsocket = {:?}\nmodel = \"uart\"\n", folder.text("taken"));
    std::fs::write(&path, taken).unwrap();
    limosa(&["serve", "--config", &path]).fails(3, &[&folder.text("taken"), "not a socket"]);
    assert!(!folder.path("a").exists());
    limosa(&["serve", "--config", &folder.text("nothing")]).fails(4, &["--config", &folder.text("nothing")]);
    limosa(&["serve", "uart", "--config", &path]).fails(2, &["--config"]);
    limosa(&["serve", "--socket", "a"]).fails(2, &["MODEL"]);
    limosa(&["serve", "uart"]).fails(2, &["--socket"]);
}
