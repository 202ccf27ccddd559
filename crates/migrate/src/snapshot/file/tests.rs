use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::{Mode, Stat, mkfifoat};

use super::*;

/// A request to a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Exchange,
    Rename,
    RenameNew,
    Link,
    Remove,
    Stat,
    Sync,
}

/// The effect of a request instead of its work.
#[derive(Clone, Copy)]
struct Fault {
    request: Request,
    errno: Errno,
    /// The request is carried out, and fails all the same.
    carried_out: bool,
}

/// A folder whose requests fail as planned.
struct Faulty {
    folder: OpenFolder,
    faults: Arc<Mutex<Vec<Fault>>>,
    /// A name has been asked for: only from then on a look fails.
    renamed: AtomicBool,
}

impl Faulty {
    fn new(path: &Path, faults: &Arc<Mutex<Vec<Fault>>>) -> Faulty {
        let folder = OpenFolder::of(path).unwrap();
        Faulty { folder, faults: Arc::clone(faults), renamed: AtomicBool::new(false) }
    }

    fn request<T>(&self, request: Request, act: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        let fault = self.faults.lock().unwrap().iter().find(|fault| fault.request == request).copied();
        match fault {
            None => act(),
            Some(Fault { errno, carried_out, .. }) => {
                if carried_out {
                    act()?;
                }
                Err(errno)
            }
        }
    }
}

impl Folder for Faulty {
    fn create(&self, name: &OsStr) -> Result<File, Errno> {
        self.folder.create(name)
    }

    fn rename(&self, from: &OsStr, to: &OsStr, flags: RenameFlags) -> Result<(), Errno> {
        let request = match flags {
            RenameFlags::EXCHANGE => Request::Exchange,
            RenameFlags::NOREPLACE => Request::RenameNew,
            _ => Request::Rename,
        };
        self.renamed.store(true, Ordering::Relaxed);
        self.request(request, || self.folder.rename(from, to, flags))
    }

    fn link(&self, from: &OsStr, to: &OsStr) -> Result<(), Errno> {
        self.request(Request::Link, || self.folder.link(from, to))
    }

    fn remove(&self, name: &OsStr) -> Result<(), Errno> {
        self.request(Request::Remove, || self.folder.remove(name))
    }

    fn stat(&self, name: &OsStr) -> Result<Stat, Errno> {
        match self.renamed.load(Ordering::Relaxed) {
            true => self.request(Request::Stat, || self.folder.stat(name)),
            false => self.folder.stat(name),
        }
    }

    fn sync(&self, file: &File) -> Result<(), Errno> {
        self.request(Request::Sync, || self.folder.sync(file))
    }
}

const LIMIT: Duration = Duration::from_secs(60);

fn fail(request: Request, errno: Errno) -> Fault {
    Fault { request, errno, carried_out: false }
}

/// A folder with a file of this name, or with none.
fn folder(old: Option<&str>) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("snapshot");
    if let Some(old) = old {
        std::fs::write(&path, old).unwrap();
    }
    (folder, path)
}

/// Publishes "new", with these faults from the publication on.
fn publish(path: &Path, faults: &[Fault]) -> Publication {
    let replace = path.exists();
    let planned = Arc::default();
    let folder = Faulty::new(path, &planned);
    let file = SnapshotFile::new(path).replacing(replace);
    let mut writer = Box::new(file.create_in(Box::new(folder)).unwrap());
    let wait = Wait::within(LIMIT, None);
    assert_eq!(writer.write(b"new", wait).unwrap(), 3);
    planned.lock().unwrap().extend_from_slice(faults);
    writer.publish(wait)
}

