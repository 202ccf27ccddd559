//! Memory files on hugetlbfs: their pages can be written only through a mapping, are reserved by the system in advance, and may
//! be too few. All of that is checked before anything is moved.

use std::fmt;
use std::fs::{self, File};
use std::io;

use rustix::fs::fstatfs;

/// The magic number of hugetlbfs in statfs(2).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// The page size of a file on hugetlbfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePages(u64);

impl HugePages {
    /// Those of this file; `None` on another file system.
    pub fn of(file: &File) -> io::Result<Option<HugePages>> {
        let stat = fstatfs(file)?;
        Ok((stat.f_type as u64 == HUGETLBFS_MAGIC).then_some(HugePages(stat.f_bsize as u64)))
    }

    /// Why a file there cannot be made this long, if it cannot.
    pub fn refuse_length(self, bytes: u64) -> Option<String> {
        (!bytes.is_multiple_of(self.0)).then(|| {
            format!(
                "it is of huge pages of {self}, and {bytes} bytes are not whole ones; expected an offset and a size that \
                 end at a multiple of {}",
                self.0
            )
        })
    }

    /// Why this number of bytes of a file there cannot be mapped.
    pub fn why_not_mapped(self, bytes: u64, error: &io::Error) -> String {
        let wanted = bytes.div_ceil(self.0);
        if error.raw_os_error() != Some(rustix::io::Errno::NOMEM.raw_os_error()) {
            return format!("its huge pages cannot be mapped, and nothing else can write them: {error}");
        }
        let free = match self.free() {
            Some(free) => format!("{free} are free and not promised to others"),
            None => "too few are free".into(),
        };
        format!(
            "it needs up to {wanted} huge pages of {self}, and {free} (or its mount is limited to fewer); make more in \
             {}/nr_hugepages",
            self.folder()
        )
    }

    fn folder(self) -> String {
        format!("/sys/kernel/mm/hugepages/hugepages-{}kB", self.0 >> 10)
    }

    /// The number of pages that are still available.
    fn free(self) -> Option<u64> {
        let number = |name: &str| -> Option<u64> {
            fs::read_to_string(format!("{}/{name}", self.folder())).ok()?.trim().parse().ok()
        };
        let more = number("nr_overcommit_hugepages")?.saturating_sub(number("surplus_hugepages")?);
        Some(number("free_hugepages")?.saturating_sub(number("resv_hugepages")?) + more)
    }
}

impl fmt::Display for HugePages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} KiB", self.0 >> 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_huge_pages_have_them() {
        assert_eq!(HugePages::of(&tempfile::tempfile().unwrap()).unwrap(), None);
        let pages = HugePages(2 << 20);
        assert_eq!(pages.refuse_length(6 << 20), None);
        assert!(pages.refuse_length(5 << 20).unwrap().contains("huge pages of 2048 KiB, and 5242880 bytes"));
        let other = pages.why_not_mapped(1, &io::Error::from_raw_os_error(22));
        assert!(other.contains("Invalid argument"), "{other}");
    }
}
