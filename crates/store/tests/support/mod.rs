//! A real S3 server that nobody here wrote (`s3s`, files in a folder), on a loopback port; and ends with a device and
//! memory.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use limosa_client::{Device, DmaMap, DmaMemory};
use limosa_device::{Loopback, Machine};
use limosa_migrate::{
    AfterLoad, AfterSave, Cancel, Destination, FilePages, GuestPages, Ledger, Memory, MemoryRegion,
    MovedDevice, Nobody, Options, Outcome, Received, SnapshotSource, SnapshotTarget, Source,
};
use limosa_models::synthetic::{Synthetic, SyntheticConfig};
use limosa_protocol::info::DmaMapFlags;
use limosa_store::Object;
use rustix::fs::{MemfdFlags, memfd_create};
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use s3s::{S3Result, s3_error};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

pub const BUCKET: &str = "snapshots";
/// Access to it is denied to everybody.
pub const DENIED: &str = "denied";
/// There is none of this name.
pub const MISSING: &str = "nowhere";
const MEMORY_BYTES: u64 = 24 << 20;

/// A server. It is gone, with all its connections, when this is dropped.
pub struct Server {
    pub address: SocketAddr,
    pub folder: tempfile::TempDir,
    runtime: Option<Runtime>,
}

struct Access;

#[async_trait::async_trait]
impl S3Access for Access {
    async fn check(&self, context: &mut S3AccessContext<'_>) -> S3Result<()> {
        match (context.credentials(), context.s3_path().get_bucket_name()) {
            (None, _) | (_, Some(DENIED)) => Err(s3_error!(AccessDenied, "by the bucket's policy")),
            // The server itself would begin an upload to it.
            (_, Some(MISSING)) => Err(s3_error!(NoSuchBucket)),
            _ => Ok(()),
        }
    }
}

impl Server {
    pub fn start() -> Server {
        let folder = tempfile::tempdir().unwrap();
        for bucket in [BUCKET, DENIED] {
            std::fs::create_dir(folder.path().join(bucket)).unwrap();
        }
        let mut service = S3ServiceBuilder::new(s3s_fs::FileSystem::new(folder.path()).unwrap());
        service.set_auth(SimpleAuth::from_single("the-id", "the-secret"));
        service.set_access(Access);
        let service = service.build();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", 0))).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let serving =
                    hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new())
                        .http1_only();
                let service = service.clone();
                tokio::spawn(async move {
                    // A client that goes away is no concern of the server's.
                    let _ = serving.serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Server { address, folder, runtime: Some(runtime) }
    }

    /// Goes away, with the connections that it has.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    pub fn variables(&self) -> Vec<(String, String)> {
        let variables = [
            ("AWS_ACCESS_KEY_ID", "the-id".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "the-secret".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_ENDPOINT_URL", format!("http://{}", self.address)),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
        ];
        variables.map(|(name, value)| (name.to_owned(), value)).to_vec()
    }

    pub fn object(&self, key: &str) -> Object {
        Object::new(&format!("s3://{BUCKET}/{key}"), self.variables()).unwrap()
    }

    /// Where the server keeps the object.
    pub fn file(&self, key: &str) -> PathBuf {
        self.folder.path().join(BUCKET).join(key)
    }

    /// What there is in the bucket.
    pub fn objects(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path().join(BUCKET)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// How many files the server keeps of uploads that were neither completed nor aborted.
    pub fn unfinished(&self) -> usize {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with(".upload")).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Guest memory that does something when it is read or written for the first time behind an offset.
pub struct Memory24 {
    pub file: File,
    pages: FilePages,
    at: AtomicU64,
    act: Box<dyn Fn() + Send + Sync>,
}

impl Memory24 {
    fn pass(&self, end: u64) {
        let at = self.at.load(Ordering::Relaxed);
        if end > at && self.at.swap(u64::MAX, Ordering::Relaxed) != u64::MAX {
            (self.act)();
        }
    }
}

impl GuestPages for Memory24 {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.pass(offset + into.len() as u64);
        self.pages.read(offset, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.pass(offset + from.len() as u64);
        self.pages.write(offset, from)
    }
}

/// A device with memory.
pub struct End {
    pub device: Loopback,
    pub memory: Memory24,
    pub options: Options,
}

impl End {
    /// `seed` 0 is an end that is idle; others have contents of their own.
    pub fn new(seed: u64) -> End {
        let config: SyntheticConfig = format!("state=1M,block=64K,seed={}", seed.max(1)).parse().unwrap();
        let machine = Machine::new(Box::new(Synthetic::new(config).unwrap()));
        let device = Loopback::new("card", Arc::clone(&machine));
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(MEMORY_BYTES).unwrap();
        let memory = DmaMemory::File { fd: file.as_fd(), offset: 0 };
        let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
        device.dma_map(&DmaMap { iova: 0, size: MEMORY_BYTES, flags, memory }).unwrap();
        let pages = FilePages::new(file.try_clone().unwrap(), 0);
        if seed > 0 {
            // The last MiB was never touched.
            let contents: Vec<u8> =
                (0..MEMORY_BYTES / 8 - (1 << 17)).flat_map(|word| (word * 8 + seed).to_le_bytes()).collect();
            pages.write(0, &contents).unwrap();
        }
        let memory = Memory24 { file, pages, at: AtomicU64::new(u64::MAX), act: Box::new(|| {}) };
        let options = Options { silence_max: Duration::from_secs(20), ..Options::default() };
        End { device, memory, options }
    }

    /// Does this when memory behind that offset is read or written for the first time.
    pub fn when_at(mut self, offset: u64, act: impl Fn() + Send + Sync + 'static) -> End {
        self.memory.at = AtomicU64::new(offset);
        self.memory.act = Box::new(act);
        self
    }

    pub fn contents(&self) -> Vec<u8> {
        let mut all = vec![0; MEMORY_BYTES as usize];
        self.memory.pages.read(0, &mut all).unwrap();
        all
    }

    fn region(&self) -> MemoryRegion<'_> {
        MemoryRegion { id: 0, iova: 0, size: MEMORY_BYTES, pages: &self.memory }
    }

    pub fn save(&self, to: &dyn SnapshotTarget, after: AfterSave, cancel: Option<&Cancel>) -> Outcome {
        let mut source = Source {
            devices: &[MovedDevice::new(&self.device)],
            memory: Memory { regions: vec![self.region()], ..Memory::default() },
            vmm: &Nobody,
            observer: &Nobody,
            options: &self.options,
            cancel,
        };
        source.save(to, after)
    }

    pub fn load(&self, from: &dyn SnapshotSource, after: AfterLoad) -> Received {
        let (ledger, memory) = (Ledger::new(), [self.region()]);
        let destination = Destination {
            devices: &[MovedDevice::new(&self.device)],
            memory: &memory,
            vmm: &Nobody,
            observer: &Nobody,
            options: &self.options,
            cancel: None,
            ledger: &ledger,
        };
        destination.load(from, after)
    }
}
