//! The server's round trips, each beside the floor: a bare request and reply of the same sizes over
//! an AF_UNIX socket. The client is a plain socket in both, so that only the server differs.
//!
//! `taskset -c 0 cargo bench -p limosa-vfio-user --bench server` has both ends on one core.

use std::hint::black_box;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use limosa_device::{Bus, Description, Fault, Machine, Migration, Model, Region, Save};
use limosa_protocol::info::RegionFlags;
use limosa_protocol::{Errno, MigrationFlags};
use limosa_vfio_user::server::{Options, ShutdownHandle, serve_connection};

const MIB: usize = 1 << 20;

/// A register, and a state without end.
struct Bench {
    register: [u8; 4096],
    state: Vec<u8>,
}

impl Model for Bench {
    fn description(&self) -> Description {
        let flags = RegionFlags::READ | RegionFlags::WRITE;
        Description {
            flags: None,
            regions: vec![Region { flags, size: 4096, ..Region::default() }],
            irqs: vec![],
        }
    }
    fn attach(&mut self, _: Bus) {}
    fn region_read(&mut self, _: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.copy_from_slice(&self.register[offset as usize..][..data.len()]);
        Ok(())
    }
    fn region_write(&mut self, _: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.register[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }
    fn reset(&mut self) -> Result<(), Errno> {
        Ok(())
    }
    fn migration(&mut self) -> Option<&mut dyn Migration> {
        Some(self)
    }
}

impl Migration for Bench {
    fn flags(&self) -> MigrationFlags {
        MigrationFlags::STOP_COPY
    }
    fn stop(&mut self) -> Result<(), Fault> {
        Ok(())
    }
    fn start(&mut self) -> Result<(), Fault> {
        Ok(())
    }
    fn save_begin(&mut self) -> Result<(), Fault> {
        Ok(())
    }
    fn save(&mut self, bytes_max: usize, _: bool) -> Result<Save<'_>, Errno> {
        Ok(Save::Data(&self.state[..bytes_max]))
    }
    fn save_end(&mut self) {}
    fn data_size(&self) -> u64 {
        self.state.len() as u64
    }
    fn load_begin(&mut self) -> Result<(), Fault> {
        Ok(())
    }
    fn load(&mut self, chunk: &[u8]) -> Result<(), Errno> {
        self.state[..chunk.len()].copy_from_slice(chunk);
        Ok(())
    }
    fn load_space(&mut self, bytes_max: usize) -> Option<&mut [u8]> {
        Some(&mut self.state[..bytes_max])
    }
    fn load_filled(&mut self, _: usize) -> Result<(), Errno> {
        Ok(())
    }
    fn load_finish(&mut self) -> Result<(), Fault> {
        Ok(())
    }
    fn load_abort(&mut self) {}
}

/// A client that is nothing but a socket.
struct Client {
    socket: UnixStream,
    reply: Vec<u8>,
}

impl Client {
    fn new(socket: UnixStream) -> Client {
        Client { socket, reply: vec![0; 4 * MIB] }
    }

    /// Of a served device.
    fn served() -> (Client, Arc<Machine>) {
        let machine = Machine::new(Box::new(Bench { register: [0; 4096], state: vec![1; MIB] }));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let served = Arc::clone(&machine);
        std::thread::spawn(move || {
            let shutdown = ShutdownHandle::new().unwrap();
            serve_connection(theirs, &served, &Options::default(), &shutdown).unwrap();
        });
        let mut client = Client::new(ours);
        let version = request(1, &[&[0; 4], b"{}\0"]);
        client.socket.write_all(&version).unwrap();
        let mut header = [0; 16];
        client.socket.read_exact(&mut header).unwrap();
        let size = u32::from_ne_bytes(header[4..8].try_into().unwrap()) as usize;
        client.socket.read_exact(&mut vec![0; size - 16]).unwrap();
        (client, machine)
    }

    /// Of a bare socket: requests of one size, replies of another.
    fn bare(request: usize, reply: usize) -> Client {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let (mut request, reply) = (vec![0; request], vec![1; reply]);
            while theirs.read_exact(&mut request).is_ok() && theirs.write_all(&reply).is_ok() {}
        });
        Client::new(ours)
    }

    fn call(&mut self, request: &[u8], reply: usize) {
        self.socket.write_all(request).unwrap();
        self.socket.read_exact(&mut self.reply[..reply]).unwrap();
        black_box(&mut self.reply);
    }
}

fn request(command: u16, body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    let mut out = Vec::new();
    out.extend(7u16.to_ne_bytes());
    out.extend(command.to_ne_bytes());
    out.extend((16 + body.len() as u32).to_ne_bytes());
    out.extend([0; 8]);
    out.extend(body);
    out
}

