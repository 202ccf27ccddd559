//! A server that another one replaces under its clients: both in this process, over real sockets.

#[path = "../common/mod.rs"]
mod common;
mod copying;
mod exchanges;
mod hooks;
mod kills;
mod regions;
mod roles;

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use common::raw::*;
use limosa_client::{Device, DeviceExt, DmaMap, DmaMemory, IrqAction};
use limosa_device::{Machine, Whole};
use limosa_models::synthetic::{REGISTERS_REGION, Synthetic, SyntheticConfig};
use limosa_protocol::State;
use limosa_protocol::info::DmaMapFlags;
use limosa_switch_over::{
    Commit, Committed, Error, GiveOptions, Given, Item, OldServer, Refusal, TakeOptions, TakeOver, Taker,
    Withdrawn, take,
};
use limosa_test_device::Memory;
use limosa_vfio_user::client::{Client, Options as ClientOptions, Role};
use limosa_vfio_user::server::{
    NewDevice, Options, Replaced, Replacing, Server, ShutdownHandle, SocketAccess, SwitchOver,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

const MIB: u64 = 1 << 20;

fn options() -> Options {
    Options { interruptible: true, ..Options::default() }
}

fn synthetic(state: &str) -> Arc<Machine> {
    let config: SyntheticConfig = format!("state={state},block=64K,seed=7").parse().unwrap();
    Machine::simple(Synthetic::new(config).unwrap())
}

/// Servers that serve, and wait for those that replace them.
struct Running {
    shutdown: Vec<ShutdownHandle>,
    machines: Vec<Arc<Machine>>,
    thread: Option<JoinHandle<()>>,
    gives: Option<JoinHandle<Vec<Result<Given, Error>>>>,
    take_over: PathBuf,
    stop: Arc<OwnedFd>,
}

impl Running {
    /// Serves until the end, or until one attempt to replace these has succeeded.
    fn new(servers: Vec<Server>, machines: Vec<Arc<Machine>>, take_over: PathBuf) -> Running {
        let shutdown = servers.iter().map(Server::shutdown_handle).collect();
        let door = TakeOver::listen(&take_over).unwrap();
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        let servers = Arc::new(servers);
        let gives = {
            let (servers, stop) = (Arc::clone(&servers), Arc::clone(&stop));
            std::thread::spawn(move || {
                let giver = SwitchOver::new(&servers);
                let mut attempts = Vec::new();
                loop {
                    let given = door.serve_one(&giver, &GiveOptions::default(), Some(stop.as_fd()));
                    let stopped = matches!(&given, Err(error) if matches!(error.cause, limosa_switch_over::Cause::Stopped));
                    if stopped {
                        return attempts;
                    }
                    let done = given.is_ok();
                    attempts.push(given);
                    if done {
                        return attempts;
                    }
                }
            })
        };
        let thread = std::thread::spawn(move || {
            std::thread::scope(|scope| {
                for server in servers.iter() {
                    scope.spawn(move || server.serve().unwrap());
                }
            });
        });
        Running { shutdown, machines, thread: Some(thread), gives: Some(gives), take_over, stop }
    }

    fn bind(folder: &std::path::Path, machines: Vec<Arc<Machine>>) -> Running {
        let bind = |(at, machine): (usize, &Arc<Machine>)| {
            Server::bind(folder.join(format!("device{at}")), Arc::clone(machine), options()).unwrap()
        };
        let servers = machines.iter().enumerate().map(bind).collect();
        Running::new(servers, machines, folder.join("take-over"))
    }

    /// Another server replaces these.
    fn replaced_by(self, machines: Vec<Arc<Machine>>) -> Running {
        let devices = machines.iter().map(|machine| (Arc::clone(machine), options()));
        self.replaced_by_taker(Replacing::new(devices), machines)
    }

    fn replaced_by_taker(
        mut self,
        taker: impl Taker<Server = Replaced>,
        machines: Vec<Arc<Machine>>,
    ) -> Running {
        let taken = take(OldServer::Path(&self.take_over), taker, &TakeOptions::default()).unwrap();
        let attempts = self.gives.take().unwrap().join().unwrap();
        assert!(attempts.last().unwrap().is_ok(), "{attempts:?}");
        self.thread.take().unwrap().join().unwrap();
        Running::new(taken.server, machines, self.take_over.clone())
    }

    /// Why these cannot be replaced by such machines.
    fn refuses(&self, machines: Vec<Arc<Machine>>) -> String {
        let devices = machines.into_iter().map(|machine| (machine, options()));
        self.refuses_taker(Replacing::new(devices))
    }

    fn refuses_taker(&self, taker: impl Taker) -> String {
        let refused = take(OldServer::Path(&self.take_over), taker, &TakeOptions::default());
        refused.err().expect("a refusal").to_string()
    }

    /// Another server replaces these; meanwhile, after each round of the preparation, this is called with the round's number.
    fn replaced_meanwhile(
        self,
        machines: Vec<Arc<Machine>>,
        meanwhile: impl FnMut(usize) -> Result<(), Refusal> + Send,
    ) -> Running {
        let taker = Meanwhile::new(machines.clone(), meanwhile);
        self.replaced_by_taker(taker, machines)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        rustix::io::write(&*self.stop, &1u64.to_ne_bytes()).unwrap();
        self.shutdown.iter().for_each(ShutdownHandle::shut_down);
        let gives = self.gives.take().map(JoinHandle::join);
        let serves = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            gives.map(Result::unwrap);
            serves.map(Result::unwrap);
        }
    }
}

