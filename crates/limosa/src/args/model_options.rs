//! The options of models: the one list behind the help of `serve`, `serve MODEL -o help` and what a shell completes.

use serde::Serialize;

use super::Model;

/// An option of a model.
#[derive(Debug, Serialize)]
pub struct ModelOption {
    pub name: &'static str,
    /// The type of the value, or all values that there are.
    pub value: &'static str,
    /// The default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default: Option<&'static str>,
    pub meaning: &'static str,
}

const fn option(
    name: &'static str,
    value: &'static str,
    default: Option<&'static str>,
    meaning: &'static str,
) -> ModelOption {
    ModelOption { name, value, default, meaning }
}

const UART: &[ModelOption] = &[
    option(
        "line",
        "echo|PATH",
        Some("echo"),
        "the other end of the line: echo, which sends everything back, or the path of a terminal or UNIX socket; twice for \
         two ports",
    ),
    option(
        "as",
        "mtty",
        None,
        "imitate the card of the Linux driver mtty, and move to and from it; echo only. Without it, a PCI 16550A",
    ),
];

const SYNTHETIC: &[ModelOption] = &[
    option("state", "BYTES", Some("16M"), "size of the state, a multiple of block"),
    option("block", "BYTES", Some("64K"), "unit of changes to the state, a power of two from 4K to 1M"),
    option("precopy", "PERCENT", Some("100"), "share of the state that is saved in pre-copy"),
    option("dirty-rate", "BYTES", Some("0"), "bytes of the state that change each second"),
    option("p2p", "on|off", Some("on"), "whether the device has the P2P states"),
    option("pre-copy", "on|off", Some("on"), "whether the device has the pre-copy states"),
    option(
        "dma-pattern",
        "sequential|random|one-page",
        Some("sequential"),
        "order of writes to guest memory",
    ),
    option("dma-rate", "BYTES", Some("64M"), "bytes written to guest memory each second, 0 for no limit"),
    option("seed", "NUMBER", Some("1"), "seed of the contents"),
    option("verify", "on|off", Some("on"), "whether every loaded block is checked"),
    option(
        "fault",
        "FAULT",
        None,
        "injected fault; may be repeated: fail:ARC[:TIMES], error:ARC, truncate:BYTES, stall:ARC:MS, corrupt:OFFSET, with ARC \
         like PRE_COPY_P2P>STOP_COPY",
    ),
];

impl Model {
    pub const ALL: [Model; 2] = [Model::Uart, Model::Synthetic];

    /// All that it can be told.
    pub fn options(self) -> &'static [ModelOption] {
        match self {
            Model::Uart => UART,
            Model::Synthetic => SYNTHETIC,
        }
    }

    /// Its options for people, in lines of at most this width.
    pub fn describe(self, columns: usize) -> String {
        let sizes = match self {
            Model::Synthetic => " (BYTES take K, M and G)",
            Model::Uart => "",
        };
        let mut text = format!("Options of {}{sizes}:\n", self.name());
        for ModelOption { name, value, default, meaning } in self.options() {
            let default = default.map_or(String::new(), |default| format!(" ({default})"));
            let meaning = crate::text::wrapped(&format!("{meaning}{default}"), columns.saturating_sub(25));
            let mut meaning = meaning.into_iter();
            let (option, indent) = (format!("{name}={value}"), " ".repeat(25));
            match option.len() < 23 {
                true => text += &format!("  {option:<22} {}\n", meaning.next().unwrap_or_default()),
                false => text += &format!("  {option}\n"),
            }
            for line in meaning {
                text += &format!("{indent}{line}\n");
            }
        }
        text
    }
}

/// The completions behind `-o`: every value of options with fixed values, and the names of options whose value may be anything.
pub fn words() -> impl Iterator<Item = String> {
    let of = |option: &ModelOption| {
        let name = option.name;
        let is_word = |value: &&str| !value.starts_with(|c: char| c.is_ascii_uppercase());
        let values: Vec<_> =
            option.value.split('|').filter(is_word).map(|value| format!("{name}={value}")).collect();
        let any = option.value.split('|').any(|value| !is_word(&value)).then(|| format!("{name}="));
        values.into_iter().chain(any).collect::<Vec<_>>()
    };
    Model::ALL.into_iter().flat_map(Model::options).flat_map(of).chain(["help".into()])
}

#[cfg(test)]
mod tests {
    use limosa_models::synthetic::SyntheticConfig;

    use super::*;

    #[test]
    fn the_options_are_those_that_the_model_takes_with_its_defaults() {
        let unknown = "nothing=1".parse::<SyntheticConfig>().unwrap_err().to_string();
        let (_, known) = unknown.split_once("there are ").unwrap();
        let mut known: Vec<_> = known.split(',').map(str::trim).collect();
        let mut listed: Vec<_> = SYNTHETIC.iter().map(|option| option.name).collect();
        known.sort_unstable();
        listed.sort_unstable();
        assert_eq!(listed, known);
        for ModelOption { name, value, default, .. } in SYNTHETIC {
            let of = |value: &str| format!("{name}={value}").parse::<SyntheticConfig>();
            if let Some(default) = default {
                assert_eq!(of(default).unwrap(), SyntheticConfig::default(), "{name}");
            }
            for value in value.split('|').filter(|value| value.contains(char::is_lowercase)) {
                of(value).unwrap();
            }
        }
    }

    #[test]
    fn the_page_of_the_synthetic_device_has_its_options() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/synthetic.md");
        // A packaged crate has no pages beside it.
        let Ok(page) = std::fs::read_to_string(page) else { return };
        let row = |option: &ModelOption| {
            let ModelOption { name, value, default, meaning } = option;
            let default = default.map_or(" ".into(), |default| format!(" {default} "));
            format!("| {name}={} |{default}| {meaning} |\n", value.replace('|', "\\|"))
        };
        let table: String = SYNTHETIC.iter().map(row).collect();
        assert!(page.contains(&table), "docs/synthetic.md lacks this table:\n{table}");
    }

    #[test]
    fn lines_are_no_wider_than_they_may_be() {
        for model in Model::ALL {
            let text = model.describe(80);
            assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
            for option in model.options() {
                assert!(text.contains(&format!("  {}=", option.name)), "{}", option.name);
            }
        }
    }
}
