//! A device with its own memory, which the guest keeps writing while the device is copied: it migrates live, with pre-copy.
use limosa_device::saved::{Item, Reader, Refusal, Section, Writer};
use limosa_device::{Bus, Description, Fault, Machine, Region, Save, SimpleMigration, SimpleModel};
use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::info::RegionFlags;
use limosa_protocol::{Errno, MigrationFlags};
use limosa_vfio_user::server::{Options, Server};

const KIND: &str = "example.notepad";
const PAGE_BYTES: usize = 4096;
const PAGES: usize = 256;
/// Bytes that are prepared for reading at once.
const READY_BYTES: usize = 64 << 10;

/// A page of the memory. It is sent again when it changes during pre-copy, and the last one counts.
const PAGE: Section = Section::bulk("page", 1, PAGE_BYTES as u64);
/// The rest of the state, which is read once the device has stopped.
const REGISTERS: Section = Section::message("registers", 1);

/// Field numbers are never reused.
#[derive(Clone, PartialEq, prost::Message)]
struct Registers {
    /// Number of the guest's writes.
    #[prost(uint64, tag = "1")]
    writes: u64,
}

/// The status of a page in a saving session.
#[derive(Clone, Copy, PartialEq)]
enum Page {
    Done,
    /// Not read yet.
    First,
    /// Changed after it was read.
    Again,
}

struct Saving {
    writer: Writer,
    pages: Vec<Page>,
}

struct Loading {
    reader: Reader,
    memory: Vec<u8>,
    came: Vec<bool>,
    registers: Registers,
}

struct Notepad {
    memory: Vec<u8>,
    registers: Registers,
    runs: bool,
    saving: Option<Saving>,
    loading: Option<Loading>,
}

impl Notepad {
    fn new() -> Notepad {
        let (memory, registers) = (vec![0; PAGES * PAGE_BYTES], Registers::default());
        Notepad { memory, registers, runs: true, saving: None, loading: None }
    }
}

impl Saving {
    fn count(&self, what: Page) -> u64 {
        self.pages.iter().filter(|page| **page == what).count() as u64
    }

    /// Prepares due pages for reading, until there are `bytes` bytes. A page is copied here: if the guest writes it in transit,
    /// it becomes due again, and the copy is not torn.
    fn add_pages(&mut self, memory: &[u8], bytes: usize) {
        for (at, memory) in memory.chunks(PAGE_BYTES).enumerate() {
            if self.writer.untaken().len() >= bytes {
                return;
            }
            if std::mem::replace(&mut self.pages[at], Page::Done) != Page::Done {
                self.writer.section(&PAGE, (at * PAGE_BYTES) as u64, memory);
            }
        }
    }
}

impl SimpleModel for Notepad {
    fn description(&self) -> Description {
        let flags = RegionFlags::READ | RegionFlags::WRITE;
        let region = Region { flags, size: (PAGES * PAGE_BYTES) as u64, ..Region::default() };
        Description { regions: vec![region], ..Description::default() }
    }

    fn attach(&mut self, _bus: Bus) {}

