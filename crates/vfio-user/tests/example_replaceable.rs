//! The replaceable server of `docs/device.md`: a new process takes its place under a client.

use std::process::Command;

use limosa_client::Device;
use limosa_testing::{Process, built_example};
use limosa_vfio_user::client::{Client, Options};

#[test]
fn the_counter_goes_on_in_a_new_process_twice() {
    let folder = tempfile::tempdir().unwrap();
    let start = |how: &[&str]| {
        let mut command = Command::new(built_example("limosa-vfio-user", "replaceable"));
        command.arg(folder.path().join("socket")).arg(folder.path().join("takeover")).args(how);
        Process::start(&mut command)
    };
    let mut serves = start(&[]);
    serves.transcript().line("serves");
    let client = Client::connect(folder.path().join("socket"), Options::default()).unwrap();
    for replaced in 0..3_u64 {
        client.region_write(0, 0, &[0; 8]).unwrap();
        let mut count = [0; 8];
        client.region_read(0, 0, &mut count).unwrap();
        assert_eq!(u64::from_le_bytes(count), replaced + 1);
        let next = start(&["take"]);
        next.transcript().line("serves");
        std::mem::replace(&mut serves, next).end().ok();
    }
}
