//! Moves of devices that write guest memory all the while: at the end both memories are the same, and a move that is
//! undone loses no dirty page.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use limosa_client::{Device, DeviceExt, DirtySource, DmaMap, DmaMemory};
use limosa_lab::module::{self, Dma, ModuleDevice};
use limosa_migrate::{
    Convergence, Destination, DirtyLog, FilePages, GuestPages, Ledger, Memory, MemoryRegion, MovedDevice,
    Observer, Options, Outcome, Phase, Received, Round, Source, move_local,
};
use limosa_protocol::State;
use limosa_protocol::bitmap::DirtyBitmap;
use limosa_protocol::info::DmaMapFlags;
use limosa_vfio_kernel::{AddressSpace, Door, KernelDevice};

use crate::mock_iommu::{self, APERTURE, MockDevice};
use crate::page_tables::attach;
use crate::{PAGE, memfd};

/// Memory of a guest: two regions, the first mapped in two pieces.
const REGIONS: [(u64, u64); 2] = [(APERTURE, 256 * PAGE), (1 << 30, 64 * PAGE)];
const PIECES: [(usize, u64, u64); 3] = [(0, 0, 128 * PAGE), (0, 128 * PAGE, 128 * PAGE), (1, 0, 64 * PAGE)];
const ROUNDS: u32 = 4;

/// Who tells what the device writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Teller {
    Device,
    Container,
    /// An IOMMU, a mock one: the device's writes are made up, and marked in its page table.
    PageTable,
    Nobody,
}

/// Every way in which dirty pages become known: type of device, door, log.
const WAYS: [(&str, Door, Teller); 7] = [
    ("limosa-full", Door::Cdev, Teller::Device),
    ("limosa-full", Door::Group, Teller::Device),
    ("limosa-p2p", Door::Cdev, Teller::Device),
    ("limosa-precopy", Door::Group, Teller::Container),
    ("limosa-plain", Door::Group, Teller::Container),
    ("limosa-precopy", Door::Cdev, Teller::PageTable),
    ("limosa-precopy", Door::Cdev, Teller::Nobody),
];

/// The guest on the source: a device that writes its memory.
struct Guest {
    device: KernelDevice,
    teller: Teller,
    /// Where its memory is mapped.
    space: AddressSpace,
    /// The page table in which its writes are marked.
    page_table: Option<u32>,
    files: [File; 2],
    /// The pages that were written since the move began, by region.
    written: Mutex<[BTreeSet<u64>; 2]>,
    count: Mutex<u64>,
    /// Whether there is a log to mark pages in.
    marks: AtomicBool,
}

impl Guest {
    fn new(module: &ModuleDevice, door: Door, teller: Teller) -> Guest {
        Guest::of(module, door, teller, new_memory())
    }

    /// With this memory.
    fn of(module: &ModuleDevice, door: Door, teller: Teller, files: [File; 2]) -> Guest {
        let device = module.open(door);
        let mut space = device.address_space().unwrap().clone();
        let mut page_table = None;
        if teller == Teller::PageTable {
            space = AddressSpace::new(Door::Cdev).unwrap();
            let (iommufd, ioas) = space.ioas().unwrap();
            page_table = Some(attach(&space, "mock", &MockDevice::new(iommufd, ioas, true)));
            space.has_device(&device);
        }
        let guest = Guest {
            device,
            teller,
            space,
            page_table,
            files,
            written: Mutex::default(),
            count: Mutex::default(),
            marks: AtomicBool::new(false),
        };
        PIECES.into_iter().for_each(|piece| guest.map(piece));
        // Something that is there before.
        guest.dma(Dma::Write, 0, 1, 3);
        guest
    }

    fn map(&self, (region, offset, size): (usize, u64, u64)) {
        let memory = DmaMemory::File { fd: self.files[region].as_fd(), offset };
        let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
        let map = DmaMap { iova: REGIONS[region].0 + offset, size, flags, memory };
        self.space.map(self.device.name(), &map).unwrap();
    }

    /// The device writes pages, each time something else.
    fn dma(&self, how: Dma, region: usize, page: u64, pages: u64) {
        let mut count = self.count.lock().unwrap();
        *count += 1;
        let (iova, bytes) = (REGIONS[region].0 + page * PAGE, pages * PAGE);
        match self.page_table {
            None => module::dma(&self.device, how, iova, bytes, *count).unwrap(),
            Some(page_table) => {
                let written = module::pattern(*count, iova, bytes);
                self.files[region].write_all_at(&written, page * PAGE).unwrap();
                // There is none to mark before the log is on.
                if self.marks.load(Ordering::SeqCst) {
                    let (iommufd, _) = self.space.ioas().unwrap();
                    mock_iommu::write(iommufd, page_table, iova, &(0..pages).collect::<Vec<_>>());
                }
            }
        }
        self.written.lock().unwrap()[region].extend(page..page + pages);
    }

