//! What the lab says while it fetches the packages of its QEMU, with an apt that is a script of this test's.

use std::fs;
use std::process::Command;

use limosa_testing::{Process, program};

/// Says what it would fetch, and fetches half of it. The rest waits until the test says so.
const APT: &str = r#"#!/bin/bash
case "$*" in
*indextargets*) echo "stable stable stable main http://mirror" ;;
*--print-uris*) printf "Reading...\n'http://mirror/a.deb' a.deb 3145728 SHA256:0\n'http://mirror/b.deb' b.deb 2097152 SHA256:0\n" ;;
*update*) ;;
*install*)
    for option in "$@"; do case $option in Dir::Cache::Archives=*) archives=${option#*=} ;; esac; done
    head -c 2621440 /dev/zero >"$archives/a.deb"
    cat "$LIMOSA_LAB/go-on" >/dev/null
    ;;
esac
"#;

/// An empty package.
const DPKG: &str = "#!/bin/bash\ntar -cf - -T /dev/null\n";

#[test]
fn the_lab_was_silent_while_it_fetched_qemu() {
    let folder = tempfile::tempdir().unwrap();
    let (lab, bin) = (folder.path().join("lab"), folder.path().join("bin"));
    fs::create_dir_all(&lab).unwrap();
    fs::create_dir_all(&bin).unwrap();
    program(&bin.join("apt-get"), APT);
    program(&bin.join("dpkg"), DPKG);
    let go_on = lab.join("go-on");
    rustix::fs::mknodat(rustix::fs::CWD, &go_on, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../lab/archive");
    let mut command = Command::new("bash");
    command.args([script, "closure", "bookworm"]).arg(folder.path().join("out")).arg("qemu-system-x86");
    let process = Process::start(command.env("PATH", path).env("LIMOSA_LAB", &lab));
    process.line("reading Debian's list of the packages of bookworm");
    process.line("fetching qemu-system-x86 and what it needs: 2 packages of Debian, 5 MiB");
    // Half of it is there, and it is said before all of it is.
    process.line("50 % of 5 MiB");
    fs::write(&go_on, "").unwrap();
    process.end().ok();
}
