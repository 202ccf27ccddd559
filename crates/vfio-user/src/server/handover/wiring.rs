//! Interrupts: the eventfds of vectors, and pending signals. The eventfds are transferred while the device runs,
//! and in the freeze only those that were added since.

use std::collections::HashMap;

use limosa_device::{VectorState, Wiring, WiringState};
use limosa_foreign_fd::ForeignEventFd;
use limosa_switch_over::{ITEM_FDS_MAX, Item, Refusal};

use super::record::{broken, copy, decode, encode, kind};

/// Bits of a vector, and the number of its eventfd among those that were handed over.
type Row = (u8, Option<u32>);

const MASKED: u8 = 1;
const PENDING: u8 = 2;
const LEVEL: u8 = 4;

/// The eventfds that were handed over.
#[derive(Debug, Default)]
pub(super) struct GivenWires {
    /// All of them, so that a later one is not mistaken for one of these.
    given: Vec<ForeignEventFd>,
    numbers: HashMap<usize, u32>,
}

impl GivenWires {
    /// The eventfds that were not handed over yet.
    pub(super) fn more(&mut self, device: u16, wiring: &Wiring) -> Result<Vec<Item>, Refusal> {
        self.rows(device, wiring.export()).map(|(items, _)| items)
    }

    /// The same, and the state of each vector.
    pub(super) fn rest(&mut self, device: u16, wiring: &Wiring) -> Result<Vec<Item>, Refusal> {
        let (mut items, rows) = self.rows(device, wiring.export())?;
        items.push(encode(kind::WIRING, device, &rows)?);
        Ok(items)
    }

    fn rows(&mut self, device: u16, state: WiringState) -> Result<(Vec<Item>, Vec<Vec<Row>>), Refusal> {
        let before = self.given.len();
        let mut row = |vector: VectorState| {
            let bit = |is: bool, bit: u8| if is { bit } else { 0 };
            let bits = bit(vector.masked, MASKED) | bit(vector.pending, PENDING) | bit(vector.level, LEVEL);
            let number = vector.eventfd.map(|eventfd| {
                *self.numbers.entry(eventfd.id()).or_insert_with(|| {
                    self.given.push(eventfd);
                    (self.given.len() - 1) as u32
                })
            });
            (bits, number)
        };
        let indexes = state.indexes.into_iter();
        let rows = indexes.map(|index| index.into_iter().map(&mut row).collect()).collect();
        let mut items = Vec::new();
        for eventfds in self.given[before..].chunks(ITEM_FDS_MAX) {
            let fds = eventfds.iter().map(copy).collect::<Result<Vec<_>, _>>()?;
            items.push(Item::new(kind::EVENTFDS, device, Vec::new()).with_fds(fds));
        }
        Ok((items, rows))
    }
}

/// The received eventfds, and the state of each vector.
#[derive(Debug, Default)]
pub(super) struct CameWires {
    eventfds: Vec<ForeignEventFd>,
    rows: Vec<Vec<Row>>,
}

impl CameWires {
    /// EVENTFDS.
    pub(super) fn add(&mut self, item: Item) -> Result<(), Refusal> {
        for fd in item.fds {
            let wrong = |_| broken(item.kind, item.device, &"a file that is no eventfd");
            self.eventfds.push(ForeignEventFd::new(fd).map_err(wrong)?);
        }
        Ok(())
    }

    /// WIRING.
    pub(super) fn set(&mut self, item: &Item) -> Result<(), Refusal> {
        self.rows = decode(item)?;
        Ok(())
    }

    /// The exported state, for interrupts with these numbers of vectors by index.
    pub(super) fn state(self, device: u16, vectors: &[u32]) -> Result<WiringState, Refusal> {
        let CameWires { eventfds, rows } = self;
        let wrong = |what: &str| broken(kind::WIRING, device, &what);
        let fits = rows.len() == vectors.len()
            && rows.iter().zip(vectors).all(|(row, count)| row.len() == *count as usize);
        if !fits {
            return Err(wrong("other interrupts than the device has"));
        }
        let vector = |(bits, number): Row| {
            let is = |bit| bits & bit != 0;
            let eventfd = |number: u32| eventfds.get(number as usize).cloned();
            let eventfd = number
                .map(|number| eventfd(number).ok_or_else(|| wrong("an eventfd that did not come")))
                .transpose()?;
            Ok(VectorState { eventfd, masked: is(MASKED), pending: is(PENDING), level: is(LEVEL) })
        };
        let indexes = rows.into_iter().map(|index| index.into_iter().map(vector).collect());
        Ok(WiringState { indexes: indexes.collect::<Result<_, Refusal>>()? })
    }
}
