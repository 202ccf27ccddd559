//! What the tests of object stores are made of.

mod ends;
mod gate;
mod server;

use limosa_store::Object;

pub use ends::End;
pub use gate::{Gate, Plan};
pub use server::{BUCKET, DENIED, MISSING, Server};

/// The object of this key in a server's bucket.
pub fn object(server: &Server, key: &str) -> Object {
    Object::new(&format!("s3://{BUCKET}/{key}"), server.variables()).unwrap()
}
