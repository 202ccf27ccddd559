//! A new server of several devices, killed (SIGKILL) at each point: each frame, fd, step and arc of its devices, as it traces them.

use limosa_models::synthetic::registers;
use limosa_testing::points::{self, KILL_AT, KILL_BY};
use limosa_testing::{Ended, Process, this_test};
use rustix::process::{PTracer, set_ptracer};

use super::*;

const FOLDER: &str = "LIMOSA_TEST_FOLDER";

fn devices() -> Vec<Arc<Machine>> {
    vec![pad(), synthetic("64K"), pad()]
}

/// The new server, in a process of its own, when the environment says so.
#[test]
fn new_server() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let folder = Path::new(&folder);
    let new = devices()
        .into_iter()
        .enumerate()
        .map(|(at, machine)| super::at(folder, &format!("device{at}"), machine));
    let replacing = Replacing::new(new);
    let path = folder.join("take-over");
    let taken = points::within(|| take(OldServer::Path(&path), replacing, &TakeOptions::default()));
    let committed = points::number_of("about to commit").unwrap();
    println!("points: {committed} {}", points::passed());
    std::process::exit(if taken.is_ok() { 0 } else { 3 });
}

fn start(folder: &Path, kill: &[(&str, &str)]) -> Ended {
    let mut command = this_test("kills::new_server");
    command.env(FOLDER, folder).env("RUST_BACKTRACE", "0").envs(kill.iter().copied());
    Process::start(&mut command).end()
}

/// How many points the new server passes up to the commit, and in all, when each device has a client.
fn count_points() -> (usize, usize) {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::bind(folder.path(), devices());
    let clients = connect(folder.path());
    let said = start(folder.path(), &[]).ok();
    let (_, numbers) = said.split_once("points: ").unwrap();
    let numbers: Vec<usize> = numbers.split_whitespace().map_while(|word| word.parse().ok()).collect();
    drop((clients, running));
    (numbers[0], numbers[1])
}

fn connect(folder: &Path) -> [Client; 3] {
    let client = |name| Client::connect(folder.join(name), ClientOptions::default()).unwrap();
    ["device0", "device1", "device2"].map(client)
}

/// Each device has what was written to it last, and gets something else.
fn work(clients: &[Client; 3], round: u64) {
    for (at, client) in clients.iter().enumerate() {
        let mut last = [0; 8];
        let (region, offset) = if at == 1 { (REGISTERS_REGION, registers::SCRATCH) } else { (0, 16) };
        client.region_read(region, offset, &mut last).unwrap();
        assert_eq!(u64::from_le_bytes(last), round, "device {at}");
        client.region_write(region, offset, &(round + 1).to_le_bytes()).unwrap();
        assert_eq!(client.state().unwrap(), State::Running);
    }
}

#[test]
fn a_new_server_that_is_killed_at_any_point_before_its_commit_leaves_the_old_one_serving_all_devices() {
    // Where kernel.yama.ptrace_scope is 1, a child may not attach unless it is let. EINVAL without Yama.
    let _ = set_ptracer(PTracer::Any);
    let (committed, _) = count_points();
    // At least a point for each frame of either side, and for the arcs of each device.
    assert!(committed > 60, "{committed}");
    let folder = tempfile::tempdir().unwrap();
    let running = Running::bind(folder.path(), devices());
    let clients = connect(folder.path());
    for point in 0..=committed {
        let ended = start(folder.path(), &[(KILL_AT, &point.to_string()), (KILL_BY, "about to commit")]);
        assert_eq!(ended.code, -9, "{point}: {ended:?}");
        work(&clients, point as u64);
    }
    let running = running.replaced_by(devices());
    work(&clients, committed as u64 + 1);
    drop((clients, running));
}

#[test]
fn a_new_server_that_is_killed_at_any_point_after_its_commit_was_the_only_one_of_all_devices() {
    let _ = set_ptracer(PTracer::Any);
    let (committed, passed) = count_points();
    assert!(passed > committed + 6, "the arcs of each device come after the commit");
    for point in committed + 1..passed {
        let folder = tempfile::tempdir().unwrap();
        let mut running = Running::bind(folder.path(), devices());
        let clients = connect(folder.path());
        let ended = start(folder.path(), &[(KILL_AT, &point.to_string())]);
        assert_eq!(ended.code, -9, "{point}: {ended:?}");
        let attempts = running.gives.take().unwrap().join().unwrap();
        assert!(attempts.last().unwrap().is_ok(), "{point}: {attempts:?}");
        assert!(
            clients.iter().all(|client| client.state().is_err()),
            "{point}: no device is served from an old state"
        );
    }
}