    fn unmap(&self, (region, offset, size): (usize, u64, u64)) {
        self.space.unmap(self.device.name(), REGIONS[region].0 + offset, size, None).unwrap();
    }
}

impl Observer for Guest {
    fn phase(&self, phase: Phase) {
        match phase {
            Phase::PreCopy => {
                self.marks.store(true, Ordering::SeqCst);
                self.dma(Dma::Write, 0, 10, 2);
            }
            // The last moment at which it runs.
            Phase::Stop => self.dma(Dma::Write, 1, 33, 1),
            _ => {}
        }
    }

    fn round(&self, round: &Round) {
        let round = round.round;
        let page = u64::from(round) * 7;
        self.dma(Dma::Write, 0, page, 3);
        self.dma(Dma::WriteByCpu, 1, page, 1);
        if round == 1 {
            self.dma(Dma::WriteAndKeep, 0, 200, 2);
        }
        if round == 2 {
            // Memory comes and goes in mid-migration.
            self.dma(Dma::Write, 0, 130, 2);
            self.unmap(PIECES[1]);
            self.map(PIECES[1]);
        }
        if round == 3 {
            self.dma(Dma::Write, 0, 201, 1);
        }
    }
}

/// The devices of one guest, which write in turns.
struct All<'a>(&'a [&'a Guest]);

impl Observer for All<'_> {
    fn phase(&self, phase: Phase) {
        self.0.iter().for_each(|guest| guest.phase(phase));
    }
    fn round(&self, round: &Round) {
        self.0.iter().for_each(|guest| guest.round(round));
    }
}

fn new_memory() -> [File; 2] {
    REGIONS.map(|(_, bytes)| memfd(bytes))
}

fn same_files(files: &[File; 2]) -> [File; 2] {
    [0, 1].map(|at| files[at].try_clone().unwrap())
}

/// A log of no vCPUs, that keeps what comes back.
#[derive(Default)]
struct Log(Arc<Mutex<[BTreeSet<u64>; 2]>>);

impl DirtyLog for Log {
    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn harvest(&mut self, _: usize, _: &DirtyBitmap) -> io::Result<()> {
        Ok(())
    }
    fn give_back(&mut self, region: usize, dirty: &DirtyBitmap) {
        let pages = dirty.runs().flat_map(|(first, pages)| first..first + pages);
        self.0.lock().unwrap()[region].extend(pages);
    }
    fn stop(&mut self) {}
}

fn regions(pages: &[FilePages; 2]) -> Vec<MemoryRegion<'_>> {
    let regions = REGIONS.into_iter().zip(pages).enumerate();
    regions.map(|(at, ((iova, size), pages))| MemoryRegion { id: at as u32, iova, size, pages }).collect()
}

fn pages(files: &[File; 2]) -> [FilePages; 2] {
    [0, 1].map(|at| FilePages::new(files[at].try_clone().unwrap(), 0))
}

fn all(pages: &FilePages, bytes: u64) -> Vec<u8> {
    let mut all = vec![0; bytes as usize];
    pages.read(0, &mut all).unwrap();
    all
}

/// Moves the guest, which has these devices, to those, and says how that went and what was given back.
fn moved(
    guests: &[&Guest],
    there: &[&KernelDevice],
    files: &[File; 2],
) -> (Outcome, Received, [BTreeSet<u64>; 2]) {
    let options = Options::default()
        .with_convergence(Convergence::default().with_downtime_goal(Duration::ZERO).with_rounds_max(ROUNDS));
    let (near, far) = (pages(&guests[0].files), pages(files));
    let told = |guest: &&&Guest| matches!(guest.teller, Teller::Container | Teller::PageTable);
    let logs: Vec<_> = guests.iter().filter(told).map(|guest| guest.space.dirty_log()).collect();
    let mut log = Log::default();
    let given_back = Arc::clone(&log.0);
    let here: Vec<_> = guests.iter().map(|guest| MovedDevice::new(&guest.device)).collect();
    let there: Vec<_> = there.iter().map(|device| MovedDevice::new(*device)).collect();
    let observer = All(guests);
    let source = Source::new(&here, &options)
        .with_memory(
            Memory::logged(regions(&near), &mut log)
                .with_sources(logs.iter().map(|log| log as &dyn DirtySource).collect()),
        )
        .with_observer(&observer);
    let (ledger, far) = (Ledger::new(), regions(&far));
    let destination = Destination::new(&there, &ledger, &options).with_memory(&far);
    let (outcome, received) = move_local(source, destination);
    let given_back = given_back.lock().unwrap().clone();
    (outcome, received, given_back)
}

