//! Faults in information, memory, interrupts and regions.

use super::*;

pub(super) fn all() -> Vec<Case> {
    vec![
        // Information
        answer("argsz is the client's", "argsz.reply", |m, r| {
            if m.is(Command::DEVICE_GET_INFO) && m.u32(0) == 4096 {
                r.body[..4].copy_from_slice(&4096u32.to_ne_bytes());
            }
        }),
        ask("argsz does not tell what is needed", "argsz.short", |m, _| {
            let short = m.body.len() >= 16 && (m.u32(0) as usize) < info_bytes(m.header.command);
            when(short, Do::Reply(m.u32(0).to_ne_bytes().to_vec()))
        }),
        ask("GET_REGION_IO_FDS ends the connection", "wire.answered", |m, _| {
            when(m.is(Command::DEVICE_GET_REGION_IO_FDS), Do::Close)
        }),
        answer("a region says that it has capabilities, and has none", "argsz.reply", |m, r| {
            if m.is(Command::DEVICE_GET_REGION_INFO) && r.body.len() >= 32 {
                r.body[..4].copy_from_slice(&64u32.to_ne_bytes());
            }
        }),
        answer("a region can be mapped without an fd", "region.fd", |m, r| {
            if m.is(Command::DEVICE_GET_REGION_INFO) && r.body.len() >= 32 {
                r.body[4] |= RegionFlags::MMAP.bits() as u8;
            }
        }),
        // Memory
        ask("memory with an fd is not mapped", "map.map", |m, _| {
            when(m.is(Command::DMA_MAP) && !m.fds.is_empty(), Do::Refuse(Errno::ENOTSUP))
        }),
        ask("memory without an fd is not mapped", "map.map", |m, _| {
            when(m.is(Command::DMA_MAP) && m.fds.is_empty(), Do::Refuse(Errno::ENOTSUP))
        }),
        ask("a neighbour is an overlap", "map.map", |m, _| {
            when(m.is(Command::DMA_MAP) && m.u64(16) == IOVA - PAGE, Do::Refuse(Errno::EEXIST))
        }),
        answer("a map over another succeeds", "map.exists", |m, r| {
            if m.is(Command::DMA_MAP) && is_refusal(r) && r.header.error == Errno::EEXIST.raw() {
                allow(r, Vec::new());
            }
        }),
        answer("a map over another is EINVAL", "map.exists", |m, r| {
            if m.is(Command::DMA_MAP) && is_refusal(r) {
                r.header.error = Errno::EINVAL.raw();
            }
        }),
        answer("a map of no range succeeds", "map.range", |m, r| {
            let other = is_refusal(r) && r.header.error != Errno::EEXIST.raw();
            if m.is(Command::DMA_MAP) && other && m.u32(4) != 0 && m.body.len() == 32 {
                allow(r, Vec::new());
            }
        }),
        ask("a map for neither reading nor writing succeeds", "map.flags", |m, _| {
            when(m.is(Command::DMA_MAP) && m.body.len() == 32 && m.u32(4) == 0, Do::Reply(Vec::new()))
        }),
        ask("a map of an odd offset ends the connection", "wire.answered", |m, _| {
            when(m.is(Command::DMA_MAP) && m.u64(8) == 512, Do::Close)
        }),
        ask("a map beyond the end of its file ends the connection", "wire.answered", |m, _| {
            when(m.is(Command::DMA_MAP) && m.u64(24) == 1 << 20, Do::Close)
        }),
        answer("an unmap says what was asked for", "unmap.exact", |m, r| {
            if m.is(Command::DMA_UNMAP) && m.body.len() == 24 && m.u64(16) != 0 {
                allow(r, m.body.clone());
            }
        }),
        answer("an unmap of nothing says that something is gone", "unmap.exact", |m, r| {
            if m.is(Command::DMA_UNMAP) && m.body.len() == 24 && m.u64(16) == 0 {
                let mut body = m.body.clone();
                body[16] = 1;
                allow(r, body);
            }
        }),
        answer("an unmap of two says that one is gone", "unmap.exact", |m, r| {
            if m.is(Command::DMA_UNMAP) && m.u64(16) == 2 * PAGE && r.body.len() == 24 {
                r.body[16..].copy_from_slice(&PAGE.to_ne_bytes());
            }
        }),
        answer("an unmap names another address", "unmap.exact", |m, r| {
            if m.is(Command::DMA_UNMAP) && r.body.len() == 24 {
                r.body[8] = 1;
            }
        }),
        ask("an unmap with a bitmap ends the connection", "wire.answered", |m, _| {
            when(m.is(Command::DMA_UNMAP) && m.u32(4) == 1, Do::Close)
        }),
        // Interrupts
        ask("eventfds cannot be taken away", "irqs.wire", |m, _| {
            let takes = irq_flags(m).contains(IrqSetFlags::DATA_EVENTFD) && m.fds.is_empty();
            when(m.is(Command::DEVICE_SET_IRQS) && takes && has_good_flags(m), Do::Refuse(Errno::EINVAL))
        }),
        ask("an index cannot be disabled", "irqs.wire", |m, _| {
            let disables = m.body.len() == 20 && m.u32(16) == 0;
            when(m.is(Command::DEVICE_SET_IRQS) && disables, Do::Refuse(Errno::EINVAL))
        }),
        ask("a trigger does nothing", "irqs.trigger", |m, _| {
            when(m.is(Command::DEVICE_SET_IRQS) && m.u32(4) == 0x21 && m.u32(16) == 1, Do::Reply(Vec::new()))
        }),
        ask("bools do not matter", "irqs.trigger", |m, _| {
            if m.is(Command::DEVICE_SET_IRQS) && m.u32(4) == 0x22 && m.body.len() == 22 {
                m.body[20..].fill(1);
            }
            Do::Pass
        }),
        ask("a disabled index signals on", "irqs.trigger", |m, _| {
            let disables = m.body.len() == 20 && m.u32(16) == 0;
            when(m.is(Command::DEVICE_SET_IRQS) && disables, Do::Reply(Vec::new()))
        }),
        answer("any vectors are taken", "irqs.range", |m, r| {
            if m.is(Command::DEVICE_SET_IRQS) && is_refusal(r) && has_good_flags(m) && m.fds.is_empty() {
                allow(r, Vec::new());
            }
        }),
        answer("any flags are taken", "irqs.flags", |m, r| {
            if m.is(Command::DEVICE_SET_IRQS) && is_refusal(r) && !has_good_flags(m) {
                allow(r, Vec::new());
            }
        }),
        answer("any number of eventfds is taken", "irqs.fds", |m, r| {
            if m.is(Command::DEVICE_SET_IRQS) && is_refusal(r) && !m.fds.is_empty() {
                allow(r, Vec::new());
            }
        }),
        ask("what is no eventfd ends the connection", "wire.answered", |m, _| {
            let pipe = m.fds.iter().any(|fd| {
                let mode = rustix::fs::fstat(fd.as_fd()).unwrap().st_mode;
                FileType::from_raw_mode(mode) == FileType::Fifo
            });
            when(m.is(Command::DEVICE_SET_IRQS) && pipe, Do::Close)
        }),
        answer("bools that are missing are 0", "irqs.bools", |m, r| {
            if m.is(Command::DEVICE_SET_IRQS) && is_refusal(r) && m.u32(4) == 0x22 {
                allow(r, Vec::new());
            }
        }),
        // Regions
        answer("a read names another count", "region.reply", |m, r| {
            if m.is(Command::REGION_READ) && r.body.len() == 20 {
                r.body[12] = 3;
            }
        }),
        answer("a write names another region", "region.reply", |m, r| {
            if m.is(Command::REGION_WRITE) && r.body.len() == 16 {
                r.body[8] ^= 1;
            }
        }),
        ask("a read of nothing ends the connection", "wire.answered", |m, _| {
            when(m.is(Command::REGION_READ) && m.body.len() == 16 && m.u32(12) == 0, Do::Close)
        }),
        answer("accesses beyond a region succeed", "region.bounds", |m, r| {
            let access = m.is(Command::REGION_READ) || m.is(Command::REGION_WRITE);
            if access && is_refusal(r) && m.u32(12) == 4 && m.body.len() != 18 && m.body.len() >= 16 {
                allow(r, m.body[..RegionAccess::BYTES].to_vec());
            }
        }),
        answer("long reads succeed", "region.limit", |m, r| {
            if m.is(Command::REGION_READ) && is_refusal(r) && m.u32(12) > 4096 {
                allow(r, m.body.clone());
            }
        }),
        ask("a write may have less data than it says", "region.data", |m, _| {
            let less = m.body.len() >= 16 && m.body.len() - 16 < m.u32(12) as usize;
            when(
                m.is(Command::REGION_WRITE) && less,
                Do::Reply(m.body.get(..16).unwrap_or_default().to_vec()),
            )
        }),
        ask("every REGION_WRITE_MULTI succeeds", "region.multi", |m, _| {
            when(m.is(Command::REGION_WRITE_MULTI), Do::Reply(m.body.get(..8).unwrap_or_default().to_vec()))
        }),
    ]
}
