//! The devices of a server, as the command line or a configuration file describes them (`docs/command.md: Many devices in one
//! server`).

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Display;
use std::io::Read;
use std::path::{Path, PathBuf};

use limosa_host::{Group, SocketAccess};
use limosa_vfio_user::server::DEVICES_MAX;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use toml::Spanned;

use crate::args::{self, Model};
use crate::exit::{self, Code};
use crate::metrics;
use crate::named_once::place;

/// The longest configuration file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A device that is to be served.
#[derive(Debug)]
pub struct Device {
    pub model: Model,
    pub options: Vec<String>,
    pub socket: PathBuf,
    pub control: Option<PathBuf>,
    pub access: SocketAccess,
    pub any_file: bool,
    /// How messages name the device's options as a whole: `--option`, or the line of a file.
    pub origin: String,
    /// The same of each of them.
    pub origins: Vec<String>,
}

impl Device {
    /// How a message names the first wrong option, or all options where no single one is wrong.
    pub fn origin_of(&self, is_wrong: impl FnMut(&String) -> bool) -> &str {
        let at = self.options.iter().position(is_wrong);
        at.and_then(|at| self.origins.get(at)).unwrap_or(&self.origin)
    }
}

/// The devices that the command line describes, itself or by a file; at least one.
pub fn devices(args: &args::Serve) -> anyhow::Result<Vec<Device>> {
    let devices = described(args)?;
    for device in &devices {
        for path in std::iter::once(&device.socket).chain(&device.control) {
            check_name(path)?;
        }
    }
    let is_at = |other: &Path, device: &Device| {
        let own = std::iter::once(&device.socket).chain(&device.control);
        own.into_iter().any(|own| place(own) == place(other))
    };
    if let Some(takeover) = &args.takeover
        && let Some(device) = devices.iter().find(|device| is_at(takeover, device))
    {
        let (takeover, socket) = (takeover.display(), device.socket.display());
        let what = format!(
            "--takeover {takeover} is a socket of the device at {socket}; expected a path of its own"
        );
        return Err(exit::error(Code::Usage, what));
    }
    if let Some(metrics) = args.metrics.as_ref().and_then(metrics::Address::path) {
        let whose = match devices.iter().find(|device| is_at(metrics, device)) {
            Some(device) => format!("a socket of the device at {}", device.socket.display()),
            None if args.takeover.as_deref().map(place) == Some(place(metrics)) => {
                "that of --takeover".into()
            }
            None => return Ok(devices),
        };
        let what = format!("--metrics unix:{} is {whose}; expected a path of its own", metrics.display());
        return Err(exit::error(Code::Usage, what));
    }
    Ok(devices)
}

/// Refuses the path of a socket by which no command could name the device: names of devices are text.
fn check_name(socket: &Path) -> anyhow::Result<()> {
    if socket.to_str().is_some() {
        return Ok(());
    }
    let what = format!(
        "{}: the path of the socket is not UTF-8, and no command could name the device; choose another path",
        socket.display()
    );
    Err(exit::error(Code::Usage, what))
}

fn described(args: &args::Serve) -> anyhow::Result<Vec<Device>> {
    match (&args.config, args.model, &args.socket) {
        (Some(file), ..) => read(file),
        (None, Some(_), Some(socket)) if args.control.as_deref().map(place) == Some(place(socket)) => {
            let what = format!("--control and --socket are one path, {}; expected two", socket.display());
            Err(exit::error(Code::Usage, what))
        }
        (None, Some(model), Some(socket)) => Ok(vec![Device {
            model,
            options: args.options.clone(),
            socket: socket.clone(),
            control: args.control.clone(),
            access: SocketAccess { mode: args.mode, group: args.group },
            any_file: args.any_file,
            origin: "--option".into(),
            origins: vec!["--option".into(); args.options.len()],
        }]),
        _ => Err(exit::error(Code::Usage, "expected MODEL and --socket, or --config")),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    defaults: Defaults,
    #[serde(default, rename = "device")]
    devices: Vec<Spanned<Described>>,
}

/// What holds for each device that says nothing else.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Defaults {
    model: Option<Model>,
    options: Option<Options>,
    #[serde(default, deserialize_with = "mode")]
    mode: Option<u32>,
    #[serde(default, deserialize_with = "group")]
    group: Option<Group>,
    any_file: Option<bool>,
}

/// A list of options, and each of them.
type Options = Spanned<Vec<Spanned<String>>>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Described {
    socket: Spanned<PathBuf>,
    control: Option<Spanned<PathBuf>>,
    model: Option<Model>,
    options: Option<Options>,
    #[serde(default, deserialize_with = "mode")]
    mode: Option<u32>,
    #[serde(default, deserialize_with = "group")]
    group: Option<Group>,
    any_file: Option<bool>,
}

fn mode<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
    args::mode(&String::deserialize(from)?).map(Some).map_err(D::Error::custom)
}

