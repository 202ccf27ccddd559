//! The faults of servers, each with the clause that it breaks.

mod device;
mod messages;
mod sessions;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering::SeqCst;

use limosa_protocol::info::{IrqSetFlags, RegionFlags};
use limosa_protocol::{Errno, FeatureOp};
use limosa_vfio_user::codec::{Command, Header, RegionAccess, VersionMessage};
use limosa_vfio_user::version::Capabilities;
use rustix::fs::FileType;

use super::proxy::{Connection, Do, Fault, Passing};

type Ask = fn(&mut Passing, &Connection) -> Do;
type Answer = fn(&Passing, &mut Passing);

/// A fault, its words, the clause that it breaks, and the check that it is run with where that is one alone.
pub struct Case {
    pub words: &'static str,
    pub clause: &'static str,
    pub fault: Fault,
    pub only: Option<&'static str>,
}

/// What a page has, and where the checks map.
const PAGE: u64 = 4096;
const IOVA: u64 = 0x4000_0000;

const BARE: &[u8] = b"{\"capabilities\":{}}\0";

fn data(message: &Passing) -> &[u8] {
    message.body.get(VersionMessage::BYTES..).unwrap_or_default()
}

fn is_bare(message: &Passing) -> bool {
    message.is(Command::VERSION) && data(message) == BARE
}

fn agreed(json: &str) -> Vec<u8> {
    [&[0, 0, 0, 0], json.as_bytes(), &[0]].concat()
}

fn when(holds: bool, otherwise: Do) -> Do {
    if holds { otherwise } else { Do::Pass }
}

fn is_refusal(reply: &Passing) -> bool {
    reply.header.flags & Header::ERROR != 0
}

/// Makes a success of a refusal.
fn allow(reply: &mut Passing, body: Vec<u8>) {
    reply.header.flags = Header::TYPE_REPLY;
    reply.header.error = 0;
    reply.set_body(body);
}

fn irq_flags(message: &Passing) -> IrqSetFlags {
    IrqSetFlags::from_bits_retain(message.u32(4))
}

/// One kind of data and one action, all of them assigned.
fn has_good_flags(message: &Passing) -> bool {
    let flags = message.u32(4);
    flags < 64 && (flags & 7).count_ones() == 1 && (flags >> 3).count_ones() == 1
}

fn fixed_bytes(command: Command) -> usize {
    match command {
        Command::DMA_MAP => 32,
        Command::DMA_UNMAP => 24,
        Command::DEVICE_GET_INFO => 4,
        Command::DEVICE_GET_REGION_INFO
        | Command::DEVICE_GET_REGION_IO_FDS
        | Command::DEVICE_GET_IRQ_INFO => 12,
        Command::DEVICE_SET_IRQS => 20,
        Command::REGION_READ | Command::REGION_WRITE => 16,
        Command::DEVICE_FEATURE | Command::MIG_DATA_READ | Command::MIG_DATA_WRITE => 8,
        _ => 0,
    }
}

fn is_unknown(command: Command) -> bool {
    command.0 == 0 || command == Command::DIRTY_PAGES || command.0 > Command::MIG_DATA_WRITE.0
}

fn info_bytes(command: Command) -> usize {
    match command {
        Command::DEVICE_GET_REGION_INFO => 32,
        Command::DEVICE_GET_INFO | Command::DEVICE_GET_REGION_IO_FDS | Command::DEVICE_GET_IRQ_INFO => 16,
        _ => 0,
    }
}

fn state_op(message: &Passing) -> FeatureOp {
    if message.is(Command::DEVICE_FEATURE) {
        FeatureOp::from_bits_retain(message.u32(4) & FeatureOp::all().bits())
    } else {
        FeatureOp::empty()
    }
}

fn ask(words: &'static str, clause: &'static str, fault: Ask) -> Case {
    Case { words, clause, fault: Fault::Ask(fault), only: None }
}

fn answer(words: &'static str, clause: &'static str, fault: Answer) -> Case {
    Case { words, clause, fault: Fault::Answer(fault), only: None }
}

fn other(words: &'static str, clause: &'static str, fault: Fault) -> Case {
    Case { words, clause, fault, only: None }
}

/// Every fault.
pub fn all() -> Vec<Case> {
    messages::all().into_iter().chain(device::all()).chain(sessions::all()).collect()
}
