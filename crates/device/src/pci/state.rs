//! The part of a saved state that belongs to a function.

use limosa_protocol::pci_index;

use super::{Config, Function, MsixTable};
use crate::Interrupts;
use crate::saved::Refusal;

/// The state of a [`Function`], for a section of the device's saved state. Field numbers are never reused.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FunctionState {
    /// All of configuration space. Read-only bits must match those of the function that loads it.
    #[prost(bytes = "vec", tag = "1")]
    pub config: Vec<u8>,
    /// The MSI-X table, 16 bytes a vector.
    #[prost(bytes = "vec", tag = "2")]
    pub msix_table: Vec<u8>,
    /// MSI-X pending bits, in whole 8 bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub msix_pending: Vec<u8>,
    /// The vectors whose masks in the MSI-X table the client wrote.
    #[prost(uint32, repeated, tag = "4")]
    pub msix_written: Vec<u32>,
    /// The vectors that the device has raised and not lowered.
    #[prost(uint32, repeated, tag = "5")]
    pub raised: Vec<u32>,
}

impl Function {
    /// The function's state, with the messages that are pending because their vectors are not wired.
    pub fn state(&self, irqs: &Interrupts) -> FunctionState {
        let msix = self.msix.as_ref();
        let mut config = self.config.clone();
        irqs.pending(pci_index::IRQ_MSI).for_each(|vector| config.msi_put_pending(&self.layout, vector));
        let written = |msix: &MsixTable| {
            let written = msix.written.iter().zip(0..).filter(|(written, _)| **written);
            written.map(|(_, vector)| vector).collect()
        };
        FunctionState {
            config: config.now.into(),
            msix_table: msix.map_or(vec![], |msix| msix.table.clone()),
            msix_pending: self.msix_pending(irqs),
            msix_written: msix.map_or(vec![], written),
            raised: (0..self.layout.vectors()).filter(|vector| self.is_raised(*vector)).collect(),
        }
    }

    /// This function with a saved state. It has no effect until it replaces the old one and [`Function::settle`] is
    /// called. `section` is the section with the state, for the refusal: [`Refusal::Unfit`] for the state of a function
    /// with another layout.
    pub fn loaded(&self, section: &str, state: &FunctionState) -> Result<Function, Refusal> {
        let unfit = |text: String| Err(Refusal::unfit(section, text));
        let layout = &self.layout;
        if state.config.len() != layout.initial.len() {
            return unfit(format!("{} bytes of configuration space", state.config.len()));
        }
        for (at, (byte, initial)) in state.config.iter().zip(&layout.initial).enumerate() {
            let fixed = !(layout.writable[at] | layout.clears[at] | layout.volatile[at]);
            if (byte ^ initial) & fixed != 0 {
                return unfit(format!(
                    "configuration space differs at {at:#x}: {byte:#04x}, here {initial:#04x}"
                ));
            }
        }
        let mut msix = self.msix.clone();
        let (table, pending) = msix.as_ref().map_or((0, 0), |msix| (msix.table.len(), msix.pending.len()));
        if state.msix_table.len() != table || state.msix_pending.len() != pending {
            return unfit(format!("an MSI-X table of {} bytes", state.msix_table.len()));
        }
        if let Some(msix) = &mut msix {
            msix.load(&state.msix_table, &state.msix_pending);
        }
        for vector in &state.msix_written {
            let written = msix.as_mut().and_then(|msix| msix.written.get_mut(*vector as usize));
            *written.ok_or_else(|| Refusal::unfit(section, format!("MSI-X vector {vector}")))? = true;
        }
        let mut raised = vec![0; self.raised.len()];
        for vector in &state.raised {
            if *vector >= layout.vectors() {
                return unfit(format!("interrupt {vector} raised"));
            }
            raised[*vector as usize / 64] |= 1 << (vector % 64);
        }
        let config = Config { now: state.config.clone().into() };
        Ok(Function { layout: layout.clone(), config, msix, raised })
    }
}
