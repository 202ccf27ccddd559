//! The suite on devices and servers that keep to the standard, that break it in one place each, and that hang, die or lie.

mod clauses;
mod foreign_server;
mod fuzz;
mod hostile;
mod mutations;
mod own_devices;
mod syzkaller;
mod table;
mod wire_mutations;