fn group<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Group>, D::Error> {
    String::deserialize(from)?.parse().map(Some).map_err(D::Error::custom)
}

fn read(path: &Path) -> anyhow::Result<Vec<Device>> {
    let name = path.display();
    let expected = "expected a file in TOML";
    let unread = |error: std::io::Error| {
        let mut error = error.to_string();
        if !error.ends_with(expected) {
            error = format!("{error}; {expected}");
        }
        exit::error(Code::Unreachable, format!("--config {name}: {error}"))
    };
    let mut bytes = Vec::new();
    let file = limosa_host::open_regular(path, expected).map_err(unread)?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(unread)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(exit::error(
            Code::Usage,
            format!("{name}: longer than {FILE_BYTES_MAX} bytes, the most that is read"),
        ));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let line = line_of(error.as_bytes(), error.utf8_error().valid_up_to());
        exit::error(Code::Usage, format!("{name}:{line}: not text in UTF-8"))
    })?;
    parse(&name, &text).map_err(|message| exit::error(Code::Usage, message))
}

/// The number of the line that has this byte.
fn line_of(text: &[u8], byte: usize) -> usize {
    1 + text.iter().take(byte).filter(|byte| **byte == b'\n').count()
}

fn parse(name: &dyn Display, text: &str) -> Result<Vec<Device>, String> {
    let line = |byte| line_of(text.as_bytes(), byte);
    let File { defaults, devices } = toml::from_str(text).map_err(|error| {
        let line = line(error.span().map_or(0, |span| span.start));
        format!("{name}:{line}: {}", error.message().replace('\n', "; "))
    })?;
    if devices.is_empty() || devices.len() > DEVICES_MAX {
        return Err(format!(
            "{name}: {} devices; expected [[device]] 1 to {DEVICES_MAX} times",
            devices.len()
        ));
    }
    let mut lines = BTreeMap::new();
    let mut check = |socket: &Spanned<PathBuf>| {
        let (path, line) = (socket.get_ref(), line(socket.span().start));
        if path.as_os_str().is_empty() {
            return Err(format!("{name}:{line}: an empty path; expected where to listen"));
        }
        if path.as_os_str().as_encoded_bytes().contains(&0) {
            return Err(format!("{name}:{line}: {} has a NUL in it, which no path has", path.display()));
        }
        match lines.entry(place(path)) {
            Entry::Vacant(vacant) => {
                vacant.insert(line);
                Ok(())
            }
            Entry::Occupied(first) => {
                let (path, first) = (path.display(), first.get());
                Err(format!(
                    "{name}:{line}: {path} is taken by line {first}; expected a path of its own for each socket"
                ))
            }
        }
    };
    let device = |described: Spanned<Described>| {
        let at = line(described.span().start);
        let described = described.into_inner();
        check(&described.socket)?;
        described.control.as_ref().map_or(Ok(()), &mut check)?;
        let model = described.model.or(defaults.model);
        let model = model.ok_or_else(|| {
            format!("{name}:{at}: a device without a model; expected model = \"uart\" or \"synthetic\" here or in [defaults]")
        })?;
        let options = described.options.or_else(|| defaults.options.clone());
        let origin = |byte| format!("{name}:{}: options", line(byte));
        let all =
            options.as_ref().map_or_else(|| format!("{name}:{at}: options"), |all| origin(all.span().start));
        let options = options.map(Spanned::into_inner).unwrap_or_default();
        let origins = options.iter().map(|option| origin(option.span().start)).collect();
        Ok(Device {
            model,
            options: options.into_iter().map(Spanned::into_inner).collect(),
            socket: described.socket.into_inner(),
            control: described.control.map(Spanned::into_inner),
            access: SocketAccess {
                mode: described.mode.or(defaults.mode).unwrap_or(SocketAccess::default().mode),
                group: described.group.or(defaults.group),
            },
            any_file: described.any_file.or(defaults.any_file).unwrap_or(false),
            origin: all,
            origins,
        })
    };
    devices.into_iter().map(device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refuses(text: &str, parts: &[&str]) {
        let message = parse(&"file", text).unwrap_err();
        for part in parts {
            assert!(message.contains(part), "`{part}` is not named: {message}");
        }
    }

    const ONE: &str = "[[device]]\nsocket = \"a\"\nmodel = \"uart\"\n";

    #[test]
    fn what_a_device_does_not_say_is_what_the_defaults_say() {
        let text = "[defaults]\nmodel = \"synthetic\"\noptions = [\"state=1M\"]\nmode = \"660\"\ngroup = \"0\"\nany-file = true\n\
                    [[device]]\nsocket = \"a\"\n\
                    [[device]]\nsocket = \"b\"\ncontrol = \"c\"\nmodel = \"uart\"\noptions = []\nmode = \"600\"\nany-file = false\n";
        let devices = parse(&"file", text).unwrap();
        let [a, b] = devices.as_slice() else { panic!("{devices:?}") };
        assert_eq!(
            (a.model, &a.options[..], a.any_file),
            (Model::Synthetic, &["state=1M".to_owned()][..], true)
        );
        assert_eq!(
            (a.access, a.control.as_ref()),
            (SocketAccess { mode: 0o660, group: Some(Group(0)) }, None)
        );
        assert_eq!((b.model, b.options.len(), b.any_file), (Model::Uart, 0, false));
        assert_eq!((b.access.mode, b.access.group), (0o600, Some(Group(0))));
        assert_eq!(
            (b.socket.to_str(), b.control.as_ref().and_then(|path| path.to_str())),
            (Some("b"), Some("c"))
        );
        let [plain] = &parse(&"file", ONE).unwrap()[..] else { panic!() };
        assert_eq!((plain.access, plain.any_file), (SocketAccess::default(), false));
    }

    #[test]
    fn the_files_that_are_shown_describe_devices() {
        let page = include_str!("../../../../../docs/command.md");
        let (_, page) = page.split_once("```toml\n").unwrap();
        let (page, _) = page.split_once("```").unwrap();
        for text in [page, include_str!("../../../../../packaging/systemd/devices.toml")] {
            // Not every machine has it.
            let text = text.replace("\"kvm\"", "\"0\"");
            assert_eq!(parse(&"file", &text).unwrap().len(), 2);
        }
    }

    #[test]
    fn errors_of_every_kind_name_the_line_and_what_is_expected() {
        refuses("", &["file: 0 devices", "[[device]]", "256"]);
        refuses(&"[[device]]\nsocket = \"a\"\nmodel = \"uart\"\n".repeat(257), &["257 devices"]);
        refuses("[[device]\n", &["file:1:"]);
        refuses(
            "[[device]]\nsocket = \"a\"\nsokket = \"b\"\n",
            &["file:3:", "`sokket`", "`socket`", "`any-file`"],
        );
        refuses("[[devices]]\nsocket = \"a\"\n", &["file:1:", "`devices`", "`device`", "`defaults`"]);
        refuses("\n[defaults]\nsocket = \"a\"\n", &["file:3:", "`socket`", "`model`", "`group`"]);
        refuses("[[device]]\nmodel = \"uart\"\n", &["file:1:", "missing field `socket`"]);
        refuses("[[device]]\nsocket = \"a\"\n", &["file:1:", "without a model", "[defaults]"]);
        refuses(
            "[[device]]\nsocket = \"a\"\nmodel = \"nvme\"\n",
            &["file:3:", "`nvme`", "`uart`", "`synthetic`"],
        );
        refuses("[[device]]\nsocket = 7\n", &["file:2:", "integer `7`"]);
        refuses("[[device]]\nsocket = \"\"\nmodel = \"uart\"\n", &["file:2:", "empty path"]);
        refuses(&format!("{ONE}mode = \"4755\"\n"), &["file:4:", "4755", "octal"]);
        refuses(&format!("{ONE}mode = 660\n"), &["file:4:", "integer `660`", "string"]);
        refuses(&format!("{ONE}group = \"no such group\"\n"), &["file:4:", "no such group"]);
        refuses(&format!("{ONE}any-file = \"yes\"\n"), &["file:4:", "boolean"]);
        refuses(&format!("{ONE}options = \"state=1M\"\n"), &["file:4:", "sequence"]);
        refuses(&format!("{ONE}model = \"uart\"\n"), &["file:4:", "duplicate key"]);
        refuses(&format!("{ONE}{ONE}"), &["file:5:", "a is taken by line 2"]);
        refuses(&format!("{ONE}control = \"./a\"\n"), &["file:4:", "taken by line 2"]);
    }

    #[test]
    fn each_option_has_its_line() {
        let text = "[defaults]\noptions = [\n\"state=1M\",\n\"block=1K\"]\nmodel = \"synthetic\"\n\
                    [[device]]\nsocket = \"a\"\n\
                    [[device]]\nsocket = \"b\"\noptions = [\"x\",\n\n\"y\"]\n\
                    [[device]]\nsocket = \"c\"\noptions = []\n";
        let devices = parse(&"file", text).unwrap();
        let [a, b, c] = devices.as_slice() else { panic!("{devices:?}") };
        assert_eq!(a.origin_of(|option| option == "block=1K"), "file:4: options");
        assert_eq!(a.origin_of(|_| false), "file:2: options");
        assert_eq!(b.origin_of(|option| option == "y"), "file:12: options");
        assert_eq!(c.origin_of(|_| true), "file:15: options");
    }

    #[test]
    fn two_paths_to_one_place_are_one_socket() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().join("real");
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, folder.path().join("link")).unwrap();
        std::os::unix::fs::symlink("real/a", folder.path().join("alias")).unwrap();
        for other in ["link/a", "real/../link/a", "alias", "real/a"] {
            assert_eq!(place(&folder.path().join(other)), place(&real.join("a")), "{other}");
        }
        assert_ne!(place(&folder.path().join("real/b")), place(&real.join("a")));
    }
}
