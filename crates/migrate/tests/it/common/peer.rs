//! A peer that a test scripts frame by frame.

use std::io::IoSlice;
use std::time::Duration;

use limosa_migrate::link::{Link, SocketLink, Wait};
use limosa_stream::body::encode_device_end;
use limosa_stream::{
    Answer, Decoded, Decoder, DeviceFacts, Header, Kind, MigrationId, Nonce, Offer, Preface, PrefaceFlags,
    Proofs, Secret, Totals, WINDOW_BYTES_MIN,
};

/// A peer made of frames.
pub struct Peer {
    pub link: SocketLink,
    pub sequence: u32,
    decoder: Decoder,
    /// Bytes of a device that have come.
    pub taken: u64,
    /// The id of the move.
    pub id: MigrationId,
    /// What it and the other side have agreed on.
    pub proofs: Proofs,
}

impl Peer {
    pub fn new(link: SocketLink) -> Peer {
        Peer {
            link,
            sequence: 0,
            decoder: Decoder::new(),
            taken: 0,
            id: MigrationId::default(),
            proofs: Proofs::none(),
        }
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
    /// As a source of a device that has the id 7, with a secret: sends the offer, and reads the answer.
    pub fn offer(&mut self, id: MigrationId, secret: Secret, offer: Offer) -> Answer {
        self.preface(id);
        let device = DeviceFacts { id: 7, name: "made up".into(), flags: 7, ..DeviceFacts::default() };
        let offer = Offer { devices: vec![device], secret: Some(secret.clone()), ..offer };
        self.frame(Kind::OFFER, 0, 0, &offer.encode().unwrap());
        assert_eq!(self.read_id(), id);
        let (kind, payload) = self.read();
        assert_eq!(kind, Kind::ANSWER);
        let answer = Answer::decode(&payload).unwrap();
        if let Some(challenge) = answer.challenge {
            self.proofs = Proofs::new(secret, id, challenge);
        }
        answer
    }
    /// Everything that a device whose state is `data` has, up to the SUM.
    pub fn whole(&mut self, data: &[u8]) -> Totals {
        self.frame(Kind::DEVICE_BEGIN, 7, 0, &[]);
        self.frame(Kind::DEVICE_DATA, 7, 0, data);
        self.frame(Kind::STOPPED, 0, 0, &[]);
        self.frame(Kind::DEVICE_END, 7, 0, &encode_device_end(data.len() as u64, crc32c::crc32c(data)));
        Totals { device_bytes: data.len() as u64, ..Totals::default() }
    }
    /// As a destination: reads the offer, and accepts it with a challenge.
    pub fn accept(&mut self) -> Offer {
        let id = self.read_id();
        self.id = id;
        let (kind, payload) = self.read();
        assert_eq!(kind, Kind::OFFER);
        let offer = Offer::decode(&payload).unwrap();
        let challenge = Nonce::random().unwrap();
        self.proofs = Proofs::new(offer.secret.clone().unwrap(), id, challenge);
        self.preface(id);
        let window = Some(WINDOW_BYTES_MIN);
        let answer = Answer { accepted: true, window, challenge: Some(challenge), ..Answer::default() };
        self.frame(Kind::ANSWER, 0, 0, &answer.encode().unwrap());
        offer
    }
    /// Reads on to a frame of this kind, which proves that it is of the move.
    pub fn expect(&mut self, kind: Kind) -> Vec<u8> {
        loop {
            let (found, payload) = self.read();
            if found == kind {
                return self.proofs.check(kind, &payload).unwrap().to_vec();
            }
        }
    }
    /// A word of the commit, with its proof.
    pub fn word(&mut self, kind: Kind, body: &[u8]) {
        let payload = self.proofs.prove(kind, body);
        self.frame(kind, 0, 0, &payload);
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
