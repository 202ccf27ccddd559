//! What the destination answers.

use limosa_stream::{Damage, Header, Kind};

use super::Sending;
use crate::Result;
use crate::wire::Connection;

impl Sending<'_, '_> {
    /// The body of the thread that listens to the destination until READY.
    pub(crate) fn listen(&self, connection: &Connection<'_>) -> Result<()> {
        let mut reader = connection.reader();
        loop {
            let header = reader.next(connection.link(), "listening to it", None, Some(self.team.ended()))?;
            match self.hear(&header, reader.payload(&header)) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(damage) => return Err(reader.damaged(damage)),
            }
        }
    }

    /// Takes a frame of the destination. Returns whether it was the last one.
    fn hear(&self, header: &Header, payload: &[u8]) -> Result<bool, Damage> {
        let misplaced = |why: &str| Err(Damage::Misplaced { kind: header.kind, why: why.into() });
        match header.kind {
            Kind::PROGRESS => {}
            Kind::FLUSHED => {
                self.flushes.lock().answered(header.section, header.position)?;
                self.flushes.notify_all();
            }
            Kind::CREDIT | Kind::WINDOW => match self.flows.get(header.section as usize) {
                None => return misplaced("no such device was offered"),
                Some(flow) => {
                    let loaded = {
                        let mut flow = flow.lock();
                        let before = flow.initial_is_loaded();
                        match header.kind {
                            Kind::WINDOW => flow.window.grow(header.position)?,
                            _ => flow.window.credit(header.position)?,
                        }
                        before != flow.initial_is_loaded()
                    };
                    flow.notify_all();
                    if loaded {
                        self.device_has_news();
                    }
                }
            },
            Kind::READY => {
                let mut state = self.state.lock();
                if !state.summed {
                    return misplaced("the SUM is not sent yet");
                }
                self.proofs.check(Kind::READY, payload)?;
                state.ready = true;
                self.state.notify_all();
                return Ok(true);
            }
            _ => return misplaced("nothing was asked for"),
        }
        Ok(false)
    }
}
