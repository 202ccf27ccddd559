//! A real S3 server that nobody here wrote (`s3s`, files in a folder), on a loopback port.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};

use hyper_util::rt::TokioIo;
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

/// A loopback address that no other server has, so that nobody takes the port of one that has gone away.
fn own_address() -> Ipv4Addr {
    static NUMBER: AtomicU8 = AtomicU8::new(1);
    let [_, _, high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, high, low, NUMBER.fetch_add(1, Ordering::Relaxed))
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
        let listener = runtime.block_on(TcpListener::bind((own_address(), 0))).unwrap();
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