/// Takes devices, and does something between the rounds of the preparation.
struct Meanwhile<F> {
    devices: Replacing,
    rounds: usize,
    meanwhile: F,
}

impl<F: FnMut(usize) -> Result<(), Refusal>> Meanwhile<F> {
    fn new(machines: Vec<Arc<Machine>>, meanwhile: F) -> Meanwhile<F> {
        let devices = Replacing::new(machines.into_iter().map(|machine| (machine, options())));
        Meanwhile { devices, rounds: 0, meanwhile }
    }
}

impl<F: FnMut(usize) -> Result<(), Refusal>> Taker for Meanwhile<F> {
    type Server = Replaced;

    fn check(&mut self, offer: Vec<Item>) -> Result<(), Refusal> {
        self.devices.check(offer)
    }

    fn prepare(&mut self, items: Vec<Item>) -> Result<(), Refusal> {
        self.devices.prepare(items)?;
        self.rounds += 1;
        (self.meanwhile)(self.rounds)
    }

    fn load(&mut self, items: Vec<Item>) -> Result<(), Refusal> {
        self.devices.load(items)
    }

    fn run(self, commit: Commit<'_>) -> Result<(Committed, Replaced), Withdrawn> {
        self.devices.run(commit)
    }
}

fn memory(bytes: u64) -> OwnedFd {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fd
}

fn map(client: &Client, iova: u64, fd: &OwnedFd, bytes: u64) {
    let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
    let memory = DmaMemory::File { fd: fd.as_fd(), offset: 0 };
    client.dma_map(&DmaMap { iova, size: bytes, flags, memory }).unwrap();
}

#[test]
fn a_client_goes_on_with_its_device_memory_and_log_after_its_server_was_replaced_twenty_times() {
    let folder = tempfile::tempdir().unwrap();
    let mut running = Running::bind(folder.path(), vec![synthetic("1M")]);
    let client = Client::connect(folder.path().join("device0"), ClientOptions::default()).unwrap();
    let guest = memory(4 * MIB);
    map(&client, 0, &guest, 4 * MIB);
    client.dma_logging_start(4096, &[]).unwrap();
    let done = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let irq = (0..5).find(|irq| client.irq(*irq).unwrap().count > 0).unwrap();
    client.set_irqs(irq, 0, IrqAction::Wire(&[Some(done.as_fd())])).unwrap();
    let mut config = [0; 64];
    client.region_read(7, 0, &mut config).unwrap();
    for round in 0..20u64 {
        running.machines[0].bus().memory.write(round * 4096, &[round as u8 + 1]).unwrap();
        running = running.replaced_by(vec![synthetic("1M")]);
        let mut again = [0; 64];
        client.region_read(7, 0, &mut again).unwrap();
        assert_eq!(config, again);
        running.machines[0].bus().interrupts.raise(irq, 0);
        let mut count = [0; 8];
        rustix::io::read(&done, &mut count).unwrap();
        assert!(u64::from_ne_bytes(count) >= 1);
        let late = memory(4096);
        map(&client, (8 + round) * MIB, &late, 4096);
    }
    let mut words = [0u64; 16];
    client.dma_logging_report(0, 4 * MIB, 4096, &mut words).unwrap();
    assert_eq!(words[0], (1 << 20) - 1, "a page that was written before each switch-over");
    assert_eq!(client.state().unwrap(), State::Running);
    drop(client);
    let next = Client::connect(folder.path().join("device0"), ClientOptions::default()).unwrap();
    assert_eq!(next.state().unwrap(), State::Running);
    drop(running);
    assert!(!folder.path().join("device0").exists(), "the last server removes its socket");
}

