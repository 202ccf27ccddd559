//! [`CLAUSES`]: the list of all requirements of the documents. The checks cite it; reports, coverage and
//! `docs/conformance/clauses.md` are generated from it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::check::Check;

/// A document that has clauses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Document {
    /// `include/uapi/linux/vfio.h` of Linux.
    #[serde(rename = "vfio.h")]
    VfioH,
    /// QEMU's `docs/interop/vfio-user.rst`.
    #[serde(rename = "vfio-user.rst")]
    VfioUser,
    /// `Documentation/driver-api/vfio.rst` and, for debugfs, `Documentation/ABI/testing/debugfs-vfio` of Linux.
    #[serde(rename = "debugfs-vfio")]
    Debugfs,
}

impl fmt::Display for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Document::VfioH => "vfio.h",
            Document::VfioUser => "vfio-user.rst",
            Document::Debugfs => "debugfs-vfio",
        })
    }
}

/// A requirement of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clause {
    /// Its id.
    pub id: &'static str,
    /// The document.
    pub document: Document,
    /// The place in the document.
    pub section: &'static str,
    /// The requirement, in our words.
    pub words: &'static str,
    /// Why no check covers it; empty for a clause with checks.
    pub unchecked: &'static str,
}

macro_rules! clauses {
    ($($document:ident $section:literal { $($id:literal: $words:literal $(, unchecked: $why:literal)?;)* })*) => {
        /// Every clause, in the documents' order.
        pub const CLAUSES: &[Clause] = &[$($(Clause {
            id: $id,
            document: Document::$document,
            section: $section,
            words: $words,
            unchecked: concat!($($why)?),
        },)*)*];
    };
}

