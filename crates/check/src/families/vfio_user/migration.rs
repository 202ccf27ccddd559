//! Migration in messages (`vfio-user.rst: VFIO_USER_DEVICE_FEATURE, VFIO_USER_MIG_DATA_READ, VFIO_USER_MIG_DATA_WRITE`).

use limosa_protocol::feature::{FeatureMigState, FeatureMigration};
use limosa_protocol::{FeatureHeader, FeatureIndex, FeatureOp, State};
use limosa_vfio_user::codec::{Command, MigData};
use zerocopy::IntoBytes;

use super::on_connection;
use crate::bytes::same_bytes;
use crate::check::{Check, Needs, Stop, Verdict, ensure};
use crate::wire::{Answer, Raw};

pub(super) fn checks() -> Vec<Check> {
    let migration = Needs::MIGRATION;
    vec![
        on_connection("vfio-user.feature-set-is-echoed", migration, &["feature.reply"], |_, raw| {
            let request = set_request(State::Stop);
            let body = raw.ask(Command::DEVICE_FEATURE, &request)?.done("SET MIG_DEVICE_STATE STOP")?;
            // The data fd is not used here, and either side may decline it.
            let mut echo = body.bytes.clone();
            if echo.len() == request.len() {
                echo[12..].copy_from_slice(&request[12..]);
            }
            same_bytes(&echo, &request, || "the reply to SET MIG_DEVICE_STATE is no echo".into())
        }),
        on_connection("vfio-user.feature-probe-is-echoed", migration, &["feature.reply"], |_, raw| {
            let (index, op) = (FeatureIndex::MIGRATION, FeatureOp::PROBE | FeatureOp::GET);
            let request = FeatureHeader::new(index, op, 0);
            let answer = raw.ask(Command::DEVICE_FEATURE, request.as_bytes())?;
            let body = answer.done("PROBE of MIGRATION")?;
            same_bytes(&body.bytes, request.as_bytes(), || {
                "the reply to PROBE of MIGRATION is no echo".into()
            })
        }),
        on_connection("vfio-user.feature-get-says-its-size", migration, &["feature.reply"], |_, raw| {
            let room = size_of::<FeatureMigration>() as u32;
            let request = FeatureHeader::new(FeatureIndex::MIGRATION, FeatureOp::GET, room);
            let answer = raw.ask(Command::DEVICE_FEATURE, request.as_bytes())?;
            let body = answer.done("GET MIGRATION")?;
            let header: FeatureHeader = body.fixed()?;
            ensure(body.bytes.len() == 16 && header.argsz == 16, || {
                format!("GET MIGRATION gave {} bytes and says argsz {}", body.bytes.len(), header.argsz)
            })
        }),
        on_connection("vfio-user.read-without-a-session", migration, &["data.session"], |_, raw| {
            read(raw, 4096)?.refused("MIG_DATA_READ in RUNNING")?;
            raw.in_step()
        }),
        on_connection("vfio-user.write-without-a-session", migration, &["data.session"], |_, raw| {
            write(raw, 16, 16)?.refused("MIG_DATA_WRITE in RUNNING")?;
            raw.in_step()
        }),
        on_connection("vfio-user.read-while-loading", migration, &["data.session"], |_, raw| {
            set(raw, State::Resuming)?;
            read(raw, 4096)?.refused("MIG_DATA_READ in RESUMING")?;
            is(raw, State::Resuming)
        }),
        on_connection("vfio-user.write-while-saving", migration, &["data.session"], |_, raw| {
            set(raw, State::StopCopy)?;
            write(raw, 16, 16)?.refused("MIG_DATA_WRITE in STOP_COPY")?;
            is(raw, State::StopCopy)
        }),
        on_connection("vfio-user.read-says-its-size", migration, &["data.reply"], |_, raw| {
            set(raw, State::StopCopy)?;
            let body = read(raw, 64)?.done("MIG_DATA_READ of 64 bytes")?;
            let data: MigData = body.fixed()?;
            let room = body.bytes.len() - MigData::BYTES;
            ensure(data.size <= 64 && data.size as usize <= room, || {
                format!("MIG_DATA_READ of 64 bytes says {} bytes, and brought {room}", data.size)
            })
        }),
        on_connection("vfio-user.read-of-everything", migration, &["data.size"], |_, raw| {
            set(raw, State::StopCopy)?;
            read(raw, u32::MAX)?.refused("MIG_DATA_READ of 4294967295 bytes")?;
            is(raw, State::StopCopy)
        }),
        on_connection("vfio-user.read-of-nothing", migration, &["wire.answered"], |_, raw| {
            set(raw, State::StopCopy)?;
            read(raw, 0)?.answered("MIG_DATA_READ of no bytes")?;
            is(raw, State::StopCopy)
        }),
        on_connection("vfio-user.write-of-less-data", migration, &["data.size"], |_, raw| {
            set(raw, State::Resuming)?;
            write(raw, 64, 16)?.refused("MIG_DATA_WRITE of 64 bytes with 16 bytes of data")?;
            is(raw, State::Resuming)
        }),
    ]
}

fn set_request(state: State) -> Vec<u8> {
    let payload = FeatureMigState::new(state);
    let bytes = size_of::<FeatureMigState>() as u32;
    let header = FeatureHeader::new(FeatureIndex::MIG_DEVICE_STATE, FeatureOp::SET, bytes);
    [header.as_bytes(), payload.as_bytes()].concat()
}

/// Drives the device to a state.
pub(super) fn set(raw: &mut Raw, state: State) -> Verdict {
    raw.ask(Command::DEVICE_FEATURE, &set_request(state))?.done(&format!("SET {state}")).map(drop)
}

/// Checks that GET returns this state.
pub(super) fn is(raw: &mut Raw, state: State) -> Verdict {
    let room = size_of::<FeatureMigState>() as u32;
    let request = FeatureHeader::new(FeatureIndex::MIG_DEVICE_STATE, FeatureOp::GET, room);
    let body = raw.ask(Command::DEVICE_FEATURE, request.as_bytes())?.done("GET MIG_DEVICE_STATE")?;
    let (_, found): (FeatureHeader, FeatureMigState) = {
        let [header, found]: [[u8; 8]; 2] = body.fixed()?;
        (zerocopy::transmute!(header), zerocopy::transmute!(found))
    };
    ensure(found.device_state == state.raw(), || {
        format!("GET says state {}, expected {state}", found.device_state)
    })
}

fn read(raw: &mut Raw, size: u32) -> Result<Answer, Stop> {
    let argsz = size.saturating_add(MigData::BYTES as u32);
    raw.ask(Command::MIG_DATA_READ, MigData { argsz, size }.as_bytes())
}

fn write(raw: &mut Raw, size: u32, data: usize) -> Result<Answer, Stop> {
    let request = MigData { argsz: MigData::BYTES as u32 + size, size };
    raw.ask(Command::MIG_DATA_WRITE, &[request.as_bytes(), &vec![0; data]].concat())
}
