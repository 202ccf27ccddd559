//! A client's memory that is reached by messages, of a device whose connection is not served here yet.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use limosa_device::RemoteMemory;
use limosa_protocol::Errno;

use crate::server::dma::ClientMemory;

/// Memory by messages, until its connection is served here.
#[derive(Default)]
pub(in crate::server) struct LaterMemory {
    memory: Mutex<Option<Arc<ClientMemory>>>,
    is_there: Condvar,
}

/// How long an access waits for the connection.
const CONNECTION_WAIT: Duration = Duration::from_secs(3);

impl LaterMemory {
    pub(in crate::server) fn set(&self, memory: ClientMemory) {
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(memory));
        self.is_there.notify_all();
    }

    fn get(&self) -> Result<Arc<ClientMemory>, Errno> {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.is_there.wait_timeout_while(memory, CONNECTION_WAIT, |memory| memory.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.clone().ok_or(Errno::ENOTCONN)
    }
}

impl RemoteMemory for LaterMemory {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.get()?.read(iova, data)
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        self.get()?.write(iova, data)
    }
}