clauses! {
    VfioH "VFIO_DEVICE_GET_INFO" {
        "info.indexes": "The device says how many regions and interrupt indexes it has; indexes below these answer or are refused, indexes from there on are refused with EINVAL.";
        "info.stable": "The device's information about regions and interrupts does not depend on its migration state.";
        "info.region-bounds": "An access beyond the end of a region is refused.";
        "info.irqs": "SET_IRQS refuses vectors that the index does not have.";
    }
    VfioH "VFIO_DEVICE_FEATURE" {
        "feature.one-op": "Without PROBE exactly one of GET and SET is asked; both, or none of the three, is EINVAL.";
        "feature.flags": "A flag that is not assigned is EINVAL.";
        "feature.argsz": "A payload too short for the feature is EINVAL; a longer one does no harm.";
        "feature.unknown": "A feature that the device does not know is refused, and so is a probe of it.";
        "feature.operation": "An operation that the feature does not have is EINVAL, also when it is only probed.";
        "feature.probe": "PROBE succeeds when the feature has all the operations named, and has no effect.";
    }
    VfioH "VFIO_DEVICE_FEATURE_MIGRATION" {
        "mig.mandatory": "A device with migration has the flag STOP_COPY: STOP, STOP_COPY and RESUMING exist.";
        "mig.flags": "The flags are STOP_COPY, P2P and PRE_COPY; there is no other.";
        "mig.absent": "A device without migration refuses the features of migration with ENOTTY.";
    }
    VfioH "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE" {
        "state.get": "GET returns the state, and changes nothing.";
        "state.unknown": "SET of a number that is no state is EINVAL, and the state is kept.";
        "state.fd": "A data fd is returned when an arc opens a session, and at no other time.";
        "state.failed-arc": "After a failed SET the device is in a state on the path, or in ERROR, and GET tells which.";
    }
    VfioH "enum vfio_device_mig_state" {
        "fsm.initial": "A device that was opened or reset is in RUNNING.";
        "fsm.arcs": "Each of the 15 arcs leads to its target state.";
        "fsm.combined": "Every other pair with a path is a combination of arcs that one SET walks.";
        "fsm.refused": "STOP_COPY to PRE_COPY or PRE_COPY_P2P is refused, and the state is kept.";
        "fsm.unsupported": "A state that the flags do not cover is refused, and the state is kept.";
        "fsm.same": "SET of the current state succeeds and does nothing; a session continues.";
        "fsm.no-error": "ERROR cannot be set. In ERROR itself a driver may treat it as a SET of the current state.";
        "fsm.from-error": "No SET leaves ERROR; a reset does, to RUNNING.";
        "fsm.error-session": "A device in ERROR has no session.";
        "fsm.repeat": "The machine can be walked as often as one likes.";
        "fsm.interior": "A combination passes no state of the saving group in its interior.",
            unchecked: "A client sees the two ends of a SET, not the states between.";
        "fsm.p2p-quiet": "In the P2P states the device starts no peer-to-peer DMA.",
            unchecked: "It takes a second device that sees the traffic on the bus.";
        "fsm.stop-quiet": "In STOP and STOP_COPY the device changes neither itself nor anything outside: two saves agree in length.";
    }
    VfioH "VFIO_DEVICE_STATE_STOP_COPY, PRE_COPY, RESUMING: the data fd" {
        "stream.end": "In STOP_COPY the data has an end, which reads repeat.";
        "stream.pieces": "The data does not depend on how it is cut into reads.";
        "stream.one-session": "From PRE_COPY to STOP_COPY, and between the pre-copy states, the session and its fd continue.";
        "stream.stale": "The fd of a session that has ended answers ENODEV.";
        "stream.direction": "An fd for saving cannot be written, one for loading cannot be read: EBADF.";
        "stream.independent": "A refused or unrelated request does not end a session.";
        "stream.unread": "A session may be left before its data was read; the next one starts from the beginning.";
        "stream.dropped": "Closing the data fd does not change the state.";
        "precopy.no-end": "In the pre-copy states a read without data is ENOMSG, never the end.";
        "precopy.then-stop": "What pre-copy and stop-copy give, in order, is one state that loads.";
        "precopy.cancel": "Pre-copy can be left for RUNNING at any time, and entered again.";
        "resuming.pieces": "The data to load may be written in pieces of any size.";
        "resuming.round-trip": "A state that the device gave loads into it, and it runs.";
        "resuming.incomplete": "Leaving RESUMING with data that is not all of a state fails.";
        "resuming.validate": "Data that is no state of such a device is refused, when it is written or when RESUMING is left.";
        "resuming.survive": "No data that is written makes the device unusable after a reset.";
        "resuming.abort": "A reset leaves RESUMING, whatever was written.";
        "stream.poll": "A data fd that can be polled tells when there is data.",
            unchecked: "Drivers need not support it, and no user may depend on it.";
    }
    VfioH "VFIO_MIG_GET_PRECOPY_INFO" {
        "info.precopy-states": "Pre-copy info is given in the pre-copy states, and refused with EINVAL in any other.";
        "info.initial": "initial_bytes is the rest of the initial data: it does not grow as data is read.";
        "info.flags": "Without the opt-in of MIG_PRECOPY_INFOv2 the flags are 0.";
        "info.stale": "After the session pre-copy info is refused with ENODEV.";
        "info.v2": "MIG_PRECOPY_INFOv2 is a feature to SET, and pre-copy info works after it.";
        "info.reinit": "With the opt-in REINIT says that initial_bytes is reported again.",
            unchecked: "It needs a device that is reconfigured during pre-copy, which no request can cause.";
    }
    VfioH "VFIO_DEVICE_FEATURE_MIG_DATA_SIZE" {
        "size.any-state": "The estimate can be read in every state.";
        "size.estimate": "The estimate is about what stop-copy really gives.";
    }
    VfioH "VFIO_DEVICE_RESET" {
        "reset.running": "A reset leads to RUNNING from every state.";
        "reset.session": "A reset ends the session: its fd answers ENODEV.";
        "reset.usable": "After a reset the device can be saved and loaded.";
    }
    VfioH "VFIO_DEVICE_FEATURE_DMA_LOGGING_START" {
        "log.start-stop": "Logging starts and stops, as often as one likes.";
        "log.page-size": "The device answers START with the page size that it chose, a power of two.";
        "log.twice": "A second START is refused.";
        "log.empty": "An empty range is EINVAL, or logs nothing: the text does not say, and Linux lets it pass.";
        "log.ranges": "A range that is not aligned to the page size, or overlaps another is EINVAL; none at all is EINVAL.";
        "log.overflow": "A range that ends beyond the address space is EOVERFLOW.";
        "log.too-many": "More ranges than fit in a page are E2BIG.";
        "log.absent": "A device without logging refuses its features with ENOTTY.";
        "log.states": "Logging continues while the device changes its state.";
    }
    VfioH "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT" {
        "log.report": "A report of the range that is logged, and of parts of it, is answered.";
        "log.report-pages": "A report may be of other pages than the log has.";
        "log.report-args": "A page size that is no power of two or below 4096, and an empty range, is EINVAL; a range that overflows is EOVERFLOW.";
        "log.report-off": "A report while logging is off is refused.";
        "log.report-bounds": "Only bits of the range are set.";
        "log.read-clear": "A report clears the pages that it reports.";
        "log.dirty": "The device's writes are in the next report.",
            unchecked: "A device cannot be made to write memory by requests that all devices have; the tests of this project's devices do it.";
    }
    VfioUser "Header" {
        "wire.reply": "A reply has the id and the command of the message that it replies to, the type reply, and the size of the whole reply.";
        "wire.answered": "Every command has a reply, even a refused one; a refusal is only a header, and the connection stays in sync.";
        "wire.ids": "Ids are the client's: they may be used again, also at the same time.";
        "wire.reserved": "The error field of a command is reserved, and does not matter.";
        "wire.size": "The size counts the header: a smaller one is refused, or ends the connection.";
        "wire.unknown": "A command that is not assigned is refused.";
        "wire.direction": "A command of the server's is refused when a client sends it.";
        "wire.short": "A body that is shorter than its fixed part is refused.";
    }
    VfioUser "Command Concurrency" {
        "wire.stream": "Messages are separated by their sizes, however their bytes arrive.";
        "wire.order": "Commands may be sent before others are replied to; they are done and replied to in order.";
        "wire.posted": "A command that wants no reply gets none, and is done before the next is replied to.";
    }
    VfioUser "Security Considerations" {
        "wire.survives": "Whatever a client sends, and wherever it stops, the server continues to serve it or the next one.";
        "fds.closed": "Fds that came with a refused message are closed.";
    }
    VfioUser "VFIO_USER_VERSION" {
        "version.first": "VERSION comes first: before it nothing else is done. A second one does no harm.";
        "version.major": "A major version that the server does not speak is refused, or ends the connection.";
        "version.minor": "The minor version of the reply is at most the proposed one.";
        "version.reply": "The reply has the major version proposed, and its data is a JSON object that ends with a NUL.";
        "version.optional": "The data and each capability in it are optional; capabilities that are not known do not matter.";
        "version.malformed": "Data that is not JSON, is not terminated, or has another type than the specification gives it is not agreed on.";
        "version.limits": "The limits in the reply are numbers, and leave room for messages.";
        "version.subset": "The reply has no capability beyond the specification's that was not proposed, and does not announce REGION_WRITE_MULTI to a client without it.";
        "version.twin": "A twin socket is announced to a client that proposed it, together with the socket, and to no other.";
        "fds.limit": "More fds in a message than max_msg_fds are refused, or end the connection.";
    }
    VfioUser "VFIO_USER_DMA_MAP" {
        "map.map": "Memory is mapped with a file or without; the reply has no body.";
        "map.exists": "A map over an existing one is EEXIST.";
        "map.range": "A range that is empty or ends beyond the address space, and an offset whose end overflows, is refused, and maps nothing.";
        "map.flags": "A map that is neither readable nor writable is refused.";
        "map.fd": "One fd, of a file that can be mapped as the flags say; another is refused.";
    }
    VfioUser "VFIO_USER_DMA_UNMAP" {
        "unmap.exact": "An unmap names a mapping exactly, and is answered with it. For anything else it is refused, or says how much is gone, as the kernel does; part of a mapping never goes.";
    }
    VfioUser "Message sizes" {
        "argsz.reply": "argsz in a reply is the size of the whole payload, and the payload has it when there was room.";
        "argsz.short": "A request with a buffer smaller than the fixed part is refused, or answered with the required size.";
    }
    VfioUser "VFIO_USER_DEVICE_GET_REGION_INFO" {
        "region.fd": "A region that can be mapped comes with an fd, another without.";
    }
    VfioUser "VFIO_USER_DEVICE_SET_IRQS" {
        "irqs.wire": "Vectors are wired to eventfds, taken away by a message without fds, and all of an index by a count of 0.";
        "irqs.trigger": "A vector that is triggered signals its eventfd, and no other does; without one nothing is signalled.";
        "irqs.range": "A nonexistent index or vector is refused.";
        "irqs.flags": "There is one kind of data and one action; anything else is refused.";
        "irqs.fds": "The number of eventfds is the number of vectors, or 0.";
        "irqs.bools": "The number of bools is the number of vectors.";
    }
    VfioUser "VFIO_USER_REGION_READ, VFIO_USER_REGION_WRITE, VFIO_USER_REGION_WRITE_MULTI" {
        "region.reply": "The reply names offset, region and count, and the data follows a read.";
        "region.bounds": "An access that is not wholly in a region is refused.";
        "region.limit": "A count above max_data_xfer_size is refused.";
        "region.data": "A write whose data differs from its count is refused.";
        "region.multi": "A REGION_WRITE_MULTI whose number of writes differs from its count, or with a write of more than 8 bytes, is refused.";
    }
    VfioUser "VFIO_USER_DEVICE_FEATURE" {
        "feature.reply": "SET and PROBE are answered with the request's payload, GET with the data, and argsz has the size.";
    }
    VfioUser "VFIO_USER_MIG_DATA_READ, VFIO_USER_MIG_DATA_WRITE" {
        "data.session": "Data is read in the saving states and written in RESUMING; at any other time it is refused.";
        "data.reply": "A read returns at most the requested size, and the actual size.";
        "data.size": "A size beyond every limit, and one that differs from the data, is refused, and the session continues.";
    }
    VfioUser "Client Disconnection" {
        "gone.state": "The state of a device outlives its client.";
        "gone.served": "The next client is served, in whatever state the device is.";
        "gone.mappings": "The mappings of a client end with it.";
        "gone.interrupts": "The eventfds of a client are not signalled after it is gone.";
    }
    VfioUser "Socket" {
        "second.harmless": "A second client waits, is served or is refused, and does not disturb the first.";
    }
    Debugfs "migration/state" {
        "debugfs.state": "The kernel shows the state that the driver answers.";
    }
}

