//! An adversary on the links of a move: it reads what passes and puts whole frames of its own there, or in the place of
//! others, with checksums and numbers that are right. It knows no secret, so its proofs are made up, recorded or missing
//! (`docs/stream.md: Proofs`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use limosa_clockwork::simulation;
use limosa_stream::body::encode_abort;
use limosa_stream::{
    AbortCode, Answer, HEADER_BYTES, Header, Kind, MigrationId, Nonce, Offer, PREFACE_BYTES, PROOF_BYTES,
    Preface, PrefaceFlags, Proofs, Secret, Totals,
};

use crate::plan::{Chance, End, Fault, Planned, When};
use crate::world::PAGE;
use limosa_migrate::Phase;

/// How much of a move is recorded.
const RECORDED_BYTES_MAX: usize = 1 << 20;

/// The page that it sends over a link of its own, and that nobody else writes.
pub const STRANGE_PAGE: [u8; PAGE] = [0xdd; PAGE];

/// How it proves a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    Missing,
    Random,
    /// With the proof that the same word had before, on this link or another one.
    Replayed,
    /// With the proof of another word.
    Other,
    /// It has been told the secret: as if nobody checked.
    Right,
}

/// A word that it puts on a link.
#[derive(Clone, Copy, Debug)]
pub struct Forgery {
    pub kind: Kind,
    pub proof: Proof,
    /// In the place of the next frame of this kind, on whatever link that comes; otherwise at once.
    pub instead_of: Option<Kind>,
    /// What an OUTCOME says.
    pub outcome: u32,
}

/// What it has seen on all links, and what it waits for.
#[derive(Default)]
pub struct Seen {
    id: MigrationId,
    secret: Option<Secret>,
    challenge: Option<Nonce>,
    nonce: Option<Nonce>,
    /// The payloads of the words that carry proofs.
    words: Vec<(Kind, Vec<u8>)>,
    /// What the source has sent over the first link of the move.
    stream: Vec<u8>,
    standing: Vec<(End, Forgery)>,
    /// How many of its frames were put on a link.
    forged: u32,
}

/// The adversary. Clones are the same one.
#[derive(Clone, Default)]
pub struct Adversary(Arc<Mutex<Seen>>);

impl Adversary {
    pub fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the frame in whose place it puts this one.
    pub fn await_frame(&self, from: End, forgery: Forgery) {
        self.seen().standing.push((from, forgery));
    }

    /// It waits for nothing any more.
    pub fn gives_up(&self) {
        self.seen().standing.clear();
    }

    pub fn has_forged(&self) -> bool {
        self.seen().forged > 0
    }

    /// All that the source has sent over the first link of the move, if it was not too much.
    pub fn recorded(&self) -> Option<Vec<u8>> {
        let stream = self.seen().stream.clone();
        (stream.len() < RECORDED_BYTES_MAX && stream.len() > PREFACE_BYTES).then_some(stream)
    }

    /// What it sends over a link of its own, as the first further link of the move.
    pub fn joins(&self, proof: Proof) -> Vec<u8> {
        let id = self.seen().id;
        let join = Forgery { kind: Kind::JOIN, proof, instead_of: None, outcome: 0 };
        let memory = Header::new(Kind::MEMORY_DATA, 0, 0, 1, &STRANGE_PAGE);
        let preface = Preface::new(id, PrefaceFlags::FURTHER).encode();
        [&preface[..], &self.frame(&join, 0), &memory.encode(), &STRANGE_PAGE].concat()
    }

    /// The bytes of a frame with this number.
    fn frame(&self, forgery: &Forgery, sequence: u32) -> Vec<u8> {
        let mut seen = self.seen();
        seen.forged += 1;
        let kind = forgery.kind;
        let body = match kind {
            Kind::OUTCOME => forgery.outcome.to_le_bytes().to_vec(),
            Kind::JOIN => 1_u32.to_le_bytes().to_vec(),
            Kind::SUM => Totals::default().encode().to_vec(),
            Kind::ABORT | Kind::REFUSED => encode_abort(AbortCode::Other, "forged"),
            Kind::MEMORY_DATA => vec![0xee; 4096],
            _ => Vec::new(),
        };
        let random = || (0..PROOF_BYTES).map(|_| simulation::random(256) as u8).collect::<Vec<_>>();
        let of_same = || seen.words.iter().rev().find(|(known, _)| *known == kind);
        let of_other = || seen.words.iter().rev().find(|(known, _)| *known != kind);
        let payload = match forgery.proof {
            _ if kind.proof_bytes() == 0 => body,
            Proof::Missing => body,
            Proof::Random => [body, random()].concat(),
            Proof::Replayed => {
                of_same().map_or_else(|| [body, random()].concat(), |(_, payload)| payload.clone())
            }
            Proof::Other => match of_other().and_then(|(_, payload)| payload.last_chunk::<PROOF_BYTES>()) {
                Some(proof) => [&body[..], proof].concat(),
                None => [body, random()].concat(),
            },
            Proof::Right => {
                let nonce = if kind == Kind::OUTCOME { seen.nonce } else { seen.challenge };
                let proofs = match (&seen.secret, nonce) {
                    (Some(secret), Some(nonce)) => Proofs::new(secret.clone(), seen.id, nonce),
                    _ => Proofs::none(),
                };
                proofs.prove(kind, &body)
            }
        };
        simulation::note(|| format!("FORGED: {forgery:?}, frame {sequence}"));
        let header = Header::new(kind, 0, 0, sequence, &payload);
        [&header.encode()[..], &payload].concat()
    }
}

