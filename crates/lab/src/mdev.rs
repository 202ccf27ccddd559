//! One mediated device, made for a test and removed with it.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::kind::PARENTS;

/// How long a removal may wait for those who still hold the device, before the test is told.
const REMOVAL_MAX: Duration = Duration::from_secs(20);

/// A mediated device with a UUID of its own, so tests can make them side by side.
///
/// The kernel removes a device only when nobody has it open. Locals are dropped last made first, so
/// make the device before whatever opens it.
#[derive(Debug)]
pub struct Mdev {
    uuid: String,
    /// Its folder in sysfs.
    folder: PathBuf,
}

impl Mdev {
    /// Makes a device of the type `name` (`mtty-1`) of `parent` (`mtty`, `limosa`). Its device nodes are
    /// there when this returns.
    ///
    /// # Panics
    ///
    /// When the kernel refuses: no such parent or type, or all ports of the parent in use.
    pub fn create(parent: &str, name: &str) -> Self {
        let uuid = random_uuid();
        let create = Path::new(PARENTS).join(parent).join("mdev_supported_types").join(name).join("create");
        if let Err(error) = fs::write(&create, &uuid) {
            panic!("no {name} from {parent}: {}: {error}", create.display());
        }
        let folder = Path::new("/sys/bus/mdev/devices").join(&uuid);
        assert!(folder.exists(), "{name} was created, but {} is missing", folder.display());
        Self { uuid, folder }
    }

    /// The UUID by which it is found in `/sys/bus/mdev/devices`.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// The device node of its own, `/dev/vfio/devices/vfioN`.
    ///
    /// # Panics
    ///
    /// When it has none: the kernel was built without CONFIG_VFIO_DEVICE_CDEV.
    pub fn cdev(&self) -> PathBuf {
        let folder = self.folder.join("vfio-dev");
        let name = fs::read_dir(&folder).ok().and_then(|mut entries| entries.next()?.ok());
        let name = name.unwrap_or_else(|| panic!("no vfioN in {}", folder.display())).file_name();
        Path::new("/dev/vfio/devices").join(name)
    }

    /// The number of its IOMMU group; the group's node is `/dev/vfio/N`.
    ///
    /// # Panics
    ///
    /// When it is in none.
    pub fn group(&self) -> u32 {
        let link = self.folder.join("iommu_group");
        let group = fs::read_link(&link).unwrap_or_else(|error| panic!("{}: {error}", link.display()));
        let number = group.file_name().and_then(|name| name.to_str()?.parse().ok());
        number.unwrap_or_else(|| panic!("{} points to {}, no group", link.display(), group.display()))
    }

    /// Writes an attribute of its driver, a file in its sysfs folder (`limosa/size`).
    ///
    /// # Panics
    ///
    /// When the driver refuses the value or has no such attribute.
    pub fn set(&self, attribute: &str, value: impl ToString) {
        let (file, value) = (self.folder.join(attribute), value.to_string());
        if let Err(error) = fs::write(&file, &value) {
            panic!("`{value}` to {}: {error}", file.display());
        }
    }

    /// Reads an attribute of its driver, without the white space at its end.
    ///
    /// # Panics
    ///
    /// When the driver has no such attribute or does not let it be read.
    pub fn get(&self, attribute: &str) -> String {
        let file = self.folder.join(attribute);
        let value = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        value.trim_end().to_owned()
    }

    /// Begins to pull the device out: the kernel asks its users to let go of it and removes it when the
    /// last one has. What is received from the channel is the kernel's answer, given at that moment.
    pub fn unplug(&self) -> mpsc::Receiver<std::io::Result<()>> {
        let (answer, answers) = mpsc::channel();
        let file = self.folder.join("remove");
        // The write returns when the device is gone. Nobody need be waiting for it.
        thread::spawn(move || answer.send(fs::write(file, "1")).is_ok());
        answers
    }
}

impl Drop for Mdev {
    fn drop(&mut self) {
        if !self.folder.exists() {
            return;
        }
        let problem = match self.unplug().recv_timeout(REMOVAL_MAX) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "somebody still has it open".to_owned(),
        };
        let problem = format!("mediated device {} cannot be removed: {problem}", self.uuid);
        // A second panic would end all tests, and the first has the better reason.
        if thread::panicking() {
            eprintln!("{problem}");
        } else {
            panic!("{problem}");
        }
    }
}

/// A random UUID (RFC 9562, version 4).
pub(crate) fn random_uuid() -> String {
    let mut bytes = [0; 16];
    let random = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    random.unwrap_or_else(|error| panic!("/dev/urandom: {error}"));
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
}
