//! The `vfio_user` crate's server with a region of plain memory: the other implementation in Rust, measured with its own client
//! in the same run.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;

use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, Server, ServerBackend, ServerRegion};

use crate::device::MEMORY_BYTES;

struct Memory(Vec<u8>);

impl Memory {
    fn range(&mut self, offset: u64, bytes: usize) -> io::Result<&mut [u8]> {
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let end = start.checked_add(bytes).ok_or(io::ErrorKind::InvalidInput)?;
        self.0.get_mut(start..end).ok_or(io::ErrorKind::InvalidInput.into())
    }
}

impl ServerBackend for Memory {
    fn region_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(self.range(offset, data.len())?);
        Ok(())
    }

    fn region_write(&mut self, _region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        self.range(offset, data.len())?.copy_from_slice(data);
        Ok(())
    }

    fn dma_map(&mut self, _: DmaMapFlags, _: u64, _: u64, _: u64, _: Option<File>) -> io::Result<()> {
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn set_irqs(&mut self, _: u32, _: u32, _: u32, _: u32, _: Vec<File>) -> io::Result<()> {
        Ok(())
    }
}

/// Serves the listening socket's first client.
pub(crate) fn serve(listener: UnixStream) -> anyhow::Result<()> {
    let region_info = vfio_region_info {
        argsz: size_of::<vfio_region_info>() as u32,
        flags: VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE,
        size: MEMORY_BYTES as u64,
        ..vfio_region_info::default()
    };
    let regions = vec![ServerRegion { region_info, sparse_areas: Vec::new(), mmap_fd: None }];
    let server = Server::from_owned_fd(listener.into(), true, Vec::new(), regions);
    server.run(&mut Memory(vec![0; MEMORY_BYTES])).map_err(|error| anyhow::anyhow!("{error}"))
}
