//! A VMM with a vfio-user device: it identifies the device, gives it memory and an interrupt, and
//! moves its state to a second device.
//!
//! `limosa serve synthetic --socket /tmp/a.sock &`, the same for `/tmp/b.sock`, then
//! `cargo run -p limosa-vfio-user --example vmm -- /tmp/a.sock /tmp/b.sock`.
use std::os::fd::AsFd;

use limosa_client::{Chunk, Device, DeviceExt, DmaMap, DmaMemory, IrqAction};
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::{State, pci_index};
use limosa_vfio_user::client::{Client, Options};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut paths = std::env::args().skip(1);
    let mut open = || Client::connect(paths.next().expect("the paths of two sockets"), Options::default());
    let (from, to) = (open()?, open()?);

    // Identify the device. `Device` is the same trait for every transport.
    let mut ids = [0; 4];
    from.region_read(pci_index::CONFIG, 0, &mut ids)?;
    println!("{}: PCI {ids:02x?}, migration {}", from.name(), from.migration_flags()?);

    // Map guest memory, shared by fd, and wire an interrupt to an eventfd.
    let memory = memfd_create("guest", MemfdFlags::CLOEXEC)?;
    ftruncate(&memory, 16 << 20)?;
    let backing = DmaMemory::File { fd: memory.as_fd(), offset: 0 };
    let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
    from.dma_map(&DmaMap { iova: 0, size: 16 << 20, flags, memory: backing })?;
    let interrupt = eventfd(0, EventfdFlags::CLOEXEC)?;
    from.set_irqs(pci_index::IRQ_MSI, 0, IrqAction::Wire(&[Some(interrupt.as_fd())]))?;

    // Move the state by hand. `limosa-migrate` does this live, with guest memory and with a rollback.
    let mut saving = from.set_state(State::StopCopy)?.ok_or("no data stream")?;
    let mut loading = to.set_state(State::Resuming)?.ok_or("no data stream")?;
    let mut chunk = vec![0; saving.transfer_bytes_max()];
    let mut moved = 0;
    while let Chunk::Data(bytes) = saving.read(&mut chunk)? {
        loading.write(&chunk[..bytes])?;
        moved += bytes;
    }
    from.set_state(State::Stop)?;
    to.set_state(State::Running)?;
    println!("{moved} bytes of state moved; {} is in {}", to.name(), to.state()?);
    Ok(())
}