fn feature(argsz: u32, flags: u32, data: &[u64]) -> Vec<u8> {
    let data: Vec<u8> = data.iter().flat_map(|word| word.to_ne_bytes()).collect();
    request(16, &[&argsz.to_ne_bytes(), &flags.to_ne_bytes(), &data])
}

const SET_STATE: u32 = 1 << 17 | 2;

/// One request against the server and against the floor.
fn both(
    group: &mut BenchmarkGroup<'_, criterion::measurement::WallTime>,
    client: &mut Client,
    request: &[u8],
    reply: usize,
) {
    client.call(request, reply);
    assert_eq!(client.reply[8], 1, "refused");
    group.bench_function("server", |bencher| bencher.iter(|| client.call(request, reply)));
    let mut bare = Client::bare(request.len(), reply);
    group.bench_function("floor", |bencher| bencher.iter(|| bare.call(request, reply)));
}

fn regions(criterion: &mut Criterion) {
    let (mut client, _machine) = Client::served();
    let mut group = criterion.benchmark_group("region read 8");
    let read = request(9, &[&0u64.to_ne_bytes(), &0u32.to_ne_bytes(), &8u32.to_ne_bytes()]);
    both(&mut group, &mut client, &read, 16 + 16 + 8);
    group.finish();
    let mut group = criterion.benchmark_group("region write 8");
    let write = request(10, &[&0u64.to_ne_bytes(), &0u32.to_ne_bytes(), &8u32.to_ne_bytes(), &[1; 8]]);
    both(&mut group, &mut client, &write, 16 + 16);
    group.finish();
}

fn data(criterion: &mut Criterion) {
    let (mut client, _machine) = Client::served();
    for size in [4 << 10, 64 << 10, 256 << 10, MIB] {
        let sizes = [(8 + size as u32).to_ne_bytes(), (size as u32).to_ne_bytes()].concat();
        client.call(&feature(16, SET_STATE, &[3 | 0xffff_ffff << 32]), 32);
        let mut group = criterion.benchmark_group(format!("mig read {size}"));
        group.throughput(Throughput::Bytes(size as u64));
        both(&mut group, &mut client, &request(17, &[&sizes]), 16 + 8 + size);
        group.finish();
        client.call(&feature(16, SET_STATE, &[4 | 0xffff_ffff << 32]), 32);
        let mut group = criterion.benchmark_group(format!("mig write {size}"));
        group.throughput(Throughput::Bytes(size as u64));
        both(&mut group, &mut client, &request(18, &[&sizes, &vec![2; size]]), 16);
        group.finish();
    }
}

/// 64 GiB of 4 KiB pages, all dirty: a bitmap of 2 MiB.
fn report(criterion: &mut Criterion) {
    const LENGTH: u64 = 64 << 30;
    const BITMAP: usize = 2 * MIB;
    let (mut client, machine) = Client::served();
    let control = [4096, 1, 0, LENGTH];
    client.call(&feature(8 + 32, 1 << 17 | 6, &control), 16 + 8 + 32);
    assert_eq!(client.reply[8], 1, "refused");
    let bus = machine.bus();
    let backing = limosa_device::Backing::Remote(Arc::new(Nowhere));
    let flags = limosa_protocol::info::DmaMapFlags::WRITE;
    bus.memory.map(limosa_device::Mapping { iova: 0, size: LENGTH, flags, backing }).unwrap();
    let argsz = (32 + BITMAP) as u32;
    let ask = feature(argsz, 1 << 16 | 8, &[0, LENGTH, 4096]);
    let whole = vec![0; 1 << 30];
    let mut group = criterion.benchmark_group("report of 64 GiB");
    group.sample_size(20).measurement_time(Duration::from_secs(3));
    for (name, dirty) in [("all dirty", true), ("clean", false)] {
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| {
                let mut spent = Duration::ZERO;
                for _ in 0..iterations {
                    if dirty {
                        for gib in 0..64 {
                            bus.memory.write(gib << 30, &whole).unwrap();
                        }
                    }
                    let start = std::time::Instant::now();
                    client.call(&ask, 16 + 32 + BITMAP);
                    spent += start.elapsed();
                    assert_eq!(client.reply[16 + 32 + BITMAP - 1], if dirty { 0xff } else { 0 });
                }
                spent
            });
        });
    }
    let mut bare = Client::bare(ask.len(), 16 + 32 + BITMAP);
    group.bench_function("floor", |bencher| bencher.iter(|| bare.call(&ask, 16 + 32 + BITMAP)));
    group.finish();
}

/// Memory that takes everything.
struct Nowhere;

impl limosa_device::RemoteMemory for Nowhere {
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Ok(())
    }
    fn write(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
        Ok(())
    }
}

criterion_group!(benches, regions, data, report);
criterion_main!(benches);
