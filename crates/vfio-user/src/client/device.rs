//! [`Client`] as a [`Device`]: everything but FEATURE (`vfio-user.rst`, from VFIO_USER_DMA_MAP to
//! VFIO_USER_DEVICE_RESET).

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use limosa_client::{
    Device, DeviceIdentity, DirtyBits, DmaMap, DmaMemory, Error, FeatureReply, FeatureRequest, IrqAction,
    Refers, Region, Result,
};
use limosa_protocol::capability::mappable;
use limosa_protocol::feature::FeatureDmaLoggingReport;
use limosa_protocol::info::{
    DeviceInfo, DmaUnmapFlags, IRQ_INDEXES_MAX, IRQ_VECTORS_MAX, IrqInfo, IrqSet, IrqSetFlags, REGIONS_MAX,
    RegionInfo,
};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp};
use zerocopy::{FromBytes, IntoBytes};

use super::dma::{FileTarget, os_errno};
use super::exchange::{Ask, Limit};
use super::{Client, INFO_ASKS_MAX, INFO_BYTES_MAX};
use crate::codec::{Command, DirtyBitmap, DmaMapMessage, DmaUnmapMessage, RegionAccess};

impl Device for Client {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn identity(&self) -> Option<DeviceIdentity> {
        Some(self.shared.identity)
    }

    fn feature(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        self.shared.feature(request)
    }

    fn reset(&self) -> Result<()> {
        let request = "DEVICE_RESET";
        let ask = Ask { command: Command::DEVICE_RESET, body: &[], fds: &[] };
        let limit = Limit::from_now(self.shared.options.state_limit);
        let _change = self.shared.session.change();
        let done = self.shared.exchange.call(&ask, &mut [], limit);
        // A server may keep the state; it is queried when needed.
        self.shared.session.set_state(None);
        self.shared.session.end();
        done.map(drop).map_err(|failure| self.shared.error(request, failure))
    }

    fn info(&self) -> Result<DeviceInfo> {
        let argsz = size_of::<DeviceInfo>() as u32;
        let ask = DeviceInfo { argsz, ..DeviceInfo::default() };
        let info: DeviceInfo = self.ask_info("DEVICE_GET_INFO", Command::DEVICE_GET_INFO, ask.as_bytes())?;
        if info.num_regions > REGIONS_MAX || info.num_irqs > IRQ_INDEXES_MAX {
            return Err(self.shared.misbehaved(format!(
                "DEVICE_GET_INFO answered with {} regions and {} interrupt indexes, more than {REGIONS_MAX} and \
                 {IRQ_INDEXES_MAX}",
                info.num_regions, info.num_irqs
            )));
        }
        Ok(info)
    }

