//! The first message (`vfio-user.rst: VFIO_USER_VERSION`).

use std::os::fd::AsFd;

use limosa_vfio_user::codec::{Command, VersionMessage};
use limosa_vfio_user::version::VERSION;
use rustix::fs::fstat;
use serde_json::Value;
use zerocopy::IntoBytes;

use super::{event, host, on_wire};
use crate::check::{Check, Family, Needs, Stop, Verdict, ensure, fail, skip};
use crate::trial::Trial;
use crate::wire::{Answer, Body, Raw, info_request, next_client, version};

/// The names that the specification gives capabilities.
const NAMES: [&str; 6] =
    ["max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes", "twin_socket", "write_multiple"];

pub(super) fn checks() -> Vec<Check> {
    let none = Needs::empty();
    vec![
        on_wire("vfio-user.version-reply", none, &["version.reply"], |t| {
            proposed(t, VERSION, b"{\"capabilities\":{}}\0").map(drop)
        }),
        on_wire("vfio-user.version-minor-0", none, &["version.minor"], |t| {
            proposed(t, (VERSION.0, 0), b"{}\0").map(drop)
        }),
        on_wire("vfio-user.version-minor-highest", none, &["version.minor"], |t| {
            proposed(t, (VERSION.0, u16::MAX), b"{}\0").map(drop)
        }),
        on_wire("vfio-user.version-major-unknown", none, &["version.major"], |t| {
            let body = VersionMessage { major: u16::MAX, minor: 0 };
            not_agreed(t, &[body.as_bytes(), b"{}\0"].concat(), "major version 65535")
        }),
        on_wire("vfio-user.version-without-data", none, &["version.optional"], |t| {
            proposed(t, VERSION, b"").map(drop)
        }),
        on_wire("vfio-user.version-of-no-capabilities", none, &["version.optional"], |t| {
            proposed(t, VERSION, b"{}\0").map(drop)
        }),
        on_wire("vfio-user.version-unknown-capability", none, &["version.optional"], |t| {
            proposed(t, VERSION, b"{\"capabilities\":{\"of_tomorrow\":{\"deep\":[1,2]}}}\0").map(drop)
        }),
        malformed("vfio-user.version-malformed", b"{\"capabilities\": \0"),
        malformed("vfio-user.version-not-terminated", b"{\"capabilities\":{}}"),
        malformed("vfio-user.version-no-object", b"[1,2,3]\0"),
        malformed("vfio-user.version-capabilities-no-object", b"{\"capabilities\":7}\0"),
        malformed("vfio-user.version-wrong-type", b"{\"capabilities\":{\"max_msg_fds\":\"many\"}}\0"),
        on_wire("vfio-user.version-deeply-nested", none, &["version.malformed", "wire.survives"], |t| {
            not_agreed(t, &version(&[&[b'['; 32 << 10][..], b"\0"].concat()), "VERSION of 32768 brackets")
        }),
        on_wire("vfio-user.version-short", none, &["version.malformed", "wire.short"], |t| {
            not_agreed(t, &[0, 0], "VERSION with 2 bytes of body")
        }),
        on_wire("vfio-user.version-comes-first", none, &["version.first"], |t| {
            let mut raw = Raw::dial(t, "")?;
            raw.ask(Command::DEVICE_GET_INFO, info_request().as_bytes())?
                .not_done("GET_INFO before VERSION")?;
            drop(raw);
            next_client(t)
        }),
        on_wire("vfio-user.version-comes-once", none, &["version.first"], |t| {
            let mut raw = Raw::open(t)?;
            let answer = raw.ask(Command::VERSION, &version(b"{}\0"))?;
            raw.goes_on(t, &answer)
        }),
        on_wire("vfio-user.version-limits", none, &["version.limits"], limits),
        on_wire("vfio-user.version-subset", none, &["version.subset"], |t| {
            let (names, _) = capabilities(&proposed(t, VERSION, b"{\"capabilities\":{}}\0")?)?;
            let foreign: Vec<_> = names.iter().filter(|name| !NAMES.contains(&&***name)).collect();
            ensure(foreign.is_empty(), || {
                format!("the reply has {foreign:?}, which were neither proposed nor are in the specification")
            })
        }),
        on_wire("vfio-user.version-write-multiple-unasked", none, &["version.subset"], |t| {
            let (_, all) = capabilities(&proposed(t, VERSION, b"{\"capabilities\":{}}\0")?)?;
            ensure(all.get("write_multiple") != Some(&Value::Bool(true)), || {
                "write_multiple is announced to a client that did not propose it".into()
            })
        }),
        on_wire("vfio-user.version-twin-socket-unasked", none, &["version.twin"], |t| {
            let reply = proposed(t, VERSION, b"{\"capabilities\":{\"max_msg_fds\":8}}\0")?;
            let (_, all) = capabilities(&reply)?;
            ensure(all.pointer("/twin_socket/supported") != Some(&Value::Bool(true)), || {
                "twin_socket is announced to a client that did not propose it".into()
            })?;
            ensure(reply.fds.is_empty(), || {
                format!("VERSION's reply has {} fds that nobody asked for", reply.fds.len())
            })
        }),
        on_wire("vfio-user.version-twin-socket", none, &["version.twin"], twin),
        on_wire("vfio-user.version-with-an-fd", none, &["wire.survives"], |t| {
            let mut raw = Raw::dial(t, "")?;
            let fd = event()?;
            let answer = raw.ask_with(Command::VERSION, &version(b"{}\0"), &[fd.as_fd()])?;
            match answer {
                Answer::Reply(_) => raw.in_step(),
                _ => {
                    drop(raw);
                    next_client(t)
                }
            }
        }),
    ]
}