#[test]
fn interrupts_that_are_rewired_while_a_server_is_replaced_go_where_they_were_wired_last() {
    let folder = tempfile::tempdir().unwrap();
    let mut running = Running::bind(folder.path(), vec![synthetic("1M")]);
    let client = Client::connect(folder.path().join("device0"), ClientOptions::default()).unwrap();
    let irq = (0..5).find(|irq| client.irq(*irq).unwrap().count > 0).unwrap();
    let [first, second] =
        [(); 2].map(|()| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
    let wire = |to: Option<&OwnedFd>| {
        client.set_irqs(irq, 0, IrqAction::Wire(&[to.map(AsFd::as_fd)])).unwrap();
    };
    let signals = |running: &Running| {
        running.machines[0].bus().interrupts.raise(irq, 0);
        [&first, &second].map(|fd| rustix::io::read(fd, &mut [0; 8]).is_ok())
    };
    wire(Some(&first));
    for (to, expected) in [
        (Some(Some(&second)), [false, true]),
        (None, [false, true]),
        (Some(None), [false, false]),
        // What was raised meanwhile is signalled as well.
        (Some(Some(&first)), [true, false]),
    ] {
        running = running.replaced_meanwhile(vec![synthetic("1M")], |round| {
            if let (1, Some(to)) = (round, to) {
                wire(to);
            }
            Ok(())
        });
        assert_eq!(signals(&running), expected);
    }
    drop((client, running));
}

/// It said, after 2 s, that a request was under way, and to try again.
#[test]
fn a_server_that_was_not_made_to_be_replaced_says_which_option_it_lacks() {
    let folder = tempfile::tempdir().unwrap();
    let machine = synthetic("64K");
    let path = folder.path().join("device0");
    let server = Server::bind(&path, Arc::clone(&machine), Options::default()).unwrap();
    let running = Running::new(vec![server], vec![machine], folder.path().join("take-over"));
    let client = Client::connect(&path, ClientOptions::default()).unwrap();
    let refused = running.refuses(vec![synthetic("64K")]);
    for word in ["device0", "without `Options::interruptible`", "make the server with `interruptible: true`"]
    {
        assert!(refused.contains(word), "{refused}");
    }
    assert_eq!(client.state().unwrap(), State::Running);
    drop((client, running));
}

#[test]
fn half_a_message_and_posted_writes_arrive_in_the_new_server() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::bind(folder.path(), vec![pad()]);
    let mut raw = Raw::negotiated(&folder.path().join("device0"));
    // Half a REGION_WRITE, which the old server must keep for the new one.
    let body = bytes![0u64, 0u32, 4u32, 0x0a0b_0c0du32];
    let whole = message(77, REGION_WRITE, 0, &body);
    let (first, second) = whole.split_at(20);
    raw.socket.write_all(first).unwrap();
    let running = running.replaced_by(vec![pad()]);
    raw.socket.write_all(second).unwrap();
    let reply = raw.receive();
    assert_eq!((reply.id, reply.flags), (77, REPLY));
    // Writes that nobody waits for, sent while the server is replaced.
    let posted = raw.socket.try_clone().unwrap();
    let writes = std::thread::spawn(move || {
        for at in 0..2000u64 {
            let body = [bytes![4 * at, 0u32, 4u32], bytes![at as u32]].concat();
            (&posted).write_all(&message(1, REGION_WRITE, NO_REPLY, &body)).unwrap();
        }
    });
    let running = running.replaced_by(vec![pad()]);
    writes.join().unwrap();
    let read = raw.region_read(0, 0, 8000).ok();
    let words = read.body[16..].chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap()));
    assert!(words.eq(0..2000), "each posted write was made once");
    drop(running);
}

