//! `limosa trace` of a process that moves the kernel's mtty device.

#[path = "command/support.rs"]
mod support;

use limosa_client::{Chunk, Device, DeviceExt, FeatureRequest, Refers};
use limosa_protocol::feature::FeatureMigState;
use limosa_protocol::{FeatureIndex, FeatureOp, State};
use limosa_vfio_kernel::{Door, KernelDevice, Options};
use rustix::process::Signal;
use support::{DOORS, Here, Marked, mtty, path};
use zerocopy::IntoBytes;

/// Walks a device to STOP_COPY, reads all of its state, and asks for a state that there is not.
fn walk(device: &KernelDevice) {
    device.set_state(State::RunningP2p).unwrap();
    device.set_state(State::Stop).unwrap();
    let mut stream = device.set_state(State::StopCopy).unwrap().unwrap();
    let mut data = vec![0; 4096];
    while let Chunk::Data(_) = stream.read(&mut data).unwrap() {}
    let mut payload = FeatureMigState { device_state: 99, data_fd: -1 };
    let misuse = FeatureRequest {
        index: FeatureIndex::MIG_DEVICE_STATE,
        op: FeatureOp::SET,
        payload: payload.as_mut_bytes(),
        refers: Refers::Nothing,
    };
    assert!(device.feature(&mut { misuse }).is_err());
    device.set_state(State::Running).unwrap();
}

/// User-Mode Linux 6.12 does not tell a tracer of calls. Then the trace has to say so, where it was empty.
fn is_blind(said: &str) -> bool {
    let symbols = std::fs::read_to_string("/proc/kallsyms").unwrap();
    let tells = symbols.contains("ptrace_get_syscall_info");
    assert_eq!(said.contains("*** no call is shown: "), !tells, "{said}");
    !tells
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_walk_of_the_kernels_device_is_shown_with_its_data_fd_and_the_errno_of_misuse() {
    let here = Here::new();
    for (door, name) in [(Door::Cdev, DOORS[0]), (Door::Group, DOORS[1])] {
        let device = Marked::new(&mtty(), 3);
        let file = path("trace");
        let trace = here.start(&["trace", "-o", &file, "--pid", &std::process::id().to_string()]);
        // The trace says so at its beginning, into the file.
        while !std::fs::read_to_string(&file).is_ok_and(|said| said.contains("is traced from here on")) {
            std::thread::yield_now();
        }
        let opened =
            KernelDevice::open(device.uuid(), &Options { door: Some(door), ..Options::default() }).unwrap();
        walk(&opened);
        drop(opened);
        trace.signal(Signal::INT);
        trace.end().ok();
        let said = std::fs::read_to_string(&file).unwrap();
        if is_blind(&said) {
            continue;
        }
        let mut last = 0;
        for part in [
            "DEVICE_GET_INFO -> 9 regions, 5 interrupt indexes <",
            "FEATURE SET MIG_DEVICE_STATE RUNNING > RUNNING_P2P -> ok <",
            "FEATURE SET MIG_DEVICE_STATE RUNNING_P2P > STOP -> ok <",
            "FEATURE SET MIG_DEVICE_STATE STOP > STOP_COPY -> data_fd ",
            " session 1 read ",
            " session 1 read 4096 bytes -> 0 bytes, the end <",
            "FEATURE SET MIG_DEVICE_STATE state 99 -> EINVAL (",
        ] {
            let at = said[last..].find(part);
            last += at.unwrap_or_else(|| panic!("{name}: no `{part}` behind {last}: {said}"));
        }
        assert!(said.contains(" session 1 close -> ok <"), "{said}");
        match door {
            Door::Cdev => assert!(said.contains(" iommufd IOMMU_IOAS_ALLOC -> ok <"), "{said}"),
            Door::Group => {
                let given = format!("GROUP_GET_DEVICE_FD {} -> device fd ", device.uuid());
                assert!(said.contains(&given), "{given}: {said}");
                assert!(said.contains(&format!("{} FEATURE SET", device.uuid())), "by its name: {said}");
            }
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_move_by_the_command_is_shown_and_goes_as_it_would() {
    let here = Here::new();
    let (one, other) = (Marked::new(&mtty(), 0x31), Marked::empty(&mtty()));
    let program = limosa_lab::limosa().get_program().to_str().unwrap().to_owned();
    let file = path("trace");
    let traced = ["trace", "-c", "-o", &file, "--", &program, "migrate", one.uuid(), other.uuid()];
    let ended = here.limosa(&traced);
    let (said, counted) = (std::fs::read_to_string(&file).unwrap(), ended.err.clone());
    ended.ok();
    assert_eq!(other.mark(), 0x31);
    if is_blind(&said) {
        return;
    }
    for part in [
        "RUNNING > PRE_COPY -> data_fd ",
        "PRE_COPY_P2P > STOP_COPY -> ok <",
        "> RESUMING -> data_fd ",
        " session 1 read ",
        " session 1 write ",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(counted.contains("FEATURE SET MIG_DEVICE_STATE") && counted.contains("> STOP_COPY"), "{counted}");
}