fn names(folder: &tempfile::TempDir) -> Vec<String> {
    let entries = std::fs::read_dir(folder.path()).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn contents(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

fn is_durable(publication: &Publication) -> bool {
    matches!(publication, Publication::Published { durability: Durability::Durable })
}

#[test]
fn a_replaced_snapshot_and_the_new_one_were_both_deleted_where_the_folder_could_not_be_synchronized() {
    for errno in [Errno::IO, Errno::ROFS, Errno::BADF, Errno::NOSPC] {
        let (folder, path) = folder(Some("old"));
        let published = publish(&path, &[fail(Request::Sync, errno)]);
        let Publication::Published { durability: Durability::Unknown(error) } = published else {
            panic!("{errno}: {published:?}")
        };
        assert_eq!(contents(&path), "new", "{errno}");
        // The old one is kept, and named.
        let names = names(&folder);
        assert_eq!(names.len(), 2, "{errno}: {names:?}");
        assert!(error.to_string().contains(&names[0]), "{error}");
        assert_eq!(contents(&folder.path().join(&names[0])), "old");
    }
}

#[test]
fn a_new_snapshot_was_deleted_where_the_folder_could_not_be_synchronized() {
    let (folder, path) = folder(None);
    let published = publish(&path, &[fail(Request::Sync, Errno::IO)]);
    assert!(
        matches!(published, Publication::Published { durability: Durability::Unknown(_) }),
        "{published:?}"
    );
    assert_eq!((contents(&path).as_str(), names(&folder)), ("new", vec!["snapshot".to_owned()]));
}

#[test]
fn a_snapshot_on_a_file_system_that_synchronizes_no_folders_was_refused() {
    for old in [None, Some("old")] {
        for errno in [Errno::INVAL, Errno::NOTSUP] {
            let (folder, path) = folder(old);
            let published = publish(&path, &[fail(Request::Sync, errno)]);
            assert!(is_durable(&published), "{old:?} {errno}: {published:?}");
            assert_eq!((contents(&path).as_str(), names(&folder)), ("new", vec!["snapshot".to_owned()]));
        }
    }
}

#[test]
fn a_replaced_file_that_could_not_be_removed_made_a_published_snapshot_a_failure() {
    let (folder, path) = folder(Some("old"));
    let published = publish(&path, &[fail(Request::Remove, Errno::PERM)]);
    assert!(is_durable(&published), "{published:?}");
    assert_eq!((contents(&path).as_str(), names(&folder).len()), ("new", 2));
}

#[test]
fn a_second_name_that_could_not_be_removed_made_a_linked_snapshot_a_failure() {
    let (folder, path) = folder(None);
    let faults = [fail(Request::RenameNew, Errno::INVAL), fail(Request::Remove, Errno::PERM)];
    let published = publish(&path, &faults);
    assert!(is_durable(&published), "{published:?}");
    assert_eq!((contents(&path).as_str(), names(&folder).len()), ("new", 2));
}

#[test]
fn a_file_system_that_lacks_an_exchange_or_a_rename_that_replaces_nothing_is_served_otherwise() {
    for errno in [Errno::INVAL, Errno::NOSYS, Errno::NOTSUP] {
        for (old, request) in [(Some("old"), Request::Exchange), (None, Request::RenameNew)] {
            let (folder, path) = folder(old);
            let published = publish(&path, &[fail(request, errno)]);
            assert!(is_durable(&published), "{errno} {request:?}: {published:?}");
            assert_eq!((contents(&path).as_str(), names(&folder)), ("new", vec!["snapshot".to_owned()]));
        }
    }
}

#[test]
fn a_rename_that_failed_and_left_everything_as_it_was_is_no_publication() {
    for (old, request) in [(Some("old"), Request::Exchange), (None, Request::RenameNew)] {
        let (folder, path) = folder(old);
        let published = publish(&path, &[fail(request, Errno::IO)]);
        assert!(matches!(published, Publication::NotPublished(_)), "{published:?}");
        assert_eq!(names(&folder).len(), usize::from(old.is_some()));
        assert!(old.is_none_or(|old| contents(&path) == old));
    }
}

#[test]
fn a_rename_that_was_carried_out_and_reported_an_error_was_taken_for_a_failure() {
    for (old, request) in [(Some("old"), Request::Exchange), (None, Request::RenameNew)] {
        let (folder, path) = folder(old);
        let fault = Fault { request, errno: Errno::IO, carried_out: true };
        let published = publish(&path, &[fault]);
        assert!(is_durable(&published), "{published:?}");
        assert_eq!((contents(&path).as_str(), names(&folder)), ("new", vec!["snapshot".to_owned()]));
    }
}

#[test]
fn a_rename_of_which_nothing_can_be_learned_is_unknown_and_nothing_is_deleted() {
    for (old, request) in [(Some("old"), Request::Exchange), (None, Request::RenameNew)] {
        for carried_out in [false, true] {
            let (folder, path) = folder(old);
            let rename = Fault { request, errno: Errno::IO, carried_out };
            let published = publish(&path, &[rename, fail(Request::Stat, Errno::STALE)]);
            let Publication::Unknown(why) = published else { panic!("{published:?}") };
            let mut files: Vec<_> =
                names(&folder).iter().map(|name| contents(&folder.path().join(name))).collect();
            files.sort();
            assert_eq!(files, [&["new"], old.as_slice()].concat(), "both are there, under either name");
            assert_eq!(path.exists(), old.is_some() || carried_out);
            assert!(why.to_string().contains(".partial is left as it is"), "{why}");
        }
    }
}

#[test]
fn a_file_that_cannot_be_synchronized_is_not_published() {
    let (folder, path) = folder(Some("old"));
    let file = SnapshotFile::new(&path).replacing(true);
    let mut writer = Box::new(file.create_in(Box::new(OpenFolder::of(&path).unwrap())).unwrap());
    // fsync refuses a pipe (`fsync(2)`: EINVAL).
    let (_, pipe) = rustix::pipe::pipe().unwrap();
    writer.file = pipe.into();
    let published = writer.publish(Wait::within(LIMIT, None));
    assert!(matches!(published, Publication::NotPublished(LinkError::Io(_))), "{published:?}");
    assert_eq!((contents(&path).as_str(), names(&folder)), ("old", vec!["snapshot".to_owned()]));
}

#[test]
fn a_folder_that_was_renamed_while_a_snapshot_was_written_has_the_snapshot_all_the_same() {
    let outer = tempfile::tempdir().unwrap();
    let (before, after) = (outer.path().join("before"), outer.path().join("after"));
    std::fs::create_dir(&before).unwrap();
    let mut writer = SnapshotFile::new(before.join("snapshot")).create(Wait::within(LIMIT, None)).unwrap();
    writer.write(b"new", Wait::within(LIMIT, None)).unwrap();
    std::fs::rename(&before, &after).unwrap();
    std::fs::create_dir(&before).unwrap();
    let published = writer.publish(Wait::within(LIMIT, None));
    assert!(is_durable(&published), "{published:?}");
    assert_eq!(contents(&after.join("snapshot")), "new");
    assert_eq!(std::fs::read_dir(&before).unwrap().count(), 0);
}

#[test]
fn what_is_no_regular_file_was_replaced_or_followed() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("precious"), "precious").unwrap();
    symlink(at("precious"), at("link")).unwrap();
    symlink(at("nowhere"), at("dangling")).unwrap();
    std::fs::create_dir(at("folder")).unwrap();
    mkfifoat(rustix::fs::CWD, at("fifo"), Mode::RUSR).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    let before = names(&folder);
    for (name, what, advice) in [
        ("link", "a symbolic link", "name the file that it points to"),
        ("dangling", "a symbolic link", "name the file that it points to"),
        ("folder", "a directory", "choose another name"),
        ("fifo", "a FIFO", "choose another name"),
        ("socket", "a socket", "choose another name"),
        ("/dev/null", "a character device", "choose another name"),
    ] {
        for replace in [false, true] {
            let file = SnapshotFile::new(at(name)).replacing(replace);
            let Err(why) = file.create(Wait::within(LIMIT, None)) else { panic!("{name}: not refused") };
            let why = why.to_string();
            assert!(why.contains(what) && why.contains(advice), "{name}: {why}");
        }
    }
    assert_eq!(names(&folder), before);
    assert_eq!(contents(&at("precious")), "precious");
}