#[test]
fn a_client_that_takes_no_replies_held_up_a_switch_over_until_its_limit_and_then_prevented_it() {
    let folder = tempfile::tempdir().unwrap();
    let machines = || vec![pad(), pad()];
    let running = Running::bind(folder.path(), machines());
    let other = Client::connect(folder.path().join("device1"), ClientOptions::default()).unwrap();
    let mut raw = Raw::negotiated(&folder.path().join("device0"));
    let words: Vec<u8> = (0..PAD_BYTES as u32 / 4).flat_map(u32::to_ne_bytes).collect();
    raw.region_write(0, 0, &words).ok();
    // More than any socket has room for, so that the server waits in the midst of a reply.
    let count = 600;
    let read = |id| message(id, REGION_READ, 0, &bytes![0u64, 0u32, PAD_BYTES as u32]);
    let reads: Vec<u8> = (0..count).flat_map(read).collect();
    raw.send(&reads, &[]);
    let mut running = running;
    for _ in 0..2 {
        running = running.replaced_by(machines());
        assert_eq!(other.state().unwrap(), State::Running);
    }
    for id in 0..count {
        let reply = raw.receive();
        assert_eq!((reply.id, reply.flags), (id, REPLY));
        assert!(reply.body[16..] == words, "reply {id} is whole");
    }
    raw.region_read(0, 0, 4).ok();
    drop(running);
}

const PAD_BYTES: usize = 32 << 10;

/// 32 KiB of memory, all of it state.
fn pad() -> Arc<Machine> {
    Machine::simple(Whole::new(<Memory>::new(PAD_BYTES)))
}

#[test]
fn half_a_version_and_clients_that_wait_are_served_by_the_new_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device0");
    let running = Running::bind(folder.path(), vec![synthetic("64K")]);
    let client = Client::connect(&path, ClientOptions::default()).unwrap();
    let control =
        Client::connect(&path, ClientOptions { role: Role::Control, ..ClientOptions::default() }).unwrap();
    let waits = {
        let path = path.clone();
        let patient = ClientOptions { request_limit: Duration::from_secs(60), ..ClientOptions::default() };
        std::thread::spawn(move || Client::connect(path, patient).unwrap().state().unwrap())
    };
    let mut half = UnixStream::connect(&path).unwrap();
    half.write_all(&header(1, VERSION, 20, 0)[..9]).unwrap();
    let running = running.replaced_by(vec![synthetic("64K")]);
    assert!(control.state().is_err(), "a control client connects again");
    assert_eq!(client.state().unwrap(), State::Running);
    drop(client);
    assert_eq!(waits.join().unwrap(), State::Running, "the client that waited is next");
    half.write_all(&header(1, VERSION, 20, 0)[9..]).unwrap();
    half.write_all(&bytes![0u16, 2u16]).unwrap();
    let raw = Raw::new(half);
    assert_eq!(raw.receive().flags, REPLY);
    drop(running);
}

#[test]
fn what_does_not_fit_is_refused_by_name_and_the_old_server_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let both = || vec![synthetic("64K"), pad()];
    let running = Running::bind(folder.path(), both());
    let client = Client::connect(folder.path().join("device1"), ClientOptions::default()).unwrap();
    client.region_write(0, 5, b"kept").unwrap();
    let refused = running.refuses(vec![synthetic("64K")]);
    assert!(refused.contains("2 devices"), "{refused}");
    let refused = running.refuses(vec![synthetic("128K"), pad()]);
    assert!(refused.contains("device 0") && refused.contains("region 2"), "{refused}");
    // Its description fits, and its state does not.
    let other = Machine::simple(Whole::new(Memory::<true>::new(PAD_BYTES)));
    let refused = running.refuses(vec![synthetic("64K"), other]);
    assert!(refused.contains("device 1") && refused.contains("state"), "{refused}");
    assert_eq!(client.state().unwrap(), State::Running);
    // A client that moves its device.
    client.set_state(State::Stop).unwrap();
    let refused = running.refuses(both());
    assert!(refused.contains("device1: ") && refused.contains("moves"), "{refused}");
    client.set_state(State::Running).unwrap();
    let running = running.replaced_by(both());
    assert_eq!(client.state().unwrap(), State::Running);
    let mut kept = [0; 4];
    client.region_read(0, 5, &mut kept).unwrap();
    assert_eq!(&kept, b"kept");
    drop(running);
}

