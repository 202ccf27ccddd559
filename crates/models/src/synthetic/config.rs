//! The configuration of a synthetic device: a plain structure, and its text form `key=value,key=value`.

use std::str::FromStr;

use limosa_protocol::MigrationFlags;

use super::dma::Pattern;
use super::faults::ScriptedFault;

/// The configuration of a synthetic device.
///
/// As text: `state=64M,precopy=80,dirty-rate=10M,p2p=off,fault=fail:STOP>STOP_COPY`. Sizes take
/// K, M and G (powers of 1024); `fault` may be given several times.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SyntheticConfig {
    /// `seed`: the seed of all contents. A loaded state has its own.
    pub seed: u64,
    /// `state`: bytes of state, a multiple of `block`.
    pub state_bytes: u64,
    /// `block`: bytes of state that change at once; a power of two, 4 KiB to 1 MiB.
    pub block_bytes: u32,
    /// `precopy`: percent of the state that is saved in pre-copy; the rest waits for stop-copy.
    pub precopy_percent: u8,
    /// `dirty-rate`: bytes of state that the device changes each second while it runs.
    pub dirty_rate: u64,
    /// `p2p`: whether it has the P2P states (`on`, `off`).
    pub p2p: bool,
    /// `pre-copy`: whether it has the pre-copy states (`on`, `off`).
    pub pre_copy: bool,
    /// `verify`: whether every block is checked as it is loaded. `off` is for measuring transports.
    pub verify: bool,
    /// `dma-pattern`: `sequential`, `random` or `one-page`; the register's value at power-on.
    pub dma_pattern: Pattern,
    /// `dma-rate`: bytes written to guest memory each second, 0 for as fast as possible; the
    /// register's value at power-on.
    pub dma_rate: u64,
    /// `fault`: what goes wrong.
    pub faults: Vec<ScriptedFault>,
}

impl Default for SyntheticConfig {
    fn default() -> SyntheticConfig {
        SyntheticConfig {
            seed: 1,
            state_bytes: 16 << 20,
            block_bytes: 64 << 10,
            precopy_percent: 100,
            dirty_rate: 0,
            p2p: true,
            pre_copy: true,
            verify: true,
            dma_pattern: Pattern::Sequential,
            dma_rate: 64 << 20,
            faults: Vec::new(),
        }
    }
}

/// The largest state, in bytes.
const STATE_BYTES_MAX: u64 = 64 << 30;

/// Why a configuration is not that of a synthetic device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("synthetic device: {0}")]
pub struct ConfigError(String);

impl ConfigError {
    /// The system gives no memory for a state of this size.
    pub(super) fn no_room(state_bytes: u64) -> ConfigError {
        ConfigError(format!(
            "state={state_bytes}: this machine does not give a process this much memory; expected a smaller state"
        ))
    }
}

impl SyntheticConfig {
    /// The migration flags.
    pub fn flags(&self) -> MigrationFlags {
        let mut flags = MigrationFlags::STOP_COPY;
        flags.set(MigrationFlags::P2P, self.p2p);
        flags.set(MigrationFlags::PRE_COPY, self.pre_copy);
        flags
    }

    /// How many blocks the state has.
    pub fn blocks(&self) -> usize {
        (self.state_bytes / u64::from(self.block_bytes.max(1))) as usize
    }

    /// Refuses what no device can be.
    pub fn check(&self) -> Result<(), ConfigError> {
        let block = self.block_bytes;
        let wrong = |what: String| Err(ConfigError(what));
        if !block.is_power_of_two() || !(4096..=1 << 20).contains(&block) {
            return wrong(format!("block={block}: expected a power of two from 4K to 1M"));
        }
        let state = self.state_bytes;
        if state == 0 || state > STATE_BYTES_MAX || !state.is_multiple_of(u64::from(block)) {
            return wrong(format!("state={state}: expected a multiple of block={block}, at most 64G"));
        }
        if self.precopy_percent > 100 {
            return wrong(format!("precopy={}: expected 0 to 100", self.precopy_percent));
        }
        self.faults.iter().try_for_each(|fault| fault.check(self.flags())).map_err(ConfigError)
    }
}