#[test]
fn a_link_that_takes_the_name_while_a_snapshot_is_written_is_refused() {
    let (folder, path) = folder(Some("old"));
    let precious = folder.path().join("precious");
    std::fs::write(&precious, "precious").unwrap();
    let file = SnapshotFile::new(&path).replacing(true);
    let writer = file.create(Wait::within(LIMIT, None)).unwrap();
    std::fs::remove_file(&path).unwrap();
    symlink(&precious, &path).unwrap();
    let published = writer.publish(Wait::within(LIMIT, None));
    assert!(matches!(published, Publication::NotPublished(_)), "{published:?}");
    assert_eq!((contents(&precious).as_str(), names(&folder).len()), ("precious", 2));
}

#[test]
fn a_snapshot_that_replaced_a_file_that_all_could_read_was_readable_by_all() {
    let (_folder, path) = folder(Some("old"));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    assert!(is_durable(&publish(&path, &[])));
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o177, 0);
}

/// The preface of a move, as much of a stream as names it.
fn preface(id: MigrationId) -> [u8; PREFACE_BYTES] {
    Preface::new(id, limosa_stream::PrefaceFlags::STORED).encode()
}

#[test]
fn only_the_file_of_the_move_under_its_temporary_name_proves_that_it_was_not_published() {
    let (folder, path) = folder(None);
    let (mine, other) = (MigrationId([1; 16]), MigrationId([2; 16]));
    let file = SnapshotFile::new(&path);
    let withdraw = || file.withdraw(mine, Wait::within(LIMIT, None)).unwrap();
    // As it would be on another file system, or after somebody has cleaned up.
    assert!(!withdraw());
    std::fs::write(folder.path().join(".snapshot.x.partial"), preface(other)).unwrap();
    std::fs::write(folder.path().join(".snapshot.y.partial"), "short").unwrap();
    std::fs::write(folder.path().join(".another.z.partial"), preface(mine)).unwrap();
    assert!(!withdraw());
    let partial = folder.path().join(".snapshot.z.partial");
    std::fs::write(&partial, [&preface(mine)[..], &[7; 1000]].concat()).unwrap();
    for _ in 0..2 {
        assert!(withdraw(), "a later process finds the same");
        assert_eq!(std::fs::read(&partial).unwrap(), preface(mine), "what is left takes no room");
    }
}
