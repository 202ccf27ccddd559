//! Snapshots in object stores: a real S3 server, stores that misbehave, and a network that loses what it carries.

mod hostile;
mod lost_answers;
mod object;
mod support;