    fn region(&self, index: u32) -> Result<Region> {
        let request = "DEVICE_GET_REGION_INFO";
        let (mut argsz, mut asks) = (1024, 1);
        loop {
            let ask = RegionInfo { argsz, index, ..RegionInfo::default() };
            let mut body = vec![0; argsz as usize];
            let command = Command::DEVICE_GET_REGION_INFO;
            let answer = self.shared.call(request, command, &[ask.as_bytes()], &mut [&mut body])?;
            body.truncate(answer.body_bytes);
            let Ok((info, _)) = RegionInfo::read_from_prefix(&body) else {
                return Err(self.shared.short(request, answer.body_bytes, size_of::<RegionInfo>()));
            };
            if info.index != index {
                return Err(self
                    .shared
                    .misbehaved(format!("{request} of {index} answered with {}", info.index)));
            }
            if info.argsz > argsz && info.argsz <= INFO_BYTES_MAX && asks < INFO_ASKS_MAX {
                (argsz, asks) = (info.argsz, asks + 1);
                continue;
            }
            let fd = answer.fds.fds.into_iter().next();
            let mappable = mappable(&info, &body)
                .map_err(|error| self.shared.misbehaved(format!("{request} of {index}: {error}")))?;
            // A region without an fd cannot be mapped.
            let mappable = if fd.is_some() { mappable } else { Vec::new() };
            return Ok(Region { info, mappable, fd });
        }
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        let request = "DEVICE_GET_IRQ_INFO";
        let ask = IrqInfo { argsz: size_of::<IrqInfo>() as u32, index, ..IrqInfo::default() };
        let info: IrqInfo = self.ask_info(request, Command::DEVICE_GET_IRQ_INFO, ask.as_bytes())?;
        if info.index != index {
            return Err(self.shared.misbehaved(format!("{request} of {index} answered with {}", info.index)));
        }
        if info.count > IRQ_VECTORS_MAX {
            return Err(self.shared.misbehaved(format!(
                "{request} of {index} answered with {} vectors, more than {IRQ_VECTORS_MAX}",
                info.count
            )));
        }
        Ok(info)
    }

    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let request = "REGION_READ";
        let bytes_max = self.shared.limits.data_xfer_bytes_max as usize;
        let (mut at, mut pieces) = (offset, self.shared.pieces());
        for chunk in data.chunks_mut(bytes_max) {
            let count = chunk.len();
            let ask = RegionAccess { offset: at, region, count: count as u32 };
            let mut reply = RegionAccess::default();
            let into: &mut [&mut [u8]] = &mut [reply.as_mut_bytes(), chunk];
            let limit = pieces.next(count);
            let answer =
                self.shared.call_within(limit, request, Command::REGION_READ, &[ask.as_bytes()], into)?;
            if answer.body_bytes != RegionAccess::BYTES + count || reply.count != ask.count {
                return Err(self.shared.short(request, answer.body_bytes, RegionAccess::BYTES + count));
            }
            at = at.wrapping_add(count as u64);
        }
        Ok(())
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        let request = "REGION_WRITE";
        self.region_write_chunks(region, offset, data, |limit, ask, chunk| {
            let mut reply = RegionAccess::default();
            let into: &mut [&mut [u8]] = &mut [reply.as_mut_bytes()];
            let body: &[&[u8]] = &[ask.as_bytes(), chunk];
            let answer = self.shared.call_within(limit, request, Command::REGION_WRITE, body, into)?;
            if answer.body_bytes < RegionAccess::BYTES || reply.count != ask.count {
                return Err(self
                    .shared
                    .misbehaved(format!("{request} of {} bytes answered with {}", ask.count, reply.count)));
            }
            Ok(())
        })
    }

    fn region_write_posted(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.region_write_chunks(region, offset, data, |limit, ask, chunk| {
            self.shared.post(limit, "REGION_WRITE", Command::REGION_WRITE, &[ask.as_bytes(), chunk])
        })
    }

    fn set_irqs(&self, index: u32, start: u32, action: IrqAction<'_>) -> Result<()> {
        let (start, count, flag) = match action {
            IrqAction::Disable => (0, 0, IrqSetFlags::ACTION_TRIGGER),
            IrqAction::Trigger(count) => (start, count, IrqSetFlags::ACTION_TRIGGER),
            IrqAction::Mask(count) => (start, count, IrqSetFlags::ACTION_MASK),
            IrqAction::Unmask(count) => (start, count, IrqSetFlags::ACTION_UNMASK),
            IrqAction::Wire(fds) => return self.wire_irqs(index, start, fds),
        };
        let flags = IrqSetFlags::DATA_NONE | flag;
        self.set_irqs_once(self.shared.limit(), index, (start, count), flags, &[])
    }

    fn dma_map(&self, map: &DmaMap<'_>) -> Result<()> {
        let shared = &self.shared;
        if shared.exchange.dma.len() as u64 >= shared.limits.dma_maps_max {
            return Err(
                shared.usage(format!("more than the {} mappings agreed on", shared.limits.dma_maps_max))
            );
        }
        if map.size == 0 || map.iova.checked_add(map.size - 1).is_none() {
            return Err(shared.usage(format!("a mapping of {:#x} bytes at {:#x}", map.size, map.iova)));
        }
        let mut message = DmaMapMessage {
            argsz: DmaMapMessage::BYTES as u32,
            flags: map.flags.bits(),
            offset: 0,
            address: map.iova,
            size: map.size,
        };
        let mut fds = None;
        let target = match map.memory {
            DmaMemory::Address(_) => {
                return Err(shared.usage("a vfio-user device cannot reach an address".into()));
            }
            DmaMemory::Messages(target) => Arc::clone(target),
            DmaMemory::File { fd, offset } => {
                if shared.limits.msg_fds_max > 0 {
                    message.offset = offset;
                    fds = Some(fd);
                }
                let fd = fd.try_clone_to_owned().map_err(|error| Error::Os {
                    device: shared.name.clone(),
                    what: "DMA_MAP".into(),
                    errno: os_errno(&error),
                    hint: "".into(),
                })?;
                Arc::new(FileTarget { fd, offset })
            }
        };
        // Serve it from the moment at which the server knows about it.
        let added = shared.exchange.dma.insert(map.iova, map.size, map.flags, target);
        added.map_err(|errno| shared.refused("DMA_MAP", errno))?;
        if fds.is_none()
            && shared.twin.is_none()
            && let Err(error) = shared.exchange.start_reader()
        {
            shared.exchange.dma.take_back(map.iova);
            return Err(Error::Os {
                device: shared.name.clone(),
                what: "a thread for DMA".into(),
                errno: os_errno(&error),
                hint: "".into(),
            });
        }
        let fds: &[BorrowedFd<'_>] = fds.as_slice();
        let mapped =
            shared.call_with(shared.limit(), "DMA_MAP", Command::DMA_MAP, &[message.as_bytes()], fds);
        if mapped.is_err() {
            shared.exchange.dma.take_back(map.iova);
        }
        match mapped {
            Err(Error::Refused { device, request, errno: errno @ Errno::ENOTSUP, .. }) if !fds.is_empty() => {
                let hint = "the server may map only memfds, and files on tmpfs or hugetlbfs: give it such memory, \
                            or see whether it has an option for other files (limosa serve --any-file)";
                Err(Error::Refused { device, request, errno, hint: hint.into() })
            }
            mapped => mapped.map(drop),
        }
    }

    fn dma_unmap(&self, iova: u64, size: u64, dirty: Option<DirtyBits<'_>>) -> Result<()> {
        let dma = &self.shared.exchange.dma;
        // Without `dirty`, writes to the range stay in the log for a later report.
        let was_there = match dirty {
            None => {
                self.unmap(iova, size)?;
                dma.remove(iova, size)
            }
            Some(DirtyBits { page_size, words }) => {
                self.unmap_report(iova, size, DirtyBits { page_size, words: &mut *words })?;
                // Not before the last write to it is over.
                let was_there = dma.remove(iova, size);
                dma.log.harvest(iova, size, page_size, words);
                was_there
            }
        };
        // A server may say that unmapping nothing went well, as the kernel's type1 does.
        if was_there { Ok(()) } else { Err(self.shared.refused("DMA_UNMAP", Errno::ENOENT)) }
    }
}

