//! Which frame may follow which (`docs/stream.md: Order`). Every reader of a source's half of a stream uses it: the
//! destination, a load, an inspection.

use limosa_protocol::feature::PrecopyInfo;

use super::body::{decode_device_end, decode_hint, decode_round, decode_u32, decode_u64};
use super::{
    DEVICE_BYTES_MAX, Damage, Header, Kind, MemoryFacts, Offer, Proofs, RunningCrc, Runs, Seal, Totals,
};

/// A frame that is in order, and its content. Devices and memory regions are named by their index in the offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// A device's data follows.
    DeviceBegin(usize),
    /// The next bytes of a device's data.
    DeviceData(usize, &'a [u8]),
    /// A device's pre-copy info.
    DeviceHint(usize, PrecopyInfo),
    /// A device's data is complete.
    DeviceEnd(usize),
    /// Pages of a memory region, from this offset on, in bytes.
    MemoryData(usize, u64, &'a [u8]),
    /// Zeroes in a memory region: offset and length, in bytes.
    MemoryZero(usize, u64, u64),
    /// Several runs of pages of a memory region.
    MemoryRuns(usize, Runs<'a>),
    /// A round is over; this many bytes of memory are still dirty.
    Round(u32, u64),
    /// The source asks whether everything before this is handled.
    Flush,
    /// The source has more of a device's data than its window allows to be on its way.
    WindowFull(usize),
    /// The source uses this many links, fewer than were agreed on.
    Links(u32),
    /// The source's devices are stopped.
    Stopped,
    /// Everything has arrived, and the totals agree.
    Sum,
    /// The end of a saved stream. The caller, which has the bytes, checks the hash.
    Sealed(Seal),
    /// The destination is told to run.
    Commit,
    /// A frame without meaning for the reader.
    Skipped,
}

/// Follows a source's half of a stream from its OFFER on.
#[derive(Debug)]
pub struct Order {
    devices: Vec<Device>,
    memory: Vec<MemoryFacts>,
    totals: Totals,
    stopped: bool,
    summed: bool,
    sealed: bool,
    committed: bool,
    proofs: Proofs,
}

#[derive(Debug)]
struct Device {
    id: u32,
    begun: bool,
    ended: bool,
    bytes: u64,
    crc: RunningCrc,
}

impl Order {
    /// A stream without proofs whose OFFER has been read.
    pub fn new(offer: &Offer) -> Order {
        let device = |id| Device { id, begun: false, ended: false, bytes: 0, crc: RunningCrc::new() };
        Order {
            devices: offer.devices.iter().map(|facts| device(facts.id)).collect(),
            memory: offer.memory.clone(),
            totals: Totals::default(),
            stopped: false,
            summed: false,
            sealed: false,
            committed: false,
            proofs: Proofs::none(),
        }
    }

    /// The same for a stream whose SUM and COMMIT carry these proofs.
    pub fn with_proofs(self, proofs: Proofs) -> Order {
        Order { proofs, ..self }
    }

    /// Bytes that have arrived so far.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Bytes of one device that have arrived so far, and whether its data is complete.
    pub fn device(&self, at: usize) -> (u64, bool) {
        (self.devices[at].bytes, self.devices[at].ended)
    }

    /// The index of the device that a frame belongs to.
    pub fn section(&mut self, header: &Header) -> Result<usize, Damage> {
        self.find(header).map(|(at, _)| at)
    }

    /// The position in a device's stream that is expected next; `None` before DEVICE_BEGIN.
    pub fn due(&self, at: usize) -> Option<u64> {
        self.devices[at].begun.then_some(self.devices[at].bytes)
    }

    /// Whether the SUM has arrived, so that the stream is complete.
    pub fn is_whole(&self) -> bool {
        self.summed
    }

    /// Whether the SEAL has arrived, after which no frame is allowed.
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Takes the next frame. The caller has checked the payload against its checksum. After an error nothing has changed.
    pub fn next<'a>(&mut self, header: &Header, payload: &'a [u8]) -> Result<Step<'a>, Damage> {
        let kind = header.kind;
        let misplaced = |why: &str| Err(Damage::Misplaced { kind, why: why.into() });
        if self.sealed {
            return misplaced("it follows the SEAL");
        }
        if kind.name().is_none() || matches!(kind, Kind::PROGRESS) {
            return Ok(Step::Skipped);
        }
        if self.summed && !matches!(kind, Kind::COMMIT | Kind::SEAL) {
            return misplaced("it follows the SUM");
        }
        Ok(match kind {
            Kind::DEVICE_BEGIN => {
                let (at, device) = self.find(header)?;
                if device.begun {
                    return misplaced("the device has begun already");
                }
                device.begun = true;
                Step::DeviceBegin(at)
            }
            Kind::DEVICE_DATA => {
                let (at, device) = self.find(header)?;
                device.check_open(kind)?;
                if header.position != device.bytes {
                    let why = format!("it starts at byte {}, byte {} is due", header.position, device.bytes);
                    return Err(Damage::Misplaced { kind, why });
                }
                let bytes = device.bytes + payload.len() as u64;
                if bytes > DEVICE_BYTES_MAX {
                    return misplaced("the device's stream is too long");
                }
                device.crc.add(payload);
                device.bytes = bytes;
                self.totals.device_bytes += payload.len() as u64;
                Step::DeviceData(at, payload)
            }
            Kind::DEVICE_HINT => {
                let (at, device) = self.find(header)?;
                device.check_open(kind)?;
                Step::DeviceHint(at, decode_hint(payload))
            }
            Kind::DEVICE_END => {
                let stopped = self.stopped;
                let (at, device) = self.find(header)?;
                device.check_open(kind)?;
                if !stopped {
                    return misplaced("the source is not stopped yet");
                }
                let (bytes, crc) = decode_device_end(payload);
                if bytes != device.bytes {
                    let why = format!("it counts {bytes} bytes, {} came", device.bytes);
                    return Err(Damage::Misplaced { kind, why });
                }
                let computed = device.crc.value();
                if crc != computed {
                    let of = "a device's data";
                    return Err(Damage::Checksum { of, expected: crc, computed });
                }
                device.ended = true;
                Step::DeviceEnd(at)
            }
            Kind::MEMORY_DATA => {
                let at = self.count_pages(header, payload.len() as u64)?;
                Step::MemoryData(at, header.position, payload)
            }
            Kind::MEMORY_ZERO => {
                let length = decode_u64(payload);
                let at = self.pages(header, length)?;
                self.totals.zero_bytes = self.totals.zero_bytes.saturating_add(length);
                Step::MemoryZero(at, header.position, length)
            }
            Kind::MEMORY_RUNS => {
                let at = self.region(header)?;
                let region = &self.memory[at];
                let runs = Runs::decode(payload, header.position, region.page_bytes, region.bytes)?;
                self.totals.memory_bytes = self.totals.memory_bytes.saturating_add(runs.data_bytes());
                self.totals.zero_bytes = self.totals.zero_bytes.saturating_add(runs.zero_bytes());
                Step::MemoryRuns(at, runs)
            }
            Kind::ROUND if self.stopped => return misplaced("the source is stopped"),
            Kind::ROUND => {
                let (round, dirty_bytes) = decode_round(payload);
                Step::Round(round, dirty_bytes)
            }
            Kind::STOPPED if self.stopped => return misplaced("it came already"),
            Kind::STOPPED => {
                self.stopped = true;
                Step::Stopped
            }
            Kind::SUM => {
                if !self.stopped {
                    return misplaced("the source is not stopped yet");
                }
                if let Some(device) = self.devices.iter().find(|device| !device.ended) {
                    let why = format!("device {} has not ended", device.id);
                    return Err(Damage::Misplaced { kind, why });
                }
                let sum = Totals::decode(self.proofs.check(kind, payload)?);
                if sum != self.totals {
                    let why = format!("it says {sum:?}, received {:?}", self.totals);
                    return Err(Damage::Misplaced { kind, why });
                }
                self.summed = true;
                Step::Sum
            }
            Kind::SEAL if self.summed && !self.committed => {
                self.sealed = true;
                Step::Sealed(Seal::decode(payload))
            }
            Kind::SEAL => return misplaced("the SUM has not come"),
            Kind::FLUSH => Step::Flush,
            Kind::WINDOW_FULL => {
                let (at, device) = self.find(header)?;
                device.check_open(kind)?;
                Step::WindowFull(at)
            }
            Kind::LINKS => Step::Links(decode_u32(payload)),
            Kind::COMMIT if self.summed && !self.committed => {
                self.proofs.check(kind, payload)?;
                self.committed = true;
                Step::Commit
            }
            Kind::COMMIT => return misplaced("nothing is ready to be committed"),
            _ => return misplaced("a source does not send it here"),
        })
    }

    /// The index of the region to which a MEMORY_DATA belongs whose payload has not come yet and is not compressed. The payload may be
    /// received there. Nothing changes; [`Order::received`] takes the frame once its payload is checked.
    pub fn memory_region(&self, header: &Header) -> Result<usize, Damage> {
        let misplaced = |why: &str| Err(Damage::Misplaced { kind: header.kind, why: why.into() });
        if self.summed {
            return misplaced("it follows the SUM");
        }
        if header.kind != Kind::MEMORY_DATA || header.compressed {
            return misplaced("its payload is not pages as they are");
        }
        self.pages(header, header.length.into())
    }

    /// Takes a MEMORY_DATA whose pages were received where they belong, as [`Order::next`] takes others.
    pub fn received(&mut self, header: &Header) -> Result<(), Damage> {
        self.memory_region(header)?;
        self.count_pages(header, header.length.into()).map(drop)
    }

    fn count_pages(&mut self, header: &Header, length: u64) -> Result<usize, Damage> {
        let at = self.pages(header, length)?;
        self.totals.memory_bytes = self.totals.memory_bytes.saturating_add(length);
        Ok(at)
    }

    fn find(&mut self, header: &Header) -> Result<(usize, &mut Device), Damage> {
        let found = self.devices.iter_mut().enumerate().find(|(_, device)| device.id == header.section);
        found.ok_or_else(|| Damage::Misplaced {
            kind: header.kind,
            why: format!("device {} was not offered", header.section),
        })
    }

    /// The index of the memory region that a frame belongs to.
    fn region(&self, header: &Header) -> Result<usize, Damage> {
        let found = self.memory.iter().position(|region| region.id == header.section);
        found.ok_or_else(|| Damage::Misplaced {
            kind: header.kind,
            why: format!("memory region {} was not offered", header.section),
        })
    }

    /// Finds the region and checks a run of pages in it.
    fn pages(&self, header: &Header, length: u64) -> Result<usize, Damage> {
        let refuse = |why: String| Err(Damage::Misplaced { kind: header.kind, why });
        let at = self.region(header)?;
        let region = &self.memory[at];
        let start = header.position;
        let inside = start.checked_add(length).is_some_and(|end| end <= region.bytes);
        if length == 0 || !inside {
            return refuse(format!("{length} bytes at {start:#x} of region {} lie outside it", region.id));
        }
        if !start.is_multiple_of(region.page_bytes) || !length.is_multiple_of(region.page_bytes) {
            return refuse(format!("{length} bytes at {start:#x} are not whole pages"));
        }
        Ok(at)
    }
}

