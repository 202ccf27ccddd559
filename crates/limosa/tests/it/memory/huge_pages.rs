//! Memory of huge pages.

use std::path::Path;

use limosa_migrate::{FilePages, GuestPages};
use limosa_testing::proc_path;
use rustix::fs::MemfdFlags;

use super::{PAGE, Writer, memory};
use crate::support::pair::Pair;
use crate::support::users::let_others_borrow;
use crate::support::{Folder, limosa, start, start_by};

const HUGE: u64 = 2 << 20;

/// This number of huge pages of 2 MiB that no process has. The reservation is as it was before when this is dropped.
struct HugePages(Option<String>);

impl HugePages {
    const COUNT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

    fn reserve(wanted: u64) -> Result<HugePages, String> {
        let path = |name: &str| format!("{}/{name}", HugePages::COUNT);
        let read = |name: &str| -> Result<u64, String> {
            let text = std::fs::read_to_string(path(name)).map_err(|error| format!("{name}: {error}"))?;
            text.trim().parse().map_err(|_| format!("{name}: {text}"))
        };
        let free = || Ok::<u64, String>(read("free_hugepages")?.saturating_sub(read("resv_hugepages")?));
        if free()? >= wanted {
            return Ok(HugePages(None));
        }
        let before = read("nr_hugepages")?;
        let more = (before + wanted - free()?).to_string();
        std::fs::write(path("nr_hugepages"), more).map_err(|error| format!("nr_hugepages: {error}"))?;
        let reserved = HugePages(Some(before.to_string()));
        match free()? {
            free if free >= wanted => Ok(reserved),
            free => Err(format!("{wanted} huge pages are needed, {free} can be had")),
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = std::fs::write(format!("{}/nr_hugepages", HugePages::COUNT), before);
        }
    }
}

/// Memory of huge pages, reserved when it is touched.
fn huge(pages: u64) -> (std::fs::File, FilePages, String) {
    let_others_borrow();
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = std::fs::File::from(rustix::fs::memfd_create("guest", flags).unwrap());
    file.set_len(pages * HUGE).unwrap();
    let name = proc_path(&file);
    // There is no write to such a file but by a mapping.
    let mapped = FilePages::mapped(file.try_clone().unwrap(), 0, pages * HUGE).unwrap();
    (file, mapped, format!("{name}@0"))
}

#[test]
fn huge_pages_that_are_missing_were_found_out_in_the_midst_of_a_move() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let Ok(file) = rustix::fs::memfd_create("guest", flags) else {
        eprintln!("not tested, as this system has no huge pages of 2 MiB");
        return;
    };
    let file = std::fs::File::from(file);
    let name = proc_path(&file);
    let pair = Pair::new(&[], &[]);
    let from = pair.folder.text("from");
    // More than any machine has.
    let bytes = HUGE << 22;
    std::fs::File::create(&from).unwrap().set_len(bytes).unwrap();
    file.set_len(bytes).unwrap();
    let (here, there) = (format!("{from}@0"), format!("{name}@0"));
    let few = ["needs up to 4194304 huge pages of 2048 KiB", "are free", "nr_hugepages", name.as_str()];
    pair.migrate(&["--memory", &here, &there, "--guest-stopped"]).fails(3, &few);
    let link = format!("unix:{}", pair.folder.text("link"));
    limosa(&["receive", &pair.destination.socket, "--listen", &link, "--memory", &there]).fails(3, &few);
    pair.is_as_before();
}

#[test]
fn a_length_that_is_not_whole_huge_pages_was_an_invalid_argument() {
    let pair = Pair::new(&[], &[]);
    let mount = pair.folder.path("huge");
    std::fs::create_dir(&mount).unwrap();
    let from = memory(&pair.folder, "from", 768);
    let odd = mount.join("odd");
    // Mounted where nobody else sees it, which only root may.
    let script = "mount -t hugetlbfs -o pagesize=2M none \"$0\" || exit 99; \"$@\"; code=$?; \
                  [ -z \"$(ls -A \"$0\")\" ] || exit 98; exit $code";
    let mounted = ["--mount", "bash", "-c", script, mount.to_str().unwrap()];
    let (here, there) = (format!("{from}@0"), format!("{}@0,size=3M,create", odd.display()));
    let ended =
        start_by("unshare", &mounted, &pair.migration(&["--guest-stopped", "--memory", &here, &there]));
    let ended = ended.end();
    if ended.code == 99 || ended.err.starts_with("unshare: ") {
        eprintln!("passed over: this user may not mount, or there are no huge pages: {}", ended.err);
        return;
    }
    ended.fails(3, &["huge pages of 2048 KiB", "3145728 bytes are not whole ones", odd.to_str().unwrap()]);
    pair.is_as_before();
}

#[test]
fn memory_of_huge_pages_moves() {
    const PAGES: u64 = 4;
    let _reserved = match HugePages::reserve(2 * PAGES) {
        Ok(reserved) => reserved,
        Err(why) => {
            eprintln!("not tested, as this machine has no huge pages to give: {why}");
            return;
        }
    };
    let (_here_file, here, from) = huge(PAGES);
    let (_there_file, there, to) = huge(PAGES);
    let read = |pages: &FilePages| {
        let mut all = vec![0; (PAGES * HUGE) as usize];
        pages.read(0, &mut all).unwrap();
        all
    };
    here.write(3 * PAGE, &[1; 5000]).unwrap();
    here.write(2 * HUGE - 7, &[2; 20]).unwrap();
    there.write(HUGE, &[9; 10_000]).unwrap();
    limosa(&["migrate", "--memory", &from, &to, "--guest-stopped"]).ok();
    assert!(read(&here) == read(&there));
    // With a guest that might write, whose changes are found by comparing, over links and compressed.
    let folder = Folder::new();
    let other = memory(&folder, "other", 16);
    let writer = Writer::start(Path::new(&other));
    here.write(3 * HUGE + 100, &[3; 100_000]).unwrap();
    here.write(0, &[0; 8 * PAGE as usize]).unwrap();
    let link = format!("unix:{}", folder.text("link"));
    let receiver = start(&["receive", "--listen", &link, "--memory", &to]);
    receiver.line("listening on");
    let send = ["send", "--to", &link, "--memory", &from, "--stop-with", &writer.pid()];
    limosa(&[&send[..], &["--links", "2", "--compress", "lz4"]].concat()).ok();
    receiver.end().ok();
    assert!(read(&here) == read(&there));
    let file = folder.text("snapshot");
    limosa(&["save", &file, "--memory", &from, "--guest-stopped"]).ok();
    there.write(3 * HUGE, &[4; 4096]).unwrap();
    limosa(&["load", &file, "--memory", &to]).ok();
    assert!(read(&here) == read(&there));
}
