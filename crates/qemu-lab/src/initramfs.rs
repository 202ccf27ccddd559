//! The root file system of a guest: one program, started as init, and the libraries that it needs.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use cpio::newc::{Builder, trailer};

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const DEVICE: u32 = 0o020_600;

/// Writes an archive in which `program` is `/init`.
///
/// # Panics
///
/// When something cannot be read or written.
pub(crate) fn write(archive: &Path, program: &Path) {
    let mut files = vec![(PathBuf::from("/init"), program.to_owned())];
    files.extend(libraries(program).into_iter().map(|library| (library.clone(), library)));
    let mut folders: BTreeSet<PathBuf> = ["/dev", "/proc", "/sys"].map(PathBuf::from).into();
    for (path, _) in &files {
        folders
            .extend(path.ancestors().skip(1).filter(|folder| folder.parent().is_some()).map(Path::to_owned));
    }
    let mut archive = File::create(archive).expect("an archive of ours");
    let mut inode = 0;
    let mut entry = |path: &Path, mode: u32| {
        inode += 1;
        let name = path.strip_prefix("/").expect("a path from the root");
        Builder::new(name.to_str().expect("a plain path")).ino(inode).nlink(1).mode(mode)
    };
    // In their order, in which a folder comes before what is in it.
    for folder in &folders {
        entry(folder, FOLDER).write(&mut archive, 0).finish().expect("an archive of ours");
    }
    entry(Path::new("/dev/console"), DEVICE)
        .rdev_major(5)
        .rdev_minor(1)
        .write(&mut archive, 0)
        .finish()
        .expect("an archive of ours");
    for (path, source) in &files {
        let data = fs::read(source).unwrap_or_else(|error| panic!("{}: {error}", source.display()));
        let size = u32::try_from(data.len()).expect("a program below 4 GiB");
        let mut writer = entry(path, PROGRAM).write(&mut archive, size);
        std::io::Write::write_all(&mut writer, &data).expect("an archive of ours");
        writer.finish().expect("an archive of ours");
    }
    trailer(&mut archive).expect("an archive of ours");
}

/// The shared libraries of a program, the loader among them, where they are found.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().expect("ldd is part of the C library");
    let text = String::from_utf8(output.stdout).expect("ldd prints text");
    assert!(output.status.success(), "ldd {}: {text}", program.display());
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}
