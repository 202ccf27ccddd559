//! [`Target`]: the device under test, and the ways to it that the caller has.

use std::sync::Arc;

use limosa_client::{Device, Result};
use serde::{Deserialize, Serialize};

use crate::wire::{Dial, Wire};

/// How the device is reached. It decides which document's rules hold where the two differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// By the kernel's ioctls.
    Kernel,
    /// By messages on a socket, or in the same process.
    VfioUser,
}

/// Opens the device.
pub(crate) type Open = Arc<dyn Fn() -> Result<Box<dyn Device>> + Send + Sync>;

/// An action on the device that the caller provides.
pub type Action = Arc<dyn Fn() -> std::result::Result<(), String> + Send + Sync>;

/// The kernel's own view of the state: the text of `migration/state` in debugfs.
pub type StateView = Arc<dyn Fn() -> std::io::Result<String> + Send + Sync>;

/// The device under test.
#[derive(Clone)]
pub struct Target {
    pub(crate) name: String,
    pub(crate) transport: Transport,
    pub(crate) open: Open,
    pub(crate) peer: Option<Open>,
    pub(crate) breaks: Option<Action>,
    pub(crate) view: Option<StateView>,
    pub(crate) dial: Option<Dial>,
}

impl Target {
    /// A device that `open` opens, as often as the suite needs it.
    pub fn new(
        name: impl Into<String>,
        transport: Transport,
        open: impl Fn() -> Result<Box<dyn Device>> + Send + Sync + 'static,
    ) -> Target {
        Target {
            name: name.into(),
            transport,
            open: Arc::new(open),
            peer: None,
            breaks: None,
            view: None,
            dial: None,
        }
    }

    /// A second device of the same kind, for round trips.
    #[must_use]
    pub fn peer(mut self, open: impl Fn() -> Result<Box<dyn Device>> + Send + Sync + 'static) -> Target {
        self.peer = Some(Arc::new(open));
        self
    }

    /// A way to bring the device into ERROR.
    #[must_use]
    pub fn breaks(mut self, action: Action) -> Target {
        self.breaks = Some(action);
        self
    }

    /// The kernel's own view of the state.
    #[must_use]
    pub fn view(mut self, view: StateView) -> Target {
        self.view = Some(view);
        self
    }

    /// A way to connect to the device's server without a client: for the checks of the family `vfio-user`.
    #[must_use]
    pub fn dial(
        mut self,
        dial: impl Fn() -> std::io::Result<Box<dyn Wire>> + Send + Sync + 'static,
    ) -> Target {
        self.dial = Some(Arc::new(dial));
        self
    }
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("name", &self.name).finish_non_exhaustive()
    }
}
