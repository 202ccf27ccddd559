//! Properties of a private folder.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use rustix::fs::mknodat;

use super::*;

struct Scene {
    folder: tempfile::TempDir,
    private: PrivateFolder,
}

impl Scene {
    fn new() -> Scene {
        let folder = tempfile::tempdir().unwrap();
        let private = PrivateFolder::create(&folder.path().join("state/moves")).unwrap();
        Scene { folder, private }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("state/moves").join(name)
    }

    #[track_caller]
    fn refuses(&self, name: &str, parts: &[&str]) {
        let error = self.private.file(name).unwrap_err().to_string();
        assert!(error.contains(self.path(name).to_str().unwrap()), "{error}");
        parts.iter().for_each(|part| assert!(error.contains(part), "{error}"));
    }
}

fn chmod(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_folder_is_made_with_its_parents_for_its_owner_alone() {
    let scene = Scene::new();
    for path in [scene.path(""), scene.folder.path().join("state")] {
        assert_eq!(std::fs::metadata(path).unwrap().mode() & 0o7777, 0o700);
    }
    assert!(PrivateFolder::open(&scene.folder.path().join("other")).unwrap().is_none());
    let below_a_file = scene.path("file/moves");
    std::fs::write(scene.path("file"), "").unwrap();
    let error = PrivateFolder::create(&below_a_file).unwrap_err().to_string();
    assert!(error.contains(below_a_file.to_str().unwrap()), "{error}");
}

#[test]
fn a_folder_that_others_may_write_to_was_believed() {
    let scene = Scene::new();
    for (mode, is_refused) in [(0o770, true), (0o702, true), (0o1777, true), (0o755, false)] {
        chmod(&scene.path(""), mode);
        match PrivateFolder::open(&scene.path("")) {
            Ok(_) => assert!(!is_refused, "{mode:o}"),
            Err(error) => {
                let text = error.to_string();
                assert!(is_refused && text.contains("chmod 700") && text.contains("moves"), "{text}");
            }
        }
    }
    let link = scene.folder.path().join("link");
    symlink(scene.path(""), &link).unwrap();
    assert!(PrivateFolder::open(&link).unwrap().is_some(), "a link of this user's is followed");
}

#[test]
fn a_file_appears_whole_for_its_owner_alone_and_is_locked_by_its_writer() {
    let scene = Scene::new();
    std::fs::write(scene.path(".a.partial"), "of a process that died").unwrap();
    let written = scene.private.write("a", b"one").unwrap();
    assert_eq!(std::fs::metadata(scene.path("a")).unwrap().mode() & 0o7777, 0o600);
    let read = scene.private.file("a").unwrap().unwrap();
    assert_eq!(scene.private.read("a", &read).unwrap(), b"one");
    assert_eq!(flock(&read, FlockOperation::NonBlockingLockExclusive), Err(Errno::WOULDBLOCK));
    drop(written);
    flock(&read, FlockOperation::NonBlockingLockExclusive).unwrap();
    drop(scene.private.write("a", b"two").unwrap());
    assert_eq!(std::fs::read(scene.path("a")).unwrap(), b"two");
    assert_eq!(scene.private.names("").unwrap(), ["a"], "nothing is left behind");
    assert!(scene.private.remove("a").unwrap() && !scene.private.remove("a").unwrap());
    assert!(scene.private.file("a").unwrap().is_none());
}

#[test]
fn a_folder_that_is_replaced_is_not_written_to() {
    let scene = Scene::new();
    let moved = scene.folder.path().join("elsewhere");
    std::fs::rename(scene.path(""), &moved).unwrap();
    std::fs::create_dir(scene.path("")).unwrap();
    drop(scene.private.write("a", b"one").unwrap());
    assert!(moved.join("a").exists() && !scene.path("a").exists());
}

#[test]
fn a_fifo_held_up_its_reader_and_links_were_followed() {
    let scene = Scene::new();
    mknodat(CWD, scene.path("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    symlink(scene.folder.path().join("target"), scene.path("link")).unwrap();
    std::fs::write(scene.folder.path().join("target"), "not here").unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(scene.path("socket")).unwrap();
    std::fs::create_dir(scene.path("folder")).unwrap();
    scene.refuses("fifo", &["a FIFO", "expected a regular file"]);
    scene.refuses("link", &["a symbolic link"]);
    scene.refuses("socket", &["a socket"]);
    scene.refuses("folder", &["a directory"]);
    for name in ["fifo", "link", "socket", "folder"] {
        assert!(scene.private.create_file(name).unwrap().is_none(), "{name}");
        assert!(scene.private.written_at(OsStr::new(name)).is_none(), "{name}");
    }
}

#[test]
fn a_file_that_other_users_may_open_was_believed() {
    let scene = Scene::new();
    drop(scene.private.write("a", b"one").unwrap());
    for mode in [0o644, 0o660, 0o606, 0o620] {
        chmod(&scene.path("a"), mode);
        scene.refuses("a", &[&format!("mode 0{mode:o}"), "chmod 600", "remove it"]);
    }
    chmod(&scene.path("a"), 0o600);
    assert!(scene.private.file("a").unwrap().is_some());
}

#[test]
fn a_file_of_any_length_was_read() {
    let scene = Scene::new();
    let file = scene.private.create_file("a").unwrap().unwrap();
    file.set_len(PrivateFolder::FILE_BYTES_MAX as u64).unwrap();
    let opened = scene.private.file("a").unwrap().unwrap();
    // It grows after it was opened.
    file.set_len(1 << 40).unwrap();
    assert_eq!(scene.private.read("a", &opened).unwrap().len(), PrivateFolder::FILE_BYTES_MAX);
    scene.refuses("a", &["1099511627776 bytes", "at most 1048576"]);
    let long = vec![0; PrivateFolder::FILE_BYTES_MAX + 1];
    assert!(scene.private.write("b", &long).unwrap_err().to_string().contains("at most"));
    assert!(!scene.path("b").exists());
}

#[test]
fn files_and_folders_of_other_users_were_believed() {
    if !geteuid().is_root() {
        eprintln!("not tested: only root can give a file to another user");
        return;
    }
    let scene = Scene::new();
    drop(scene.private.write("a", b"one").unwrap());
    std::os::unix::fs::chown(scene.path("a"), Some(65534), None).unwrap();
    scene.refuses("a", &["belongs to user 65534", "acts as user 0"]);
    let link = scene.folder.path().join("link");
    symlink(scene.path(""), &link).unwrap();
    std::os::unix::fs::lchown(&link, Some(65534), None).unwrap();
    std::os::unix::fs::chown(scene.path(""), Some(65534), None).unwrap();
    for path in [scene.path(""), link] {
        let error = PrivateFolder::create(&path).unwrap_err();
        let text = error.to_string();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{text}");
        assert!(text.contains(path.to_str().unwrap()) && text.contains("user 65534"), "{text}");
    }
}

#[test]
fn a_folder_without_fsync_is_no_failure_and_a_disk_that_fails_is() {
    for (errno, is_failure) in [(Errno::INVAL, false), (Errno::NOTSUP, false), (Errno::IO, true)] {
        assert_eq!(synced(Err(errno)).is_err(), is_failure, "{errno}");
    }
    synced(Ok(())).unwrap();
}

#[test]
fn a_check_for_room_leaves_nothing_behind() {
    let scene = Scene::new();
    scene.private.check_room(3, 5000).unwrap();
    assert_eq!(std::fs::read_dir(scene.path("")).unwrap().count(), 0);
    std::fs::remove_dir(scene.path("")).unwrap();
    let error = scene.private.check_room(1, 1).unwrap_err().to_string();
    assert!(error.contains(scene.path("").to_str().unwrap().trim_end_matches('/')), "{error}");
}
