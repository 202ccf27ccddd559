//! The commands of README.md and `docs/` run as they are written: each page from top to bottom, in an empty folder, with
//! the command under the name by which the page calls it. A block that needs more says what behind `console`, and how many
//! of those there are is held here.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::{Folder, Running};
use rustix::process::{Pid, Signal, kill_process_group};

/// Commands that run, and blocks that need something, by what they need.
const RUN: usize = 56;
const NEED: [(&str, usize); 9] = [
    ("needs-cargo", 10),
    ("needs-host", 2),
    ("needs-kernel", 3),
    ("needs-openssl", 4),
    ("needs-quiet", 1),
    ("needs-root", 1),
    ("needs-store", 1),
    ("needs-tshark", 1),
    ("needs-vmm", 5),
];

/// A command, and the lines that the page shows below it.
#[derive(Debug)]
struct Shown {
    command: String,
    lines: Vec<String>,
}

/// A block of commands.
#[derive(Debug)]
struct Block {
    needs: Option<String>,
    commands: Vec<Shown>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// README.md, and the pages of `docs/`.
fn pages() -> Vec<PathBuf> {
    let docs = std::fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let mut pages: Vec<_> = docs.filter(|path| path.extension().is_some_and(|end| end == "md")).collect();
    pages.push(root().join("README.md"));
    pages.sort();
    pages
}

/// The blocks of commands of a page.
fn blocks(page: &Path) -> Vec<Block> {
    let text = std::fs::read_to_string(page).unwrap();
    let mut blocks = Vec::new();
    let mut lines = text.lines().map(str::trim_start);
    while let Some(line) = lines.next() {
        let Some(info) = line.strip_prefix("```") else { continue };
        let inside: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
        let mut info = info.split_whitespace();
        if info.next() != Some("console") {
            let is_command = |line: &&str| line.starts_with("$ ") || line.starts_with("# limosa");
            assert!(!inside.iter().any(is_command), "{}: {inside:?}", page.display());
            continue;
        }
        let needs = info.next().map(str::to_owned);
        blocks.push(Block { needs, commands: commands(&inside) });
    }
    blocks
}

fn commands(lines: &[&str]) -> Vec<Shown> {
    let mut commands: Vec<Shown> = Vec::new();
    for line in lines {
        let begun = line.strip_prefix("$ ").or_else(|| line.strip_prefix("# "));
        match (begun, commands.last_mut()) {
            (Some(command), _) => commands.push(Shown { command: command.to_owned(), lines: Vec::new() }),
            (None, Some(last)) if last.command.ends_with('\\') => {
                last.command.pop();
                last.command.push_str(line);
            }
            (None, Some(last)) => last.lines.push((*line).to_owned()),
            (None, None) => panic!("a block begins with output: {line}"),
        }
    }
    commands
}

/// Whether a line is as it is shown, where `…` stands for what differs.
fn is_as_shown(said: &str, shown: &str) -> bool {
    let mut parts = shown.split('…');
    let Some(mut rest) = parts.next().and_then(|first| said.strip_prefix(first)) else { return false };
    let mut ends = rest.is_empty();
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
        ends = part.is_empty() || rest.is_empty();
    }
    ends
}

/// A shell in a folder, into which commands are typed.
struct Shell {
    process: Running,
    said: Vec<String>,
    // Removed after what runs in it has ended.
    _folder: Folder,
}

impl Shell {
    fn new() -> Shell {
        let folder = Folder::new();
        let limosa = Path::new(env!("CARGO_BIN_EXE_limosa"));
        let path = std::env::var("PATH").unwrap();
        let mut command = Command::new("bash");
        command
            .arg("-s")
            .current_dir(folder.path(""))
            .env("PATH", format!("{}:{path}", limosa.parent().unwrap().display()))
            .env("XDG_STATE_HOME", folder.path("state"))
            .env_remove("RUST_LOG")
            .process_group(0);
        let process = Running::start_with_input(&mut command, Stdio::piped());
        let mut shell = Shell { process, said: Vec::new(), _folder: folder };
        shell.types("exec 2>&1");
        shell
    }

    fn types(&mut self, line: &str) {
        self.process.say(line);
    }

    /// Waits for a line, among those that were not waited for before.
    fn waits_for(&mut self, what: &str, is_it: impl Fn(&str) -> bool) -> String {
        loop {
            if let Some(at) = self.said.iter().position(|line| is_it(line)) {
                return self.said.remove(at);
            }
            let line = self.process.next_line();
            self.said.push(line.unwrap_or_else(|| panic!("{what}: the shell ended: {:#?}", self.said)));
        }
    }

    /// Runs a command, to its end unless it is put into the background, and waits for what the page shows of it.
    fn runs(&mut self, page: &str, shown: &Shown) {
        let what = format!("{page}: {}", shown.command);
        self.types(&shown.command);
        self.types("echo ended $?");
        let ended = self.waits_for(&what, |line| line.starts_with("ended "));
        assert_eq!(ended, "ended 0", "{what}: {:#?}", self.said);
        for line in &shown.lines {
            self.waits_for(&format!("{what}, which shows `{line}`"), |said| is_as_shown(said, line));
        }
        self.said.clear();
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let group = Pid::from_raw(self.process.pid().parse().unwrap()).unwrap();
        // With it the servers that were started in the background.
        let _ = kill_process_group(group, Signal::TERM);
    }
}

