//! `docs/synthetic.md`: its table of registers is that of the code, and what it says of accesses is what the device does.

use super::*;

/// A row of the table of registers.
struct Row {
    offset: u64,
    name: String,
    access: String,
}

fn rows() -> Vec<Row> {
    let page = include_str!("../../../../docs/synthetic.md");
    let rows = page.lines().filter_map(|line| {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let offset = u64::from_str_radix(cells.first()?.strip_prefix("0x")?, 16).ok()?;
        Some(Row { offset, name: cells[1].into(), access: cells[2].into() })
    });
    rows.collect()
}

#[test]
fn the_table_of_registers_is_that_of_the_code() {
    let code = include_str!("../../src/synthetic/registers.rs");
    let constants: Vec<(String, u64)> = code
        .lines()
        .filter_map(|line| {
            let (name, value) = line.strip_prefix("pub const ")?.split_once(": u64 = 0x")?;
            Some((name.into(), u64::from_str_radix(value.trim_end_matches(';'), 16).unwrap()))
        })
        .collect();
    let table: Vec<_> = rows().into_iter().map(|row| (row.name, row.offset)).collect();
    assert!(table.len() > 15, "{table:?}");
    assert_eq!(table, constants);
}

#[test]
fn a_register_can_be_accessed_as_the_table_says() {
    // Nothing changes by itself.
    let device = synthetic(SMALL);
    for Row { offset, name, access } in rows() {
        let before = get(&device, offset);
        // A value that the register accepts: the number of a pattern, an engine that is off. A different value shows that it was accepted.
        let value = match offset {
            DMA_CONTROL => 0,
            DMA_PATTERN => 2,
            _ => before ^ 1,
        };
        set(&device, offset, value);
        let after = get(&device, offset);
        match &*access {
            "read" => assert_eq!(after, before, "{name}: a write has no effect"),
            "write" => assert_eq!((before, after), (0, 0), "{name} reads 0"),
            "both" => assert_eq!(after, value, "{name} reads what was written"),
            other => panic!("{name}: {other}"),
        }
    }
    let written = |offset, bytes: &[u8]| device.region_write(0, offset, bytes).map_err(refused_with);
    // Half a register, and what is no aligned access of 4 or 8 bytes.
    set(&device, DIRTY_RATE, 0);
    written(DIRTY_RATE + 4, &[1, 0, 0, 0]).unwrap();
    assert_eq!(get(&device, DIRTY_RATE), 1 << 32);
    set(&device, DIRTY_RATE, 0);
    assert_eq!(written(DIRTY_RATE, &[1]), Err(Errno::EINVAL));
    assert_eq!(written(DIRTY_RATE + 2, &[0; 4]), Err(Errno::EINVAL));
    assert_eq!(written(DMA_PATTERN, &7_u64.to_le_bytes()), Err(Errno::EINVAL));
    assert_eq!(written(DMA_CONTROL, &1_u64.to_le_bytes()), Ok(()), "the rows above have made a window");
    for busy in [DMA_BASE, DMA_PAGES, DMA_PATTERN, DMA_LIMIT] {
        assert_eq!(written(busy, &[0; 8]), Err(Errno::EBUSY));
    }
    set(&device, DMA_CONTROL, 0);
    set(&device, DMA_PAGES, 0);
    assert_eq!(written(DMA_CONTROL, &1_u64.to_le_bytes()), Err(Errno::EINVAL), "there is no window");
    device.region_write(0, SCRATCH + 3, &[7]).unwrap();
    // An offset without a register, and any register of a device that stands still.
    set(&device, 0xc0, 5);
    assert_eq!(get(&device, 0xc0), 0);
    device.set_state(State::Stop).unwrap();
    assert_eq!(written(DIRTY_RATE, &[0; 8]), Err(Errno::EBUSY));
    device.reset().unwrap();
    let mut scratch = [9];
    device.region_read(0, SCRATCH + 3, &mut scratch).unwrap();
    assert_eq!(scratch, [0]);
}

fn refused_with(error: limosa_client::Error) -> Errno {
    match error {
        limosa_client::Error::Refused { errno, .. } => errno,
        error => panic!("{error}"),
    }
}
