//! Saved states of the synthetic device that are whole, and those that are refused.

use super::super::save::Saver;
use super::*;
use limosa_device::Save;

const COUNT: usize = 3;
const BLOCK: usize = 4096;

fn identity(change: impl FnOnce(&mut Identity)) -> Vec<u8> {
    let (state_bytes, block_bytes) = ((COUNT * BLOCK) as u64, BLOCK as u32);
    let mut identity = Identity { kind: KIND.into(), version: VERSION, state_bytes, block_bytes, seed: 5 };
    change(&mut identity);
    Record::section(|bytes, crc| Record::Identity { bytes, crc }, &identity.encode_to_vec())
}

fn rest(blocks: &Blocks, change: impl FnOnce(&mut Rest)) -> Vec<u8> {
    let scratch = vec![0; super::super::SCRATCH_BYTES];
    let function = Some(super::super::function(4096).state(&limosa_device::Interrupts::default()));
    let mut rest = Rest { checksum: blocks.checksum(), scratch, function, ..Rest::default() };
    change(&mut rest);
    Record::section(|bytes, crc| Record::Rest { bytes, crc }, &rest.encode_to_vec())
}

/// A saved stream with an identity and a rest as they are given.
fn stream(blocks: &Blocks, identity: Vec<u8>, rest: &[u8]) -> Vec<u8> {
    let mut saver = Saver::new(blocks, COUNT, identity, &[]);
    let mut stream = Vec::new();
    while let Save::Data(data) = saver.save(blocks, 1 << 20, true, rest.to_vec()) {
        stream.extend_from_slice(data);
    }
    stream
}

fn load(stream: &[u8]) -> Result<Loaded, LoadError> {
    let mut loader = Loader::new(COUNT, BLOCK, true, None);
    let mut left = stream;
    while !left.is_empty() {
        let Some(space) = loader.space(left.len()) else { return loader.filled(1).map(|()| panic!()) };
        let bytes = space.len();
        space.copy_from_slice(&left[..bytes]);
        loader.filled(bytes)?;
        left = &left[bytes..];
    }
    loader.finish(&super::super::function(4096))
}

fn refusal(stream: &[u8]) -> String {
    load(stream).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn a_state_that_is_whole_is_taken() {
    let mut blocks = Blocks::new(5, COUNT, BLOCK);
    blocks.dirty(4, None, |_| ());
    let loaded = load(&stream(&blocks, identity(|_| ()), &rest(&blocks, |_| ()))).unwrap();
    assert_eq!(loaded.blocks.checksum(), blocks.checksum());
    assert_eq!(loaded.blocks.bytes(), blocks.bytes());
}

#[test]
fn foreign_newer_and_other_sized_states_are_refused_by_name() {
    let blocks = Blocks::new(5, COUNT, BLOCK);
    let rest = rest(&blocks, |_| ());
    let said = |change: fn(&mut Identity)| refusal(&stream(&blocks, identity(change), &rest));
    assert!(said(|identity| identity.kind = "uart".into()).contains("kind `uart`"));
    assert!(said(|identity| identity.version = 2).contains("version 2, the newest that is known here is 1"));
    let geometry = said(|identity| identity.state_bytes *= 2);
    assert_eq!(
        geometry,
        "this is a state of 24576 bytes in blocks of 4096, but the device has 12288 bytes in blocks of 4096"
    );
    assert!(said(|identity| identity.block_bytes *= 2).contains("blocks of 8192"));
    assert!(said(|identity| identity.seed = 6).contains("block 0 is another one"));
}

#[test]
fn registers_that_do_not_fit_are_refused_by_name() {
    let blocks = Blocks::new(5, COUNT, BLOCK);
    let said = |change: fn(&mut Rest)| refusal(&stream(&blocks, identity(|_| ()), &rest(&blocks, change)));
    assert!(said(|rest| rest.checksum ^= 1).contains("not of the generation"));
    assert!(said(|rest| rest.dma_pattern = 3).contains("pattern 3"));
    assert!(said(|rest| rest.cursor = 3).contains("do not fit"));
    assert!(said(|rest| rest.function = None).contains("no PCI function"));
    assert!(said(|rest| rest.function.as_mut().unwrap().config[0] ^= 1).contains("differs at 0x0"));
    assert!(said(|rest| rest.scratch.push(0)).contains("do not fit"));
}

#[test]
fn a_state_cut_anywhere_is_refused() {
    let blocks = Blocks::new(5, COUNT, BLOCK);
    let whole = stream(&blocks, identity(|_| ()), &rest(&blocks, |_| ()));
    for bytes in (0..whole.len()).step_by(41).chain(whole.len() - 60..whole.len()) {
        assert!(refusal(&whole[..bytes]).contains("cut off"), "at {bytes}");
    }
    let more = [&whole[..], b"x"].concat();
    assert!(refusal(&more).contains("bytes after its end"));
}

#[test]
fn a_state_altered_anywhere_is_refused() {
    let blocks = Blocks::new(5, COUNT, BLOCK);
    let mut stream = stream(&blocks, identity(|_| ()), &rest(&blocks, |_| ()));
    for at in 0..stream.len() {
        stream[at] ^= 0x40;
        let said = refusal(&stream);
        assert!(said.contains("damaged") || said.contains("another one"), "byte {at}: {said}");
        stream[at] ^= 0x40;
    }
}

#[test]
fn a_lost_newer_version_of_a_block_is_noticed() {
    let old = Blocks::new(5, COUNT, BLOCK);
    let mut new = Blocks::new(5, COUNT, BLOCK);
    new.dirty(1, None, |_| ());
    let said = refusal(&stream(&old, identity(|_| ()), &rest(&new, |_| ())));
    assert!(said.contains("not of the generation"), "{said}");
}

#[test]
fn records_out_of_order_or_out_of_bounds_are_refused_by_name() {
    let blocks = Blocks::new(5, COUNT, BLOCK);
    let (identity, rest) = (identity(|_| ()), rest(&blocks, |_| ()));
    let run = |first, count| Record::Blocks { first, count }.encode().to_vec();
    for (parts, part) in [
        (vec![run(0, 1)], "before its identity"),
        (vec![rest.clone()], "before its identity"),
        (vec![identity.clone(), identity.clone()], "second identity"),
        (vec![identity.clone(), run(0, 4)], "do not exist"),
        (vec![identity.clone(), run(0, 0)], "do not exist"),
        (vec![identity.clone(), run(u32::MAX, u32::MAX)], "do not exist"),
        (vec![identity.clone(), rest], "block 0 is missing"),
        (vec![Record::Identity { bytes: 1 << 30, crc: 0 }.encode().to_vec()], "1073741824 bytes"),
        (vec![Record::Identity { bytes: 0, crc: 0 }.encode().to_vec()], "empty section"),
    ] {
        let said = refusal(&parts.concat());
        assert!(said.contains(part), "{said}");
    }
}
