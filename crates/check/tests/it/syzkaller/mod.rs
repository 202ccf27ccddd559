//! `contrib/syzkaller`: its constants and layouts are those of Linux' headers, by the crate `vfio-bindings`.

mod description;

use std::collections::{BTreeMap, BTreeSet};
use std::mem::{offset_of, size_of};

use description::{TEXT, constants, defines, structures};
use vfio_bindings::bindings::vfio as linux;

/// `_IO(VFIO_TYPE, VFIO_BASE + number)`.
fn io(number: u32) -> u64 {
    (u32::from(linux::VFIO_TYPE) << 8 | (linux::VFIO_BASE + number)).into()
}

#[test]
fn the_constants_are_those_of_linux() {
    macro_rules! of_linux {
        ($($name:ident),* $(,)?) => { [$((stringify!($name), u64::from(linux::$name))),*] };
    }
    macro_rules! states {
        ($($name:literal = $constant:ident),* $(,)?) => { [$(($name, u64::from(linux::$constant))),*] };
    }
    let mut expected: BTreeMap<&str, u64> = of_linux![
        VFIO_DEVICE_FEATURE_GET,
        VFIO_DEVICE_FEATURE_SET,
        VFIO_DEVICE_FEATURE_PROBE,
        VFIO_DEVICE_FEATURE_MIGRATION,
        VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
        VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
        VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP,
        VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
        VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
        VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2,
    ]
    .into();
    expected.extend(states![
        "VFIO_DEVICE_STATE_ERROR" = vfio_device_mig_state_VFIO_DEVICE_STATE_ERROR,
        "VFIO_DEVICE_STATE_STOP" = vfio_device_mig_state_VFIO_DEVICE_STATE_STOP,
        "VFIO_DEVICE_STATE_RUNNING" = vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING,
        "VFIO_DEVICE_STATE_STOP_COPY" = vfio_device_mig_state_VFIO_DEVICE_STATE_STOP_COPY,
        "VFIO_DEVICE_STATE_RESUMING" = vfio_device_mig_state_VFIO_DEVICE_STATE_RESUMING,
        "VFIO_DEVICE_STATE_RUNNING_P2P" = vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING_P2P,
        "VFIO_DEVICE_STATE_PRE_COPY" = vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY,
        "VFIO_DEVICE_STATE_PRE_COPY_P2P" = vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY_P2P,
    ]);
    // Commands, which the bindings do not have (`vfio.h`: _IO(VFIO_TYPE, VFIO_BASE + n)), and fcntl's.
    expected.extend([
        ("VFIO_DEVICE_RESET", io(11)),
        ("VFIO_DEVICE_FEATURE", io(17)),
        ("VFIO_DEVICE_BIND_IOMMUFD", io(18)),
        ("VFIO_MIG_GET_PRECOPY_INFO", io(21)),
        ("AT_FDCWD", (-100i64).cast_unsigned()),
        ("O_RDWR", 2),
    ]);
    // What the description itself defines: two of these, ORed.
    for (name, value) in defines() {
        let parts = value.trim_matches(['(', ')']).split(" | ");
        expected.insert(name, parts.map(|part| expected[part]).fold(0, |all, part| all | part));
    }
    assert_eq!(constants(), expected);
}

#[test]
fn every_constant_is_used_and_every_one_used_is_there() {
    let is_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_' || letter == '$';
    let used: BTreeSet<_> = TEXT
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(|line| line.split(|letter| !is_name(letter)))
        .filter(|word| {
            let upper = word.starts_with("VFIO_") || word.starts_with("AT_") || word.starts_with("O_");
            upper && !word.contains('$')
        })
        .collect();
    assert_eq!(used, constants().into_keys().collect());
}

#[test]
fn the_layouts_are_those_of_linux() {
    macro_rules! of_linux {
        ($($name:ident { $($field:ident),* })*) => {
            [$((
                stringify!($name),
                (vec![$((stringify!($field), offset_of!(linux::$name, $field))),*], size_of::<linux::$name>()),
            )),*]
        };
    }
    let expected = of_linux! {
        vfio_device_feature_migration { flags }
        vfio_device_feature_mig_state { device_state, data_fd }
        vfio_device_feature_mig_data_size { stop_copy_length }
        vfio_device_feature_dma_logging_control { page_size, num_ranges, __reserved, ranges }
        vfio_device_feature_dma_logging_range { iova, length }
        vfio_device_feature_dma_logging_report { iova, length, page_size, bitmap }
        vfio_device_bind_iommufd { argsz, flags, iommufd, out_devid, token_uuid_ptr }
        vfio_precopy_info { argsz, flags, initial_bytes, dirty_bytes }
    };
    let mut found = structures();
    // The head of every request.
    let (head, bytes) = found.remove("vfio_mig_any_feature").unwrap();
    assert_eq!(head.last(), Some(&("data", offset_of!(linux::vfio_device_feature, data))));
    assert_eq!(bytes, size_of::<linux::vfio_device_feature>());
    assert_eq!(found, expected.into());
}
