//! [`ForeignServer`]: a server of the crate `vfio_user`, which is a peer independent of this project. It has no migration.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
    vfio_region_sparse_mmap_area,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion, SparseArea};

/// Written to the start of each file that a client maps for DMA.
pub const WRITTEN: &[u8] = b"written by the server";

/// The device of a [`ForeignServer`]: nine regions and five kinds of interrupts, as PCI has them.
#[derive(Default)]
pub struct ForeignDevice {
    /// Bytes of region 0, which is memory.
    pub memory_bytes: usize,
    /// A file of two pages as region 1, of which a client may map the second.
    pub mappable: Option<OwnedFd>,
    /// Vectors of MSI-X; of the other kinds it has one. At least 1.
    pub vectors: u32,
    /// Whether a DMA map writes [`WRITTEN`] to the file, and wired eventfds are signalled at once.
    pub answers: bool,
}

/// The requests that reached the device.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Offset in the file, address and bytes of each DMA map.
    pub maps: Vec<(u64, u64, u64)>,
    /// Address and bytes of each DMA unmap.
    pub unmaps: Vec<(u64, u64)>,
    /// Index, start, count and eventfds of each change of interrupts.
    pub wired: Vec<(u32, u32, u32, usize)>,
    /// Resets.
    pub resets: usize,
}

/// A server for one client.
pub struct ForeignServer {
    seen: Arc<Mutex<Seen>>,
    thread: JoinHandle<Result<(), String>>,
}

impl ForeignServer {
    /// Listens at a path.
    pub fn start(path: &Path, device: ForeignDevice) -> ForeignServer {
        let rw = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
        let mut regions: Vec<_> = (0..9).map(|index| region(index, 0, 0)).collect();
        regions[0] = region(0, device.memory_bytes as u64, rw);
        if let Some(file) = &device.mappable {
            regions[1] = region(1, 8192, rw | VFIO_REGION_INFO_FLAG_MMAP);
            regions[1].mmap_fd = Some(file.as_raw_fd());
            let area = vfio_region_sparse_mmap_area { offset: 4096, size: 4096 };
            regions[1].sparse_areas = vec![SparseArea { area }];
        }
        let count = |index| if index == 2 { device.vectors } else { 1 };
        let irqs = (0..5).map(|index| IrqInfo { index, flags: 1, count: count(index) }).collect();
        let server = Server::new(path, true, irqs, regions).expect("a server");
        let seen = Arc::new(Mutex::new(Seen::default()));
        let mut backend = Backend {
            memory: vec![0; device.memory_bytes],
            answers: device.answers,
            seen: Arc::clone(&seen),
        };
        let thread = std::thread::spawn(move || {
            // The server knows the number of its file descriptor, and does not own it.
            let _mappable = device.mappable;
            server.run(&mut backend).map_err(|error| error.to_string())
        });
        ForeignServer { seen, thread }
    }

    /// Waits for the end of the connection, and returns the requests that reached the device.
    pub fn ended(self) -> Seen {
        self.thread.join().expect("no panic").expect("a connection without an error");
        self.seen.lock().expect("no panic").clone()
    }
}

fn region(index: u32, size: u64, flags: u32) -> ServerRegion {
    let region_info = vfio_region_info { argsz: 32, index, size, flags, ..Default::default() };
    ServerRegion { region_info, sparse_areas: Vec::new(), mmap_fd: None }
}

struct Backend {
    memory: Vec<u8>,
    answers: bool,
    seen: Arc<Mutex<Seen>>,
}

impl Backend {
    fn seen(&self, note: impl FnOnce(&mut Seen)) {
        note(&mut self.seen.lock().expect("no panic"));
    }

    /// The crate checks no bounds: its backends do.
    fn memory(&mut self, region: u32, offset: u64, bytes: usize) -> io::Result<&mut [u8]> {
        let end = offset.checked_add(bytes as u64).ok_or(io::ErrorKind::InvalidInput)?;
        let memory = self.memory.get_mut(offset as usize..end as usize).filter(|_| region == 0);
        memory.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl ServerBackend for Backend {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(self.memory(region, offset, data.len())?);
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        self.memory(region, offset, data.len())?.copy_from_slice(data);
        Ok(())
    }

    fn dma_map(
        &mut self,
        _: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        file: Option<File>,
    ) -> io::Result<()> {
        if self.answers {
            file.ok_or(io::ErrorKind::InvalidInput)?.write_all_at(WRITTEN, offset)?;
        }
        self.seen(|seen| seen.maps.push((offset, address, size)));
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        self.seen(|seen| seen.unmaps.push((address, size)));
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.seen(|seen| seen.resets += 1);
        Ok(())
    }

    fn set_irqs(&mut self, index: u32, _: u32, start: u32, count: u32, fds: Vec<File>) -> io::Result<()> {
        for mut fd in fds.iter().filter(|_| self.answers) {
            fd.write_all(&1u64.to_ne_bytes())?;
        }
        self.seen(|seen| seen.wired.push((index, start, count, fds.len())));
        Ok(())
    }
}