/// Its hand on one direction of a link.
pub struct Tap {
    adversary: Adversary,
    from: End,
    /// Of the first link of a move or a question.
    is_first: bool,
    /// A preface or header that is not complete.
    head: Vec<u8>,
    has_preface: bool,
    /// The frame that is passing: its kind, its payload so far and how much is left of that.
    kind: Kind,
    payload: Vec<u8>,
    left: usize,
    /// It is not passed on.
    drops: bool,
    /// The number of the next frame.
    sequence: u32,
    waiting: Vec<Forgery>,
    /// It cannot follow any more.
    lost: bool,
}

impl Tap {
    pub fn new(adversary: &Adversary, from: End, is_first: bool) -> Tap {
        Tap {
            adversary: adversary.clone(),
            from,
            is_first,
            head: Vec::new(),
            has_preface: false,
            kind: Kind(0),
            payload: Vec::new(),
            left: 0,
            drops: false,
            sequence: 0,
            waiting: Vec::new(),
            lost: false,
        }
    }

    /// The forged frame, if it can be put here now; otherwise it comes before the next frame.
    pub fn forge(&mut self, forgery: Forgery) -> Option<Vec<u8>> {
        if self.lost {
            return None;
        }
        if self.has_preface && self.head.is_empty() && self.left == 0 {
            return Some(self.adversary.frame(&forgery, self.sequence));
        }
        self.waiting.push(forgery);
        None
    }

    pub fn gives_up(&mut self) {
        self.waiting.clear();
    }

    /// What is passed on of these bytes, with what is put between them.
    pub fn pass(&mut self, bytes: &[u8]) -> Vec<u8> {
        if self.is_first && self.from == End::Source {
            let stream = &mut self.adversary.seen().stream;
            let room = RECORDED_BYTES_MAX - stream.len();
            stream.extend(&bytes[..bytes.len().min(room)]);
        }
        let (mut out, mut rest) = (Vec::with_capacity(bytes.len()), bytes);
        while !rest.is_empty() {
            if self.lost {
                out.extend(rest);
                break;
            }
            let due = match (self.left, self.has_preface) {
                (0, false) => PREFACE_BYTES - self.head.len(),
                (0, true) => HEADER_BYTES - self.head.len(),
                (left, _) => left,
            };
            let (piece, after) = rest.split_at(due.min(rest.len()));
            rest = after;
            if self.left > 0 {
                if !self.drops {
                    out.extend(piece);
                }
                if self.is_read() {
                    self.payload.extend(piece);
                }
                self.left -= piece.len();
                if self.left == 0 {
                    self.has_passed();
                }
                continue;
            }
            self.head.extend(piece);
            if piece.len() == due {
                self.begins(&mut out);
            }
        }
        out
    }

    /// A preface or a header is complete.
    fn begins(&mut self, out: &mut Vec<u8>) {
        let head = std::mem::take(&mut self.head);
        if !self.has_preface {
            match Preface::decode(head.first_chunk().expect("it is complete")) {
                Ok(preface) => self.adversary.seen().id = preface.id,
                Err(_) => self.lost = true,
            }
            self.has_preface = true;
            out.extend(head);
            return;
        }
        let Ok(header) = Header::decode(head.first_chunk().expect("it is complete")) else {
            self.lost = true;
            out.extend(head);
            return;
        };
        for forgery in std::mem::take(&mut self.waiting) {
            out.extend(self.adversary.frame(&forgery, header.sequence));
        }
        let instead = {
            let standing = &mut self.adversary.seen().standing;
            let at = standing
                .iter()
                .position(|(from, forgery)| *from == self.from && forgery.instead_of == Some(header.kind));
            at.map(|at| standing.remove(at).1)
        };
        self.drops = instead.is_some();
        match instead {
            Some(forgery) => out.extend(self.adversary.frame(&forgery, header.sequence)),
            None => out.extend(head),
        }
        self.sequence = header.sequence.wrapping_add(1);
        (self.kind, self.left) = (header.kind, header.length as usize);
        if self.left == 0 {
            self.has_passed();
        }
    }