impl Client {
    /// A question whose answer is one structure.
    fn ask_info<T: FromBytes + IntoBytes>(&self, request: &str, command: Command, ask: &[u8]) -> Result<T> {
        let mut info = T::new_zeroed();
        let bytes = self.shared.call(request, command, &[ask], &mut [info.as_mut_bytes()])?.body_bytes;
        if bytes < size_of::<T>() {
            return Err(self.shared.short(request, bytes, size_of::<T>()));
        }
        Ok(info)
    }

    fn region_write_chunks(
        &self,
        region: u32,
        offset: u64,
        data: &[u8],
        mut write: impl FnMut(Limit, &RegionAccess, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let bytes_max = self.shared.limits.data_xfer_bytes_max as usize;
        let (mut at, mut pieces) = (offset, self.shared.pieces());
        for chunk in data.chunks(bytes_max) {
            write(
                pieces.next(chunk.len()),
                &RegionAccess { offset: at, region, count: chunk.len() as u32 },
                chunk,
            )?;
            at = at.wrapping_add(chunk.len() as u64);
        }
        Ok(())
    }

    fn set_irqs_once(
        &self,
        limit: Limit,
        index: u32,
        (start, count): (u32, u32),
        flags: IrqSetFlags,
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        let set = IrqSet { argsz: size_of::<IrqSet>() as u32, flags: flags.bits(), index, start, count };
        let (request, command) = ("DEVICE_SET_IRQS", Command::DEVICE_SET_IRQS);
        self.shared.call_with(limit, request, command, &[set.as_bytes()], fds).map(drop)
    }

    /// Wires runs of vectors: those with an fd in messages with as many fds as the server accepts, those without
    /// one in a message without fds.
    fn wire_irqs(&self, index: u32, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        let flags = IrqSetFlags::DATA_EVENTFD | IrqSetFlags::ACTION_TRIGGER;
        let fds_max = self.shared.limits.msg_fds_max;
        if fds_max == 0 && fds.iter().any(Option::is_some) {
            return Err(self.shared.usage("the server accepts no fds, so no interrupt can be wired".into()));
        }
        let vector = |at: usize| {
            u32::try_from(at)
                .ok()
                .and_then(|at| start.checked_add(at))
                .ok_or_else(|| self.shared.usage("interrupt vectors beyond 2^32".into()))
        };
        // Independent of the number of fds that the server accepts in one message.
        let limit = self.shared.limit();
        let mut at = 0;
        for run in fds.chunk_by(|a, b| a.is_some() == b.is_some()) {
            let wired: Vec<BorrowedFd<'_>> = run.iter().filter_map(|fd| *fd).collect();
            for some in wired.chunks(fds_max.max(1)) {
                self.set_irqs_once(limit, index, (vector(at)?, some.len() as u32), flags, some)?;
                at += some.len();
            }
            if wired.is_empty() {
                self.set_irqs_once(limit, index, (vector(at)?, run.len() as u32), flags, &[])?;
                at += run.len();
            }
        }
        Ok(())
    }

    fn unmap(&self, iova: u64, size: u64) -> Result<()> {
        let argsz = DmaUnmapMessage::BYTES as u32;
        let message = DmaUnmapMessage { argsz, flags: 0, address: iova, size };
        self.shared.call("DMA_UNMAP", Command::DMA_UNMAP, &[message.as_bytes()], &mut []).map(drop)
    }

    /// Unmaps and reports in one request where the server can. Where it cannot, a report goes before
    /// the unmap; as a device that runs may write in between, all pages are then dirty.
    fn unmap_report(&self, iova: u64, size: u64, dirty: DirtyBits<'_>) -> Result<()> {
        let shared = &self.shared;
        let request = "DMA_UNMAP with GET_DIRTY_BITMAP";
        if !dirty.page_size.is_power_of_two() {
            return Err(shared.usage(format!("{request} with pages of {} bytes", dirty.page_size)));
        }
        let pages = size.div_ceil(dirty.page_size);
        let Some(words) =
            usize::try_from(pages.div_ceil(64)).ok().filter(|&words| words <= dirty.words.len())
        else {
            return Err(shared.usage(format!("{request}: no room for {pages} pages")));
        };
        let words = &mut dirty.words[..words];
        if !shared.plain_unmap.load(Ordering::Relaxed) {
            match self.unmap_with_bitmap(iova, size, dirty.page_size, words) {
                Err(Error::Refused { .. }) => {}
                other => return other,
            }
        }
        let stopped = matches!(shared.session.state(), Some(state) if !state.is_running());
        let mut reported = vec![0; words.len()];
        let mut payload = FeatureDmaLoggingReport { iova, length: size, page_size: dirty.page_size };
        let exact = stopped
            && shared
                .feature(&mut FeatureRequest {
                    index: FeatureIndex::DMA_LOGGING_REPORT,
                    op: FeatureOp::GET,
                    payload: payload.as_mut_bytes(),
                    refers: Refers::Bitmap(&mut reported),
                })
                .is_ok();
        // Pages that the report cleared in the log are dirty even if the unmap fails.
        if exact {
            words.iter_mut().zip(&reported).for_each(|(word, more)| *word |= more);
        }
        self.unmap(iova, size)?;
        // Not before the plain form has shown that the request itself was in order.
        shared.plain_unmap.store(true, Ordering::Relaxed);
        if !exact {
            set_pages(words, pages);
        }
        Ok(())
    }

    fn unmap_with_bitmap(&self, iova: u64, size: u64, page_size: u64, words: &mut [u64]) -> Result<()> {
        let shared = &self.shared;
        let request = "DMA_UNMAP with GET_DIRTY_BITMAP";
        let bitmap_bytes = words.len() * 8;
        let fixed = DmaUnmapMessage::BYTES + DirtyBitmap::BYTES;
        let Ok(argsz) = u32::try_from(fixed + bitmap_bytes) else {
            return Err(shared.usage(format!("{request}: a bitmap of {bitmap_bytes} bytes")));
        };
        let flags = DmaUnmapFlags::GET_DIRTY_BITMAP.bits();
        let message = DmaUnmapMessage { argsz, flags, address: iova, size };
        let bitmap = DirtyBitmap { page_size, size: bitmap_bytes as u64 };
        let mut reply = [0; DmaUnmapMessage::BYTES + DirtyBitmap::BYTES];
        let mut got = vec![0u64; words.len()];
        let body = [message.as_bytes(), bitmap.as_bytes()];
        let into: &mut [&mut [u8]] = &mut [&mut reply, got.as_mut_bytes()];
        let answer = shared.call(request, Command::DMA_UNMAP, &body, into)?;
        let pages = size.div_ceil(page_size);
        if answer.body_bytes < fixed + bitmap_bytes {
            // It is unmapped, but the dirty pages are unknown.
            set_pages(words, pages);
            return Ok(());
        }
        if !pages.is_multiple_of(64)
            && let Some(last) = got.last_mut()
        {
            *last &= (1 << (pages % 64)) - 1;
        }
        words.iter_mut().zip(&got).for_each(|(word, more)| *word |= more);
        Ok(())
    }
}

/// Sets the bits of the first pages.
fn set_pages(words: &mut [u64], pages: u64) {
    let last = words.len().saturating_sub(1);
    for (at, word) in words.iter_mut().enumerate() {
        *word = match pages % 64 {
            rest if at == last && rest != 0 => *word | ((1 << rest) - 1),
            _ => u64::MAX,
        };
    }
}
