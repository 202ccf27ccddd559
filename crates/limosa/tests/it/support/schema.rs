//! The schema of the command's JSON documents, `docs/output.schema.json`. Every document that a test reads keeps it.

use std::sync::LazyLock;

use boon::{Compiler, SchemaIndex, Schemas};
use serde_json::Value;

pub const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/output.schema.json");

static SCHEMA: LazyLock<(Schemas, SchemaIndex)> = LazyLock::new(|| {
    let text = std::fs::read_to_string(FILE).unwrap();
    let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
    compiler.add_resource("output.json", serde_json::from_str(&text).unwrap()).unwrap();
    let index =
        compiler.compile("output.json", &mut schemas).unwrap_or_else(|error| panic!("{FILE}: {error:#}"));
    (schemas, index)
});

/// Why a document does not keep the schema.
pub fn breach(document: &Value) -> Option<String> {
    let (schemas, index) = &*SCHEMA;
    schemas.validate(document, *index).err().map(|error| format!("{error:#}"))
}

#[track_caller]
pub fn keeps(document: &Value) {
    if let Some(breach) = breach(document) {
        panic!("{breach}\n{document:#}");
    }
}
