//! Output that describes the command itself: the state machine, completions, manual pages, options of models.

use super::*;

#[test]
fn fsm_prints_every_path_of_every_flag_set() {
    let text = limosa(&["fsm", "--paths"]).ok();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 256);
    assert_eq!(lines[0], "STOP_COPY ERROR ERROR EINVAL");
    for line in [
        "STOP_COPY RUNNING STOP_COPY RUNNING>STOP>STOP_COPY",
        "STOP_COPY RUNNING PRE_COPY EINVAL",
        "STOP_COPY+P2P RUNNING STOP RUNNING>RUNNING_P2P>STOP",
        "STOP_COPY+P2P+PRE_COPY PRE_COPY STOP PRE_COPY>RUNNING>RUNNING_P2P>STOP",
        "STOP_COPY+P2P+PRE_COPY PRE_COPY STOP_COPY PRE_COPY>PRE_COPY_P2P>STOP_COPY",
        "STOP_COPY+P2P+PRE_COPY STOP_COPY PRE_COPY EINVAL",
        "STOP_COPY+P2P+PRE_COPY STOP STOP STOP",
        "STOP_COPY+P2P+PRE_COPY ERROR RUNNING EINVAL",
        "STOP_COPY+P2P+PRE_COPY RUNNING ERROR EINVAL",
    ] {
        assert!(lines.contains(&line), "{line}");
    }
    let sets = ["STOP_COPY", "STOP_COPY+P2P", "STOP_COPY+PRE_COPY", "STOP_COPY+P2P+PRE_COPY"];
    for (set, lines) in sets.iter().zip(lines.chunks(64)) {
        assert!(lines.iter().all(|line| line.split(' ').next() == Some(set)), "{set}");
        assert!(lines.iter().all(|line| line.split(' ').count() == 4), "{set}");
    }
}

#[test]
fn fsm_has_a_table_two_graphs_and_json() {
    assert!(limosa(&["fsm"]).ok().contains("RUNNING_P2P"));
    let dot = limosa(&["fsm", "--dot"]).ok();
    assert!(dot.starts_with("digraph") && dot.trim_end().ends_with('}'), "{dot}");
    let mermaid = limosa(&["fsm", "--mermaid"]).ok();
    assert!(mermaid.starts_with("stateDiagram"), "{mermaid}");
    for form in [&[][..], &["--dot"], &["--mermaid"], &["--paths"]] {
        let json = limosa(&[&["--json", "fsm"], form].concat()).json();
        let lines = json["transitions"].as_array().unwrap();
        assert_eq!(lines.len(), 256);
        let line = lines.iter().find(|line| {
            let flags = serde_json::json!(["STOP_COPY", "P2P", "PRE_COPY"]);
            line["from"] == "PRE_COPY" && line["to"] == "STOP" && line["flags"] == flags
        });
        assert_eq!(line.unwrap()["path"], serde_json::json!(["PRE_COPY", "RUNNING", "RUNNING_P2P", "STOP"]));
    }
}

#[test]
fn completions_and_manual_pages_are_generated() {
    for (shell, part) in [("bash", "complete"), ("zsh", "#compdef limosa"), ("fish", "complete -c limosa")] {
        let script = limosa(&["completions", shell]).ok();
        assert!(script.contains(part) && script.contains("migrate"), "{shell}");
        let json = limosa(&["--json", "completions", shell]).json();
        assert_eq!(json["script"], script);
    }
    let folder = Folder::new();
    let man = folder.text("new/man");
    assert!(limosa(&["man", &man]).ok().contains(&man));
    for page in ["limosa.1", "limosa-migrate.1", "limosa-state-set.1"] {
        let text = std::fs::read_to_string(folder.path("new/man").join(page)).unwrap();
        assert!(text.contains("EXIT STATUS") && text.contains("EXAMPLES"), "{page}: {text}");
    }
    assert_eq!(limosa(&["--json", "man", &man]).json()["folder"], man.as_str());
}

#[test]
fn options_of_a_model_are_listed_with_their_values_and_defaults() {
    let text = limosa(&["serve", "synthetic", "-o", "help"]).ok();
    for part in ["dma-pattern=sequential|random|one-page", "state=BYTES", "a multiple of block (16M)"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 80) && !text.contains("line="), "{text}");
    assert!(limosa(&["serve", "uart", "-o", "state=1M,help"]).ok().contains("line=echo|PATH"));
    let both = limosa(&["serve", "-o", "help"]).ok();
    assert!(both.contains("Options of uart") && both.contains("Options of synthetic"), "{both}");
    let json = limosa(&["--json", "serve", "synthetic", "-o", "help"]).json();
    let option = &json["models"][0]["options"][0];
    assert_eq!((&option["name"], &option["default"]), (&"state".into(), &"16M".into()));
    assert!(limosa(&["serve", "--help"]).ok().contains("state=BYTES"));
    limosa(&["serve", "--socket", "x"]).fails(2, &["MODEL", "--config"]);
}

/// Bash's completions of the last of these words.
fn completed(script: &str, words: &[&str]) -> String {
    let line = "source \"$1\"; shift; COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); COMP_LINE=\"$*\"; COMP_POINT=${#COMP_LINE}; \
                _limosa limosa \"${COMP_WORDS[COMP_CWORD]}\" \"${COMP_WORDS[COMP_CWORD - 1]}\"; echo \"${COMPREPLY[@]}\"";
    let mut bash = std::process::Command::new("bash");
    bash.args(["-c", line, "bash", script, "limosa"]).args(words);
    crate::support::Running::start(&mut bash).end().ok()
}

#[test]
fn a_shell_completes_options_of_models_methods_states_and_devices() {
    let folder = Folder::new();
    let script = folder.text("script");
    std::fs::write(&script, limosa(&["completions", "bash"]).ok()).unwrap();
    std::fs::write(folder.path("net.sock"), "").unwrap();
    // Of an argument without an option it knows nothing, and offers files: most devices are sockets.
    assert!(std::fs::read_to_string(&script).unwrap().contains("-o bashdefault -o default limosa"));
    for (words, expected) in [
        (&["serve", "synthetic", "-o", "dma-pattern=r"][..], &["dma-pattern=random"][..]),
        (&["serve", "synthetic", "--option", "p2p"], &["p2p=on", "p2p=off"]),
        (&["serve", "uart", "-o", "st"], &["state="]),
        (&["send", "x", "--compress", ""], &["zstd", "lz4"]),
        (&["state", "x", "set", "PRE"], &["PRE_COPY", "PRE_COPY_P2P"]),
        (&["check", "--peer", &folder.text("ne")], &["net.sock"]),
    ] {
        let offered = completed(&script, words);
        assert!(expected.iter().all(|word| offered.contains(word)), "{words:?}: {offered}");
    }
}