/// Where a device of a server listens, that is to be served there by a new one.
fn at(folder: &Path, name: &str, machine: Arc<Machine>) -> NewDevice {
    NewDevice { machine, options: options(), socket: Some(folder.join(name)), control: None }
}

#[test]
fn devices_are_known_by_their_sockets_in_whatever_order_and_one_that_is_given_away_is_not_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::bind(folder.path(), vec![pad(), pad()]);
    let [first, second] = ["device0", "device1"]
        .map(|name| Client::connect(folder.path().join(name), ClientOptions::default()).unwrap());
    first.region_write(0, 0, b"1st").unwrap();
    second.region_write(0, 0, b"2nd").unwrap();
    let new = [at(folder.path(), "device1", pad()), at(folder.path(), "device0", pad())];
    let machines = new.iter().map(|device| Arc::clone(&device.machine)).collect();
    let running = running.replaced_by_taker(Replacing::new(new), machines);
    let mut seen = [[0; 3]; 2];
    first.region_read(0, 0, &mut seen[0]).unwrap();
    second.region_read(0, 0, &mut seen[1]).unwrap();
    assert_eq!(seen, [*b"1st", *b"2nd"]);
    drop(second);
    let control = ClientOptions { role: Role::Control, ..ClientOptions::default() };
    let mover = Client::connect(folder.path().join("device1"), control).unwrap();
    mover.set_state(State::Stop).unwrap();
    mover.stay([7; 16]).unwrap();
    drop(mover);
    let refused = running.refuses_taker(Replacing::new([at(folder.path(), "device0", pad())]));
    assert!(refused.contains("device1: ") && refused.contains("given away"), "{refused}");
    drop((first, running));
}

