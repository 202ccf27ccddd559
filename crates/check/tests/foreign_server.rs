//! The server of the crate `vfio_user`, written by others: it has no migration, and what it has passes.

use std::fs::File;
use std::io;

use limosa_check::{Options, Target, Transport, run};
use limosa_vfio_user::client::{self, Client};
use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};
use vfio_user::{IrqInfo, Server, ServerBackend, ServerRegion};

/// A device of one region. The crate checks no bounds: its backends do.
struct Backend(Vec<u8>);

impl ServerBackend for Backend {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(data.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        match self.0.get(offset as usize..end as usize) {
            Some(bytes) if region == 0 => data.copy_from_slice(bytes),
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }
    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(data.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        match self.0.get_mut(offset as usize..end as usize) {
            Some(bytes) if region == 0 => bytes.copy_from_slice(data),
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }
    fn dma_map(
        &mut self,
        _: vfio_user::DmaMapFlags,
        _: u64,
        _: u64,
        _: u64,
        _: Option<File>,
    ) -> io::Result<()> {
        Ok(())
    }
    fn dma_unmap(&mut self, _: vfio_user::DmaUnmapFlags, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn reset(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn set_irqs(&mut self, _: u32, _: u32, _: u32, _: u32, _: Vec<File>) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn the_suite_judges_a_server_without_migration() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device.sock");
    let region = |index, size, flags| ServerRegion {
        region_info: vfio_region_info { argsz: 32, index, size, flags, ..Default::default() },
        sparse_areas: Vec::new(),
        mmap_fd: None,
    };
    let mut regions = vec![region(0, 4096, VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE)];
    regions.extend((1..9).map(|index| region(index, 0, 0)));
    let irqs = (0..5).map(|index| IrqInfo { index, flags: 1, count: 1 }).collect();
    let server = Server::new(&path, true, irqs, regions).unwrap();
    let thread = std::thread::spawn(move || {
        server.run(&mut Backend(vec![0; 4096])).map_err(|error| error.to_string())
    });

    let target = Target::new("vfio_user", Transport::VfioUser, move || {
        Ok(Box::new(Client::connect(&path, client::Options::default())?))
    });
    let report = run(&target, &Options { destructive: true, ..Options::default() }, |_| {}).unwrap();
    drop(target);
    thread.join().unwrap().unwrap();
    let failed: Vec<_> = report.failed().map(|check| &*check.id).collect();
    println!("{failed:?} {:?}", report.counts());
    // It hands vectors on to its backend as they are, and does not know how many there are.
    assert_eq!(failed, ["device.irq-vectors-beyond"], "{report:#?}");
    assert!(report.counts().pass >= 10 && report.ended_early.is_none(), "{:?}", report.counts());
    assert_eq!(report.left_in, "it has no migration state");

    let mut text = Vec::new();
    report.markdown(&mut text).unwrap();
    let text = String::from_utf8(text).unwrap();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/conformance/vfio-user-crate.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, &text).unwrap();
    }
    assert!(std::fs::read_to_string(path).unwrap() == text, "UPDATE_DOCS=1 writes {path} anew:\n{text}");
}