fn same_memory(guest: &Guest, files: &[File; 2], what: &str) {
    let (near, far) = (pages(&guest.files), pages(files));
    for (at, (_, bytes)) in REGIONS.into_iter().enumerate() {
        let (near, far) = (all(&near[at], bytes), all(&far[at], bytes));
        let differ: Vec<_> = (0..bytes / PAGE)
            .filter(|page| {
                let range = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
                near[range.clone()] != far[range]
            })
            .collect();
        assert!(differ.is_empty(), "{what}: pages {differ:?} of region {at}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn what_a_device_writes_while_it_moves_arrives() {
    for (name, door, teller) in WAYS {
        let what = format!("{name}, {door:?}, {teller:?}");
        let (from, to) = (ModuleDevice::create(name), ModuleDevice::create(name));
        let (guest, there) = (Guest::new(&from, door, teller), to.open(door));
        let files = new_memory();
        let (outcome, _, _) = moved(&[&guest], &[&there], &files);
        let Outcome::Moved(report) = &outcome else { panic!("{what}: {outcome:?}") };
        let blind = report.notes.iter().any(|note| note.contains("no log sees the DMA"));
        assert_eq!(blind, teller == Teller::Nobody, "{what}: {:?}", report.notes);
        if teller != Teller::Nobody {
            // Rounds that are made while a device still streams are not counted.
            assert!(report.rounds.len() >= ROUNDS as usize, "{what}: it wrote in every round");
        }
        same_memory(&guest, &files, &what);
        assert_eq!(from.told("check"), to.told("check"), "{what}: the device's state");
        assert_eq!(there.state().unwrap(), State::Running);
        assert_eq!(from.number("logging"), 0, "{what}: stopped");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_move_that_is_undone_gives_back_every_page_and_the_next_one_arrives() {
    for (name, door, teller) in WAYS {
        let what = format!("{name}, {door:?}, {teller:?}");
        let (from, to) = (ModuleDevice::create(name), ModuleDevice::create(name));
        let (guest, there) = (Guest::new(&from, door, teller), to.open(door));
        let files = new_memory();
        *guest.written.lock().unwrap() = Default::default();
        to.wish("fail", "RESUMING>STOP:5");
        let (outcome, _, given_back) = moved(&[&guest], &[&there], &files);
        assert!(matches!(outcome, Outcome::Undone { .. }), "{what}: {outcome:?}");
        assert_eq!(guest.device.state().unwrap(), State::Running, "{what}");
        assert_eq!(from.number("logging"), 0, "{what}: stopped");
        let written = guest.written.lock().unwrap().clone();
        if teller != Teller::Nobody {
            for (back, written) in given_back.iter().zip(&written) {
                assert!(back.is_superset(written), "{what}: {back:?} of {written:?}");
            }
        }
        guest.marks.store(false, Ordering::SeqCst);
        guest.dma(Dma::Write, 0, 77, 1);
        to.wish("fail", "none");
        let (outcome, _, _) = moved(&[&guest], &[&there], &files);
        assert!(matches!(outcome, Outcome::Moved(_)), "{what}: {outcome:?}");
        same_memory(&guest, &files, &what);
        assert_eq!(from.told("check"), to.told("check"), "{what}: the device's state");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_log_that_fails_in_a_move_loses_nothing() {
    let (from, to) = (ModuleDevice::create("limosa-full"), ModuleDevice::create("limosa-full"));
    let (guest, there) = (Guest::new(&from, Door::Cdev, Teller::Device), to.open(Door::Cdev));
    let files = new_memory();
    from.wish("fail", "report:5");
    let (outcome, _, _) = moved(&[&guest], &[&there], &files);
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    same_memory(&guest, &files, "reports fail");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn what_several_devices_write_arrives_whoever_tells() {
    let names = ["limosa-full", "limosa-plain", "limosa-precopy"];
    let (from, to) = (names.map(ModuleDevice::create), names.map(ModuleDevice::create));
    let memory = new_memory();
    let guests = [
        Guest::of(&from[0], Door::Cdev, Teller::Device, same_files(&memory)),
        Guest::of(&from[1], Door::Group, Teller::Container, same_files(&memory)),
        Guest::of(&from[2], Door::Cdev, Teller::PageTable, same_files(&memory)),
    ];
    let there = to.each_ref().map(|module| module.open(None));
    let files = new_memory();
    let (outcome, _, _) = moved(&guests.each_ref(), &there.each_ref(), &files);
    let Outcome::Moved(report) = &outcome else { panic!("{outcome:?}") };
    let blind = |note: &String| note.contains("does not log");
    assert!(!report.notes.iter().any(blind), "every one is seen: {:?}", report.notes);
    same_memory(&guests[0], &files, "three devices");
    for (from, to) in from.iter().zip(&to) {
        assert_eq!(from.told("check"), to.told("check"), "a device's state");
    }
}