/// Bytes that mean nothing, other ones each time.
fn nonsense(round: u64) -> Vec<u8> {
    (0..97 + round % 61)
        .map(|at| (at.wrapping_mul(round | 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}

/// Connects, sends, and is gone.
fn strike(path: &Path, bytes: &[u8]) {
    if let Ok(mut socket) = UnixStream::connect(path) {
        let _ = socket.write_all(bytes);
    }
}

/// A control client that moves the device as far as it may, asks for what it may not, and dies in between. Counts the
/// changes of the state that succeeded.
fn move_and_die(path: &Path, round: u64, changes: &AtomicU64) {
    let mut raw = Raw::connect(path);
    if raw.ask_role("control").flags & ERROR != 0 {
        return;
    }
    for (command, body) in [
        (REGION_WRITE, bytes![0u64, 0u32, 4u32, u32::MAX]),
        (REGION_READ, bytes![0u64, 0u32, 4u32]),
        (DMA_UNMAP, bytes![24u32, 2u32, 0u64, 0u64]),
        (SET_IRQS, bytes![20u32, 0x21u32, 0u32, 0u32, 0u32]),
        (RESET, Vec::new()),
        (MIG_DATA_WRITE, bytes![12u32, 4u32, 0u32]),
    ] {
        assert_ne!(raw.call(command, &body).flags & ERROR, 0, "command {command}");
    }
    let states = [STOP, STOP_COPY, RUNNING, STOP_COPY, STOP];
    for state in &states[..1 + round as usize % states.len()] {
        let is_set = raw.set_state(*state).flags & ERROR == 0;
        changes.fetch_add(u64::from(is_set), Ordering::Relaxed);
        raw.call(MIG_DATA_READ, &bytes![8u32 + 64, 64u32]);
    }
    raw.send(&nonsense(round), &[]);
}

/// A next client that does what it may and may not, and dies before the device is its own. Counts those that were admitted.
fn prepare_and_die(path: &Path, round: u64, nexts: &AtomicU64) {
    let mut raw = Raw::connect(path);
    // It waits for an answer if another one of this process is the next client.
    raw.socket.set_read_timeout(None).unwrap();
    let mut version = bytes![0u16, 0u16];
    version.extend_from_slice(b"{}\0");
    raw.ask(VERSION, &version);
    let mut fds = [rustix::event::PollFd::new(&raw.socket, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    if rustix::event::poll(&mut fds, Some(&limit)) != Ok(1) || raw.receive().flags & ERROR != 0 {
        return;
    }
    nexts.fetch_add(1, Ordering::Relaxed);
    let guest = memory(1 << 20);
    raw.dma_map(0, 1 << 20, 0, Some(guest.as_fd())).ok();
    assert_ne!(raw.call(RESET, &[]).flags & ERROR, 0);
    assert_ne!(raw.set_state(STOP).flags & ERROR, 0);
    for _ in 0..round % 2000 {
        raw.post(REGION_WRITE, &bytes![8u64, 0u32, 4u32, u32::MAX]);
    }
    raw.send(&nonsense(round), &[]);
}

#[test]
fn clients_that_do_everything_wrong_at_every_door_at_once_hurt_nobody_else() {
    let folder = tempfile::tempdir().unwrap();
    let (path, control) = (folder.path().join("device0"), folder.path().join("control"));
    let machine = pad();
    let server = Server::bind(&path, Arc::clone(&machine), options()).unwrap();
    let server = server.with_control(&control, &SocketAccess::default()).unwrap();
    let running = Running::new(vec![server], vec![machine], folder.path().join("take-over"));
    let client = Client::connect(&path, ClientOptions::default()).unwrap();
    // Each client of this process that wants to be the VMM can be the next one.
    client.name_next(Some(std::process::id() as i32)).unwrap();
    let (done, changes, nexts) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let until_done =
        |strike: &dyn Fn(u64)| (0..).take_while(|_| !done.load(Ordering::Relaxed)).for_each(strike);
    std::thread::scope(|scope| {
        for door in [&path, &control] {
            scope.spawn(move || until_done(&|round| strike(door, &nonsense(round))));
        }
        scope.spawn(|| until_done(&|round| prepare_and_die(&path, round, &nexts)));
        // VMMs that wait for their turn, and go without it.
        scope.spawn(|| until_done(&|_| strike(&path, &message(1, VERSION, 0, &bytes![0u16, 2u16]))));
        scope.spawn(|| {
            until_done(&|round| strike(&running.take_over, &nonsense(round)[..(round % 97) as usize]))
        });
        for (first, door) in [&path, &control].into_iter().enumerate() {
            let changes = &changes;
            scope.spawn(move || until_done(&|round| move_and_die(door, first as u64 + round, changes)));
        }
        let work = || {
            for count in 0.. {
                if count > 200 && changes.load(Ordering::Relaxed) > 10 && nexts.load(Ordering::Relaxed) > 10 {
                    break;
                }
                client.region_write(0, 8, &u32::to_ne_bytes(count))?;
                let mut back = [0; 4];
                client.region_read(0, 8, &mut back)?;
                assert_eq!(u32::from_ne_bytes(back), count);
            }
            Ok::<(), limosa_client::Error>(())
        };
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        done.store(true, Ordering::Relaxed);
        worked.unwrap().unwrap();
    });
    // The last control client's end has led the device back before this write returns.
    client.region_write(0, 8, &77u32.to_ne_bytes()).unwrap();
    let refused = running.refuses(vec![pad()]);
    assert!(refused.contains("next VMM"), "{refused}");
    client.name_next(None).unwrap();
    let running = running.replaced_by(vec![pad()]);
    let mut back = [0; 4];
    client.region_read(0, 8, &mut back).unwrap();
    assert_eq!(u32::from_ne_bytes(back), 77);
    drop(running);
}

fn synthetic_with(more: &str) -> Arc<Machine> {
    let config: SyntheticConfig = format!("state=2M,block=64K,seed=7,{more}").parse().unwrap();
    Machine::simple(Synthetic::new(config).unwrap())
}

fn register(client: &Client, at: u64) -> u64 {
    let mut value = [0; 8];
    client.region_read(REGISTERS_REGION, at, &mut value).unwrap();
    u64::from_le_bytes(value)
}

fn set_register(client: &Client, at: u64, value: u64) {
    client.region_write(REGISTERS_REGION, at, &value.to_le_bytes()).unwrap();
}
