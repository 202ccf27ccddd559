//! Commands that no server can obey: each is refused by a reply, and the connection goes on in step
//! (`vfio-user.rst: Header`: every command is replied to, a refusal by a header alone).

use limosa_vfio_user::codec::Command;

use super::on_connection;
use crate::check::{Check, Family, Needs, Verdict};
use crate::wire::Raw;

pub(super) fn checks() -> Vec<Check> {
    let unknown = |id, number: u16| {
        Check::new(Family::VfioUser, id, Needs::WIRE, &["wire.unknown", "wire.answered"], move |t| {
            refuses(&mut Raw::open(t)?, Command(number), &[])
        })
    };
    // The first byte of what each needs.
    let short = |command: Command, bytes: usize| {
        let name = command.name().unwrap_or_default().to_lowercase().replace('_', "-");
        let clauses = &["wire.short", "wire.answered"];
        Check::new(Family::VfioUser, format!("vfio-user.short-{name}"), Needs::WIRE, clauses, move |t| {
            refuses(&mut Raw::open(t)?, command, &vec![0; bytes])
        })
    };
    let mut checks = vec![
        unknown("vfio-user.command-0", 0),
        unknown("vfio-user.command-14", Command::DIRTY_PAGES.0),
        unknown("vfio-user.command-999", 999),
        unknown("vfio-user.command-highest", u16::MAX),
        on_connection("vfio-user.command-of-the-server", Needs::empty(), &["wire.direction"], |_, raw| {
            for command in [Command::DMA_READ, Command::DMA_WRITE] {
                refuses(raw, command, &[0; 16])?;
            }
            Ok(())
        }),
    ];
    let fixed = [
        (Command::DMA_MAP, 31),
        (Command::DMA_UNMAP, 23),
        (Command::DEVICE_GET_INFO, 3),
        (Command::DEVICE_GET_REGION_INFO, 11),
        (Command::DEVICE_GET_REGION_IO_FDS, 11),
        (Command::DEVICE_GET_IRQ_INFO, 11),
        (Command::DEVICE_SET_IRQS, 19),
        (Command::REGION_READ, 15),
        (Command::REGION_WRITE, 15),
        (Command::DEVICE_FEATURE, 7),
        (Command::MIG_DATA_READ, 7),
        (Command::MIG_DATA_WRITE, 7),
    ];
    checks.extend(fixed.map(|(command, bytes)| short(command, bytes)));
    checks
}

fn refuses(raw: &mut Raw, command: Command, body: &[u8]) -> Verdict {
    raw.ask(command, body)?.refused(&format!("{command} with {} bytes of body", body.len()))?;
    raw.in_step()
}