    fn region_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.copy_from_slice(&self.memory[offset as usize..][..data.len()]);
        Ok(())
    }

    fn region_write(&mut self, _region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        // What is written after the last page was read would be lost.
        if !self.runs {
            return Err(Errno::EBUSY);
        }
        let range = offset as usize..offset as usize + data.len();
        self.memory[range.clone()].copy_from_slice(data);
        self.registers.writes += 1;
        // The dirty log of the device's own memory: a page that was read already has to be read again.
        if let Some(saving) = &mut self.saving {
            for page in &mut saving.pages[range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES)] {
                if *page == Page::Done {
                    *page = Page::Again;
                }
            }
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Errno> {
        *self = Notepad::new();
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn SimpleMigration> {
        Some(self)
    }
}

impl SimpleMigration for Notepad {
    /// It does no DMA, so that there is nothing to do for P2P.
    fn flags(&self) -> MigrationFlags {
        MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY | MigrationFlags::P2P
    }

    fn stop(&mut self) -> Result<(), Fault> {
        self.runs = false;
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        self.runs = true;
        Ok(())
    }

    /// Into PRE_COPY while it runs, or into STOP_COPY when it stands still: the session is the same.
    fn save_begin(&mut self) -> Result<(), Fault> {
        self.saving = Some(Saving { writer: Writer::new(KIND), pages: vec![Page::First; PAGES] });
        Ok(())
    }

    fn save(&mut self, bytes_max: usize, stopped: bool) -> Result<Save<'_>, Errno> {
        let saving = self.saving.as_mut().ok_or(Errno::EIO)?;
        if saving.writer.untaken().is_empty() {
            saving.add_pages(&self.memory, bytes_max.min(READY_BYTES));
            // Nothing changes any more, and no page is left.
            let is_over = stopped && saving.count(Page::Done) == PAGES as u64;
            if is_over && !saving.writer.has_ended() {
                saving.writer.message(&REGISTERS, &self.registers);
                saving.writer.end();
            }
        }
        let chunk = saving.writer.take(bytes_max);
        Ok(match (chunk.is_empty(), stopped) {
            (false, _) => Save::Data(chunk),
            // Pre-copy has no end: more comes when the guest writes, or in STOP_COPY.
            (true, false) => Save::NothingForNow,
            (true, true) => Save::End,
        })
    }

    fn save_end(&mut self) {
        self.saving = None;
    }

    /// What the engine decides by: when to stop, and whether it pays to read on. Initial bytes never grow.
    fn precopy_info(&mut self, _reinit: bool) -> PrecopyInfo {
        let bytes = |what| self.saving.as_ref().map_or(0, |saving| saving.count(what) * PAGE_BYTES as u64);
        PrecopyInfo {
            initial_bytes: bytes(Page::First),
            dirty_bytes: bytes(Page::Again),
            ..PrecopyInfo::default()
        }
    }

    /// What STOP_COPY has to give if the device stops now. So it falls during pre-copy.
    fn data_size(&self) -> u64 {
        let left =
            self.saving.as_ref().map_or(PAGES as u64, |saving| PAGES as u64 - saving.count(Page::Done));
        let unread = self.saving.as_ref().map_or(0, |saving| saving.writer.untaken().len() as u64);
        (left + 1) * PAGE_BYTES as u64 + unread
    }

    fn load_begin(&mut self) -> Result<(), Fault> {
        self.loading = Some(Loading {
            // How often pages come is not bounded; what is held is.
            reader: Reader::new(KIND, &[PAGE, REGISTERS], u64::MAX),
            memory: vec![0; self.memory.len()],
            came: vec![false; PAGES],
            registers: Registers::default(),
        });
        Ok(())
    }

    /// Collects. Nothing of the device changes, so that the guest's state is still there when this one is refused.
    fn load(&mut self, chunk: &[u8]) -> Result<(), Errno> {
        let Loading { reader, memory, came, registers } = self.loading.as_mut().ok_or(Errno::EIO)?;
        let mut take = |item: Item<'_>| {
            if item.section.name() == REGISTERS.name() {
                *registers = item.decode()?;
                return Ok(());
            }
            let (place, page_bytes) = (item.place as usize, PAGE_BYTES as u64);
            let page = came.get_mut(place / PAGE_BYTES);
            let is_page = item.place.is_multiple_of(page_bytes) && item.length == page_bytes;
            let Some(page) = page.filter(|_| is_page) else {
                let text = format!("{} bytes at {:#x} are no page of it", item.length, item.place);
                return Err(Refusal::unfit(PAGE.name(), text));
            };
            memory[place + item.offset as usize..][..item.bytes.len()].copy_from_slice(item.bytes);
            *page = true;
            Ok(())
        };
        reader.push(chunk, &mut take).map_err(|refusal| refused(&refusal))
    }

    /// The whole of it is looked at before anything is used.
    fn load_finish(&mut self) -> Result<(), Fault> {
        let loading = self.loading.as_ref().ok_or(Fault::Refused(Errno::EIO))?;
        loading.reader.finish().map_err(|refusal| Fault::Refused(refused(&refusal)))?;
        if let Some(page) = loading.came.iter().position(|came| !came) {
            let refusal = Refusal::unfit(PAGE.name(), format!("page {page} did not come"));
            return Err(Fault::Refused(refused(&refusal)));
        }
        let Loading { memory, registers, .. } = self.loading.take().expect("it was there");
        (self.memory, self.registers) = (memory, registers);
        Ok(())
    }

    fn load_abort(&mut self) {
        self.loading = None;
    }
}

/// In words for the log, and by a number for the client.
fn refused(refusal: &Refusal) -> Errno {
    eprintln!("a state is refused: {refusal}");
    refusal.errno()
}

fn main() -> std::io::Result<()> {
    let path = std::env::args().nth(1).expect("the path of a socket to make");
    Server::bind(path, Machine::simple(Notepad::new()), Options::default())?.serve()
}