#[test]
fn commands_of_the_documentation_did_not_run_as_written() {
    let with = std::env::var("LIMOSA_DOCS_WITH").unwrap_or_default();
    let with: Vec<String> = with.split_whitespace().map(|need| format!("needs-{need}")).collect();
    // Each page has a folder of its own, and its commands mostly wait.
    let run = std::thread::scope(|scope| {
        let with = &with;
        let pages: Vec<_> =
            pages().into_iter().map(|page| scope.spawn(move || runs_page(&page, with))).collect();
        pages
            .into_iter()
            .map(|page| page.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .sum::<usize>()
    });
    assert_eq!(run, RUN, "commands that run");
}

/// Runs the commands of a page. How many need nothing.
fn runs_page(page: &Path, with: &[String]) -> usize {
    let name = page.file_name().unwrap().to_str().unwrap().to_owned();
    let mut shell = Shell::new();
    let mut run = 0;
    for block in blocks(page) {
        if block.needs.as_ref().is_some_and(|need| !with.contains(need)) {
            continue;
        }
        for shown in &block.commands {
            shell.runs(&name, shown);
            run += usize::from(block.needs.is_none());
        }
    }
    run
}

#[test]
fn blocks_that_do_not_run_say_what_they_need() {
    let mut needs = BTreeMap::new();
    for block in pages().iter().flat_map(|page| blocks(page)) {
        if let Some(need) = block.needs {
            *needs.entry(need).or_insert(0) += 1;
        }
    }
    let expected: BTreeMap<_, _> = NEED.into_iter().map(|(need, count)| (need.to_owned(), count)).collect();
    assert_eq!(needs, expected);
}

#[test]
fn a_page_was_missing_from_the_table_of_contents() {
    let docs = root().join("docs");
    let contents = std::fs::read_to_string(docs.join("SUMMARY.md")).unwrap();
    let links: BTreeSet<PathBuf> = contents
        .lines()
        .filter_map(|line| line.split_once("](")?.1.strip_suffix(')'))
        .map(|link| docs.join(link))
        .collect();
    let there: BTreeSet<PathBuf> = ["", "conformance"]
        .into_iter()
        .flat_map(|folder| std::fs::read_dir(docs.join(folder)).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "md") && !path.ends_with("SUMMARY.md"))
        .map(|path| path.components().collect())
        .collect();
    assert_eq!(links, there);
}

/// Links to pages, files and headings of the tree.
#[test]
fn a_link_led_nowhere() {
    let more =
        ["ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "lab/README.md", "docs/conformance/README.md"];
    for page in pages().into_iter().chain(more.map(|page| root().join(page))) {
        let text = std::fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link) {
            if link.contains("://") || link.contains(char::is_whitespace) {
                continue;
            }
            let (file, heading) = link.split_once('#').map_or((link, None), |(file, at)| (file, Some(at)));
            let target = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            assert!(target.exists(), "{}: {link}", page.display());
            let Some(heading) = heading else { continue };
            let text = std::fs::read_to_string(&target).unwrap();
            let is_there =
                text.lines().filter(|line| line.starts_with('#')).any(|line| anchor(line) == heading);
            assert!(is_there, "{}: {link}", page.display());
        }
    }
}

/// What a heading is called in a link.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text.chars().filter(|letter| letter.is_alphanumeric() || " -_".contains(*letter));
    kept.map(|letter| if letter == ' ' { '-' } else { letter }).collect()
}

/// Cargo is not run inside of a test: it would build everything once more, with other features.
#[test]
fn an_example_was_named_without_its_package() {
    let mut found = 0;
    let more = [
        "CONTRIBUTING.md",
        "lab/README.md",
        "crates/migrate/examples/toy_vmm/main.rs",
        "crates/vfio-user/examples/vmm.rs",
    ];
    let pages = pages().into_iter().chain(more.map(|page| root().join(page)));
    for page in pages {
        let text = std::fs::read_to_string(&page).unwrap();
        for line in text.lines().filter(|line| line.contains("cargo ")) {
            let words: Vec<&str> =
                line.split(|letter: char| letter.is_whitespace() || letter == '`').collect();
            let after = |flags: &[&str]| {
                let at = words.iter().position(|word| flags.contains(word))?;
                words.get(at + 1).copied()
            };
            let package = after(&["-p", "--package"]);
            let folder = root()
                .join("crates")
                .join(package.map_or("limosa", |name| name.trim_start_matches("limosa-")));
            assert!(folder.join("Cargo.toml").exists(), "{}: {line}", page.display());
            for (flag, of) in [("--example", "examples"), ("--bench", "benches"), ("--test", "tests")] {
                let Some(target) = after(&[flag]) else { continue };
                let there = [format!("{target}.rs"), format!("{target}/main.rs")];
                let is_there = there.iter().any(|name| folder.join(of).join(name).exists());
                assert!(is_there, "{}: {line}", page.display());
                found += 1;
            }
        }
    }
    assert!(found > 3, "{found} were found");
}

#[test]
fn a_line_that_is_shown_is_compared_but_for_what_differs() {
    assert!(is_as_shown("blake3 4e56", "blake3 …") && is_as_shown("a 1 b 2 c", "a … b … c"));
    assert!(
        is_as_shown("listening on a", "listening on a") && !is_as_shown("listening on ab", "listening on a")
    );
    assert!(!is_as_shown("a 1 c", "a … b") && !is_as_shown("a 1 b 2", "a … b"));
}