/// Proposes a version, and checks that the reply follows the rules and that the connection answers messages. Returns the reply.
fn proposed(t: &Trial, (major, minor): (u16, u16), data: &[u8]) -> Result<Body, Stop> {
    let what = format!("VERSION {major}.{minor} with {} bytes of data", data.len());
    let (mut raw, answer) = Raw::first(t, &[VersionMessage { major, minor }.as_bytes(), data].concat())?;
    let reply = answer.done(&what)?;
    let answer: VersionMessage = reply.fixed()?;
    ensure(answer.major == major, || {
        format!("{what} is answered by major version {}, expected the one proposed", answer.major)
    })?;
    ensure(answer.minor <= minor, || {
        format!("{what} is answered by minor version {}, expected at most {minor}", answer.minor)
    })?;
    capabilities(&reply)?;
    raw.in_step()?;
    Ok(reply)
}

/// Checks that a version without agreement is refused or closes the connection, and that the next client is served.
fn not_agreed(t: &Trial, body: &[u8], what: &str) -> Verdict {
    let mut raw = Raw::dial(t, "")?;
    raw.ask(Command::VERSION, body)?.not_done(what)?;
    drop(raw);
    next_client(t)
}

fn malformed(id: &'static str, data: &'static [u8]) -> Check {
    let clauses = &["version.malformed", "wire.survives"];
    Check::new(Family::VfioUser, id, Needs::WIRE, clauses, move |t| {
        let text = String::from_utf8_lossy(data.strip_suffix(b"\0").unwrap_or(data));
        not_agreed(t, &version(data), &format!("VERSION with the data `{text}`"))
    })
}

/// The names of the capabilities in a reply, and all of it.
fn capabilities(reply: &Body) -> Result<(Vec<String>, Value), Stop> {
    let data = reply.bytes.get(VersionMessage::BYTES..).unwrap_or_default();
    if data.is_empty() {
        return Ok((Vec::new(), Value::Null));
    }
    let Some((0, json)) = data.split_last() else {
        return fail("the version data of the reply does not end with a NUL");
    };
    let all: Value = serde_json::from_slice(json)
        .map_err(|error| Stop::Fail(format!("the version data of the reply is not JSON: {error}")))?;
    ensure(all.is_object(), || "the version data of the reply is no object".into())?;
    let capabilities = all.get("capabilities").cloned().unwrap_or_default();
    let names = capabilities.as_object().map(|object| object.keys().cloned().collect()).unwrap_or_default();
    Ok((names, capabilities))
}

/// Checks that the limits are usable for a client.
fn limits(t: &Trial) -> Verdict {
    let (_, all) = capabilities(&proposed(t, VERSION, b"{\"capabilities\":{}}\0")?)?;
    for name in ["max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes"] {
        let Some(value) = all.get(name) else { continue };
        let Some(number) = value.as_u64() else {
            return fail(format!("{name} is {value}, expected a number"));
        };
        // No fds at all is a limit that the specification allows.
        ensure(number > 0 || name == "max_msg_fds", || format!("{name} is 0: nothing could be sent"))?;
    }
    Ok(())
}

/// A twin socket is announced together with the socket.
fn twin(t: &Trial) -> Verdict {
    let data = b"{\"capabilities\":{\"max_msg_fds\":8,\"twin_socket\":{\"supported\":true}}}\0";
    let reply = proposed(t, VERSION, data)?;
    let (_, all) = capabilities(&reply)?;
    if all.pointer("/twin_socket/supported") != Some(&Value::Bool(true)) {
        return skip("the server has no twin socket");
    }
    let index = all.pointer("/twin_socket/fd_index").and_then(Value::as_u64);
    let fd = index.and_then(|index| reply.fds.get(usize::try_from(index).ok()?));
    let Some(fd) = fd else {
        return fail(format!("fd_index is {index:?} of {} fds, expected one of them", reply.fds.len()));
    };
    let kind = rustix::fs::FileType::from_raw_mode(host(fstat(fd))?.st_mode);
    ensure(kind == rustix::fs::FileType::Socket, || format!("the twin socket is a {kind:?}"))
}