impl Device {
    fn check_open(&self, kind: Kind) -> Result<(), Damage> {
        let why = match (self.begun, self.ended) {
            (false, _) => "the device has not begun",
            (true, true) => "the device has ended",
            (true, false) => return Ok(()),
        };
        Err(Damage::Misplaced { kind, why: why.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::super::DeviceFacts;
    use super::super::body::{encode_device_end, encode_round};
    use super::*;

    fn order() -> Order {
        let device = |id| DeviceFacts { id, flags: 1, ..Default::default() };
        Order::new(&Offer {
            devices: vec![device(4), device(9)],
            memory: vec![MemoryFacts { id: 2, address: 0, bytes: 0x4000, page_bytes: 0x1000 }],
            ..Offer::default()
        })
    }

    fn take(
        order: &mut Order,
        kind: Kind,
        section: u32,
        position: u64,
        payload: &[u8],
    ) -> Result<(), Damage> {
        order.next(&Header::new(kind, section, position, 0, payload), payload).map(drop)
    }

    /// A MEMORY_RUNS of one page and a page of zeroes behind a gap of one page.
    fn runs_at(position: u64) -> Vec<u8> {
        let mut table = super::super::RunsTable::new(0x1000);
        assert!(table.add(position, 0x1000, false) && table.add(position + 0x2000, 0x1000, true));
        let mut payload = vec![7; 0x1000 + table.tail_bytes()];
        table.encode(&mut payload[0x1000..]);
        payload
    }

    fn end_of(data: &[u8]) -> [u8; 16] {
        encode_device_end(data.len() as u64, crc32c::crc32c(data))
    }

    #[test]
    fn a_whole_stream_is_taken() {
        let mut order = order();
        take(&mut order, Kind::DEVICE_BEGIN, 9, 0, &[]).unwrap();
        take(&mut order, Kind::DEVICE_DATA, 9, 0, b"abc").unwrap();
        take(&mut order, Kind::MEMORY_DATA, 2, 0x1000, &[1; 0x1000]).unwrap();
        take(&mut order, Kind::MEMORY_ZERO, 2, 0, &0x4000u64.to_le_bytes()).unwrap();
        take(&mut order, Kind::MEMORY_RUNS, 2, 0x1000, &runs_at(0x1000)).unwrap();
        take(&mut order, Kind::ROUND, 0, 0, &encode_round(1, 0)).unwrap();
        take(&mut order, Kind::DEVICE_BEGIN, 4, 0, &[]).unwrap();
        take(&mut order, Kind::STOPPED, 0, 0, &[]).unwrap();
        take(&mut order, Kind::DEVICE_END, 4, 0, &end_of(b"")).unwrap();
        take(&mut order, Kind::DEVICE_DATA, 9, 3, b"defg").unwrap();
        take(&mut order, Kind::DEVICE_END, 9, 0, &end_of(b"abcdefg")).unwrap();
        let sum = Totals { device_bytes: 7, memory_bytes: 0x2000, zero_bytes: 0x5000 };
        take(&mut order, Kind::SUM, 0, 0, &sum.encode()).unwrap();
        assert!(order.is_whole());
        take(&mut order, Kind::COMMIT, 0, 0, &[]).unwrap();
        assert!(take(&mut order, Kind::COMMIT, 0, 0, &[]).is_err());
    }

    #[test]
    fn pages_that_are_received_where_they_belong_are_checked_and_counted_like_others() {
        let mut order = order();
        let data = |position, bytes| Header::new(Kind::MEMORY_DATA, 2, position, 0, &vec![7; bytes]);
        let header = data(0x1000, 0x2000);
        assert_eq!(order.memory_region(&header), Ok(0));
        assert_eq!(order.totals().memory_bytes, 0, "nothing has come yet");
        assert_eq!(order.received(&header), Ok(()));
        assert_eq!(order.totals().memory_bytes, 0x2000);
        let of_nobody = Header { section: 3, ..header };
        let compressed = Header { compressed: true, ..header };
        let runs = Header { kind: Kind::MEMORY_RUNS, ..header };
        for header in [data(0x3000, 0x2000), data(0x800, 0x1000), data(0, 0x800), of_nobody, compressed, runs]
        {
            assert!(order.memory_region(&header).is_err() && order.received(&header).is_err(), "{header:?}");
        }
        assert_eq!(order.totals().memory_bytes, 0x2000);
        order.summed = true;
        assert!(order.memory_region(&header).is_err(), "nothing follows the SUM");
    }

    #[test]
    fn sum_and_commit_are_refused_without_the_proof_of_this_move() {
        use super::super::{MigrationId, Nonce, Secret};
        let proofs = |nonce| Proofs::new(Secret::new([1; 32]), MigrationId([2; 16]), Nonce::new([nonce; 32]));
        let (own, other) = (proofs(3), proofs(4));
        let mut order = Order::new(&Offer::default()).with_proofs(own.clone());
        take(&mut order, Kind::STOPPED, 0, 0, &[]).unwrap();
        let sum = Totals::default().encode();
        let mut refused = |kind, payload: &[u8]| {
            let refusal = take(&mut order, kind, 0, 0, payload).unwrap_err();
            assert!(matches!(refusal, Damage::Unproven { .. }), "{refusal}");
        };
        refused(Kind::SUM, &sum);
        refused(Kind::SUM, &other.prove(Kind::SUM, &sum));
        take(&mut order, Kind::SUM, 0, 0, &own.prove(Kind::SUM, &sum)).unwrap();
        let mut refused = |kind, payload: &[u8]| {
            let refusal = take(&mut order, kind, 0, 0, payload).unwrap_err();
            assert!(matches!(refusal, Damage::Unproven { .. }), "{refusal}");
        };
        refused(Kind::COMMIT, &[]);
        refused(Kind::COMMIT, &other.prove(Kind::COMMIT, &[]));
        refused(Kind::COMMIT, &own.prove(Kind::RUNNING, &[]));
        take(&mut order, Kind::COMMIT, 0, 0, &own.prove(Kind::COMMIT, &[])).unwrap();
    }

    #[test]
    fn frames_out_of_order_are_refused_and_change_nothing() {
        let mut order = order();
        let mut refused = |kind, section, position, payload: &[u8]| {
            assert!(
                take(&mut order, kind, section, position, payload).is_err(),
                "{kind} {section} {position}"
            );
        };
        refused(Kind::DEVICE_DATA, 9, 0, b"x");
        refused(Kind::DEVICE_BEGIN, 3, 0, &[]);
        refused(Kind::DEVICE_END, 9, 0, &end_of(b""));
        refused(Kind::SUM, 0, 0, &Totals::default().encode());
        refused(Kind::COMMIT, 0, 0, &[]);
        refused(Kind::READY, 0, 0, &[]);
        refused(Kind::OFFER, 0, 0, b"{}");
        refused(Kind::MEMORY_DATA, 1, 0, &[0; 0x1000]);
        refused(Kind::MEMORY_DATA, 2, 0x800, &[0; 0x1000]);
        refused(Kind::MEMORY_DATA, 2, 0, &[0; 0x1800]);
        refused(Kind::MEMORY_DATA, 2, 0x4000, &[0; 0x1000]);
        refused(Kind::MEMORY_RUNS, 1, 0, &runs_at(0));
        refused(Kind::MEMORY_RUNS, 2, 0x2000, &runs_at(0x2000));
        refused(Kind::MEMORY_RUNS, 2, 0x800, &runs_at(0x1000));
        refused(Kind::MEMORY_ZERO, 2, 0, &0u64.to_le_bytes());
        refused(Kind::MEMORY_ZERO, 2, 0x1000, &(u64::MAX - 0xfff).to_le_bytes());
        take(&mut order, Kind::DEVICE_BEGIN, 9, 0, &[]).unwrap();
        take(&mut order, Kind::DEVICE_DATA, 9, 0, b"abc").unwrap();
        let mut refused = |kind, section, position, payload: &[u8]| {
            assert!(
                take(&mut order, kind, section, position, payload).is_err(),
                "{kind} {section} {position}"
            );
        };
        refused(Kind::DEVICE_BEGIN, 9, 0, &[]);
        refused(Kind::DEVICE_DATA, 9, 2, b"x");
        refused(Kind::DEVICE_DATA, 9, 4, b"x");
        refused(Kind::DEVICE_DATA, 4, 3, b"x");
        refused(Kind::DEVICE_END, 9, 0, &end_of(b"abc"));
        take(&mut order, Kind::STOPPED, 0, 0, &[]).unwrap();
        let mut refused = |kind, section, position, payload: &[u8]| {
            assert!(
                take(&mut order, kind, section, position, payload).is_err(),
                "{kind} {section} {position}"
            );
        };
        refused(Kind::STOPPED, 0, 0, &[]);
        refused(Kind::DEVICE_END, 9, 0, &end_of(b"abcd"));
        refused(Kind::DEVICE_END, 9, 0, &end_of(b"abd"));
        take(&mut order, Kind::DEVICE_END, 9, 0, &end_of(b"abc")).unwrap();
        let sum = Totals { device_bytes: 3, ..Default::default() };
        assert!(take(&mut order, Kind::SUM, 0, 0, &sum.encode()).is_err(), "device 4 is missing");
        take(&mut order, Kind::DEVICE_BEGIN, 4, 0, &[]).unwrap();
        take(&mut order, Kind::DEVICE_END, 4, 0, &end_of(b"")).unwrap();
        assert!(take(&mut order, Kind::SUM, 0, 0, &Totals::default().encode()).is_err(), "wrong totals");
        take(&mut order, Kind::SUM, 0, 0, &sum.encode()).unwrap();
        assert!(take(&mut order, Kind::MEMORY_DATA, 2, 0, &[0; 0x1000]).is_err(), "after the SUM");
    }
}
