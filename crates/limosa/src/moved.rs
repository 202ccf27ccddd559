//! Devices that were moved from here, or saved to run elsewhere: a note of the last move of each device, to distinguish a moved
//! device in STOP from a paused one.

use limosa_migrate::PrivateFolder;
use serde::{Deserialize, Serialize};

use crate::moves::{Halted, Moves};
use crate::open;

/// The end of a note's name, after the move's id.
const MOVED: &str = ".moved";
/// The number of notes that are kept, each of another device.
const KEPT: usize = 64;

/// The note of a move that is done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Moved {
    pub id: String,
    #[serde(flatten)]
    pub halted: Halted,
    /// Where it went: an address, the place of a snapshot, or devices on this machine.
    pub to: String,
    /// Whether this is a save.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub saved: bool,
}

impl Moved {
    /// Whether it is one of the moved devices, and not another device with the same name.
    fn is_of(&self, name: &str) -> bool {
        let Some(identity) = open::identity(name) else { return false };
        (0..self.halted.devices.len()).any(|at| self.halted.known(at).identity.as_ref() == Some(&identity))
    }

    fn shares_a_device_with(&self, other: &Moved) -> bool {
        let known = |moved: &Moved, at| moved.halted.known(at).identity;
        (0..self.halted.devices.len()).any(|at| {
            known(self, at).is_some_and(|identity| {
                (0..other.halted.devices.len()).any(|at| known(other, at).as_ref() == Some(&identity))
            })
        })
    }
}

impl Moves {
    /// Notes a move that is done. It is a help for later, and nothing depends on it.
    pub fn remember(&self, moved: &Moved) {
        let remembered = self.open().and_then(|folder| {
            let note = Moved { halted: moved.halted.clone().now(), ..moved.clone() };
            folder.write(format!("{}{MOVED}", note.id), &serde_json::to_vec(&note)?)?;
            let mut others = read(&folder)?;
            others.retain(|other| other.id != note.id);
            let is_kept =
                |other: &Moved| !other.halted.is_of_another_boot() && !other.shares_a_device_with(&note);
            let kept = others.iter().filter(|other| is_kept(other)).count();
            let mut too_many = (kept + 1).saturating_sub(KEPT);
            for other in &others {
                if is_kept(other) && too_many == 0 {
                    continue;
                }
                too_many -= usize::from(is_kept(other));
                folder.remove(format!("{}{MOVED}", other.id))?;
            }
            Ok(())
        });
        if let Err(error) = remembered {
            tracing::info!("move {} is not remembered: {error}", moved.id);
        }
    }

    /// The last move of this device, if it is noted.
    pub fn last(&self, name: &str) -> Option<Moved> {
        let folder = PrivateFolder::open(self.folder()).ok().flatten()?;
        read(&folder).ok()?.into_iter().rfind(|moved| moved.is_of(name))
    }
}

/// All notes that can be read, the oldest first.
fn read(folder: &PrivateFolder) -> std::io::Result<Vec<Moved>> {
    let mut notes: Vec<Moved> = Vec::new();
    for name in folder.names(MOVED)? {
        let bytes =
            folder.file(&name).and_then(|file| file.map(|file| folder.read(&name, &file)).transpose());
        notes.extend(bytes.ok().flatten().and_then(|bytes| serde_json::from_slice(&bytes).ok()));
    }
    notes.sort_by_key(|moved| moved.halted.age());
    Ok(notes)
}