/// For each clause the checks among these that cite it.
pub fn coverage(checks: &[&Check]) -> BTreeMap<String, Vec<String>> {
    let of = |clause: &Clause| {
        let ids = checks.iter().filter(|check| check.clauses.contains(&clause.id));
        (clause.id.to_owned(), ids.map(|check| check.id.to_string()).collect())
    };
    CLAUSES.iter().map(of).collect()
}

/// `docs/conformance/clauses.md`: every clause with the checks that cite it, or why there is none.
pub fn clauses_document() -> String {
    let checks = crate::families::checks();
    let covered = coverage(&checks.iter().collect::<Vec<_>>());
    let mut text = String::from(
        "# Clauses\n\nWhat the documents ask of a device, in our words, and the checks of `limosa check` that come from it.\n\
         Printed by `limosa check --clauses`; a test holds this page to the source.\n",
    );
    let mut section = "";
    for clause in CLAUSES {
        if clause.section != section {
            section = clause.section;
            text += &format!("\n## {}: {section}\n", clause.document);
        }
        text += &format!("\n**{}** {}\n", clause.id, clause.words);
        match covered.get(clause.id).filter(|ids| !ids.is_empty()) {
            Some(ids) => {
                let ids: Vec<_> = ids.iter().map(|id| format!("`{id}`")).collect();
                text += &format!("Checks: {}.\n", ids.join(", "));
            }
            None => text += &format!("Not checked: {}\n", clause.unchecked),
        }
    }
    text
}