    /// Whether it wants to know what the frame says.
    fn is_read(&self) -> bool {
        matches!(self.kind, Kind::OFFER | Kind::ANSWER) || self.kind.proof_bytes() > 0
    }

    fn has_passed(&mut self) {
        let (payload, mut seen) = (std::mem::take(&mut self.payload), self.adversary.seen());
        match self.kind {
            Kind::OFFER => seen.secret = Offer::decode(&payload).ok().and_then(|offer| offer.secret),
            Kind::ANSWER => {
                seen.challenge = Answer::decode(&payload).ok().and_then(|answer| answer.challenge)
            }
            kind if kind.proof_bytes() > 0 => {
                if kind == Kind::QUERY {
                    seen.nonce = Nonce::of_query(&payload);
                }
                seen.words.push((kind, payload));
            }
            _ => {}
        }
    }
}

/// What it does in a run: nothing in most of them.
pub fn draw(chance: &mut Chance) -> Vec<Planned> {
    if !chance.one_in(3) {
        return Vec::new();
    }
    let mut acts: Vec<Planned> = (0..1 + chance.below(3)).map(|_| act(chance)).collect();
    if chance.one_in(2) {
        // The source has to ask, and somebody else answers.
        let when = When::Phase(End::Source, Phase::Commit, chance.log_below(60));
        acts.push(Planned { when, fault: Fault::Cut(0) });
        for _ in 0..1 + chance.below(2) {
            let forgery = Forgery {
                kind: Kind::OUTCOME,
                proof: proof(chance),
                instead_of: Some(Kind::OUTCOME),
                outcome: 1 + chance.below(2) as u32,
            };
            let fault = Fault::Forge { from: End::Destination, link: 0, forgery };
            acts.push(Planned { when: When::Point(End::Source, 1), fault });
        }
    }
    acts
}

fn proof(chance: &mut Chance) -> Proof {
    chance.pick(&[Proof::Missing, Proof::Random, Proof::Replayed, Proof::Other])
}

fn act(chance: &mut Chance) -> Planned {
    let (from, proof) = (chance.pick(&End::BOTH), proof(chance));
    let when = match chance.below(4) {
        0 => When::Phase(End::Destination, Phase::Commit, chance.log_below(60)),
        1 => When::Phase(End::Source, Phase::Commit, chance.log_below(60)),
        2 => When::Phase(End::Source, Phase::Load, chance.log_below(100)),
        _ => When::Point(chance.pick(&End::BOTH), chance.log_below(3_000)),
    };
    if chance.one_in(6) {
        return Planned { when, fault: Fault::ForgedLink(proof) };
    }
    let outcome = 1 + chance.below(2) as u32;
    let forge = |kind, instead_of| {
        let forgery = Forgery { kind, proof, instead_of, outcome };
        Fault::Forge { from, link: 0, forgery }
    };
    if chance.one_in(2) {
        let kinds = match from {
            End::Source => {
                &[Kind::COMMIT, Kind::COMMIT, Kind::ABORT, Kind::DONE, Kind::SUM, Kind::MEMORY_DATA][..]
            }
            End::Destination => &[Kind::READY, Kind::RUNNING, Kind::REFUSED, Kind::ABORT],
        };
        return Planned { when, fault: forge(chance.pick(kinds), None) };
    }
    let (of, by) = match from {
        End::Source => chance.pick(&[
            (Kind::COMMIT, Kind::COMMIT),
            (Kind::COMMIT, Kind::ABORT),
            (Kind::DONE, Kind::DONE),
            (Kind::SUM, Kind::SUM),
            (Kind::QUERY, Kind::DONE),
        ]),
        End::Destination => chance.pick(&[
            (Kind::READY, Kind::READY),
            (Kind::RUNNING, Kind::REFUSED),
            (Kind::RUNNING, Kind::RUNNING),
            (Kind::RUNNING, Kind::ABORT),
            (Kind::REFUSED, Kind::RUNNING),
            (Kind::REFUSED, Kind::ABORT),
            (Kind::OUTCOME, Kind::OUTCOME),
        ]),
    };
    Planned { when: When::Point(End::Source, 1), fault: forge(by, Some(of)) }
}