impl FromStr for SyntheticConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<SyntheticConfig, ConfigError> {
        let mut config = SyntheticConfig::default();
        for pair in text.split(',').filter(|pair| !pair.is_empty()) {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| ConfigError(format!("`{pair}` is not key=value")))?;
            config.set(key, value).map_err(|what| ConfigError(format!("{key}={value}: {what}")))?;
        }
        config.check()?;
        Ok(config)
    }
}

impl SyntheticConfig {
    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "seed" => self.seed = size(value)?,
            "state" => self.state_bytes = size(value)?,
            "block" => self.block_bytes = size(value)?.try_into().map_err(|_| "too large")?,
            "precopy" => {
                self.precopy_percent =
                    value.trim_end_matches('%').parse().map_err(|_| "expected 0 to 100")?;
            }
            "dirty-rate" => self.dirty_rate = size(value)?,
            "p2p" => self.p2p = switch(value)?,
            "pre-copy" => self.pre_copy = switch(value)?,
            "verify" => self.verify = switch(value)?,
            "dma-pattern" => self.dma_pattern = value.parse()?,
            "dma-rate" => self.dma_rate = size(value)?,
            "fault" => self.faults.push(value.parse()?),
            _ => {
                return Err(
                    "no such key; there are seed, state, block, precopy, dirty-rate, p2p, pre-copy, \
                            verify, dma-pattern, dma-rate, fault"
                        .into(),
                );
            }
        }
        Ok(())
    }
}

fn switch(value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("expected on or off".into()),
    }
}

fn size(value: &str) -> Result<u64, String> {
    let (digits, shift) = match value.as_bytes().last() {
        Some(b'K' | b'k') => (&value[..value.len() - 1], 10),
        Some(b'M' | b'm') => (&value[..value.len() - 1], 20),
        Some(b'G' | b'g') => (&value[..value.len() - 1], 30),
        _ => (value, 0),
    };
    let number: u64 = digits.parse().map_err(|_| "expected a number, with K, M or G if you like")?;
    number.checked_mul(1 << shift).ok_or_else(|| "too large".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_sets_what_it_names_and_leaves_the_rest() {
        let config: SyntheticConfig =
            "state=1G,block=1M,precopy=80%,dirty-rate=10M,p2p=off,dma-pattern=random,fault=fail:RUNNING>STOP,fault=truncate:5"
                .parse()
                .unwrap();
        assert_eq!(config.state_bytes, 1 << 30);
        assert_eq!((config.block_bytes, config.blocks()), (1 << 20, 1024));
        assert_eq!((config.precopy_percent, config.dirty_rate), (80, 10 << 20));
        assert_eq!(config.dma_pattern, Pattern::Random);
        assert_eq!(config.faults.len(), 2);
        assert_eq!(config.flags(), MigrationFlags::SETS[2]);
        assert_eq!("".parse::<SyntheticConfig>().unwrap(), SyntheticConfig::default());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("state", "key=value"),
            ("colour=red", "no such key"),
            ("state=0", "state=0"),
            ("state=5000", "multiple"),
            ("state=1T", "expected a number"),
            ("state=99999999999G", "too large"),
            ("block=5000", "power of two"),
            ("block=2M", "power of two"),
            ("precopy=101", "0 to 100"),
            ("precopy=x", "0 to 100"),
            ("p2p=maybe", "on or off"),
            ("dma-pattern=spiral", "sequential"),
            ("fault=explode", "none of"),
            ("p2p=off,fault=fail:RUNNING>RUNNING_P2P", "never takes"),
        ] {
            let said = text.parse::<SyntheticConfig>().unwrap_err().to_string();
            assert!(said.contains(part), "{text}: {said}");
        }
    }
}
