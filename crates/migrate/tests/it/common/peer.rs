//! A peer that a test scripts frame by frame.

use std::io::IoSlice;
use std::time::Duration;

use limosa_migrate::link::{Link, SocketLink, Wait};
use limosa_stream::{Decoded, Decoder, Header, Kind, MigrationId, Preface, PrefaceFlags};

/// A peer made of frames.
pub struct Peer {
    pub link: SocketLink,
    pub sequence: u32,
    decoder: Decoder,
    /// Bytes of a device that have come.
    pub taken: u64,
}

impl Peer {
    pub fn new(link: SocketLink) -> Peer {
        Peer { link, sequence: 0, decoder: Decoder::new(), taken: 0 }
    }
    /// Whether the other side takes them.
    pub fn bytes(&mut self, bytes: &[u8]) -> bool {
        let wait = Wait::within(Duration::from_secs(10), None);
        let mut sent = 0;
        while sent < bytes.len() {
            // The other side may have hung up on it already.
            let Ok(some) = self.link.write(&[IoSlice::new(&bytes[sent..])], wait) else { return false };
            sent += some;
        }
        true
    }
    pub fn preface(&mut self, id: MigrationId) {
        self.bytes(&Preface::new(id, PrefaceFlags::empty()).encode());
    }
    pub fn frame(&mut self, kind: Kind, section: u32, position: u64, payload: &[u8]) {
        self.try_frame(kind, section, position, payload);
    }
    /// Whether the other side takes it.
    pub fn try_frame(&mut self, kind: Kind, section: u32, position: u64, payload: &[u8]) -> bool {
        let header = Header::new(kind, section, position, self.sequence, payload);
        self.sequence += 1;
        self.bytes(&[&header.encode()[..], payload].concat())
    }
    /// A frame whose header is whole and names a length that its kind cannot have.
    pub fn lie_of_length(&mut self, kind: Kind, length: u32) {
        let mut header = Header::new(Kind::PROGRESS, 0, 0, self.sequence, &[0; 8]).encode();
        header[..2].copy_from_slice(&kind.0.to_le_bytes());
        header[8..12].copy_from_slice(&length.to_le_bytes());
        let checksum = crc32c::crc32c(&header[..28]);
        header[28..].copy_from_slice(&checksum.to_le_bytes());
        self.sequence += 1;
        self.bytes(&header);
    }
    /// The id of the other side's preface.
    pub fn read_id(&mut self) -> MigrationId {
        loop {
            match self.decoder.next().unwrap() {
                Some(Decoded::Preface(preface)) => return preface.id,
                Some(_) => panic!("a preface is due"),
                None => self.more(),
            }
        }
    }
    /// The next frame that is not PROGRESS; FLUSH is answered, with credit for what has come.
    pub fn read(&mut self) -> (Kind, Vec<u8>) {
        loop {
            match self.decoder.next().unwrap() {
                Some(Decoded::Frame { header, payload, .. }) if header.kind != Kind::PROGRESS => {
                    let (kind, payload) = (header.kind, payload.to_vec());
                    if kind == Kind::DEVICE_DATA {
                        self.taken = header.position + payload.len() as u64;
                    }
                    if kind != Kind::FLUSH {
                        return (kind, payload);
                    }
                    self.frame(Kind::CREDIT, 0, self.taken, &[]);
                    self.frame(Kind::FLUSHED, header.section, header.position, &[]);
                }
                Some(_) => {}
                None => self.more(),
            }
        }
    }
    /// The next frame of any kind, which is not answered; `None` when the other side has hung up.
    pub fn next(&mut self) -> Option<Header> {
        loop {
            if let Some(Decoded::Frame { header, .. }) = self.decoder.next().unwrap() {
                return Some(header);
            }
            let mut piece = [0; 4096];
            let got = self.link.read(&mut piece, Wait::within(Duration::from_secs(10), None)).ok()?;
            self.decoder.push(&piece[..got]);
        }
    }
    fn more(&mut self) {
        let mut piece = [0; 4096];
        let got = self.link.read(&mut piece, Wait::within(Duration::from_secs(10), None)).unwrap();
        self.decoder.push(&piece[..got]);
    }
}
