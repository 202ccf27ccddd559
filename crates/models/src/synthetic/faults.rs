//! Scripted faults: what goes wrong on which arc, or where in the data stream.

use std::fmt;
use std::str::FromStr;

use limosa_protocol::{MigrationFlags, State, fsm};

/// A step between two migration states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The state that is left.
    pub from: State,
    /// The state that is entered.
    pub to: State,
}

impl Step {
    /// Whether a device with these flags ever takes the step at once.
    fn exists(self, flags: MigrationFlags) -> bool {
        State::ALL.into_iter().any(|from| {
            State::ALL
                .into_iter()
                .filter_map(|to| fsm::path(flags, from, to).ok())
                .any(|path| path.arcs().any(|arc| (arc.from, arc.to) == (self.from, self.to)))
        })
    }

    /// Whether the step does nothing but end a saving session, which no device can refuse.
    fn only_ends_saving(self) -> bool {
        self.from.is_saving() && !self.to.has_session()
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}>{}", self.from, self.to)
    }
}

impl FromStr for Step {
    type Err = String;

    fn from_str(text: &str) -> Result<Step, String> {
        let (from, to) = text.split_once('>').ok_or_else(|| format!("`{text}` is not FROM>TO"))?;
        let state = |name: &str| name.parse().map_err(|error| format!("`{name}`: {error}"));
        Ok(Step { from: state(from)?, to: state(to)? })
    }
}

/// One thing that goes wrong.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ScriptedFault {
    /// `fail:FROM>TO[:TIMES]`: the step is refused (EBUSY), the first time or that many times; the
    /// device stays as it was.
    Fail(Step, u32),
    /// `error:FROM>TO`: the step breaks the device (EIO, ERROR), once.
    Error(Step),
    /// `stall:FROM>TO:MS`: the step takes that many milliseconds longer, every time.
    Stall(Step, u64),
    /// `truncate:BYTES`: each saved stream ends after that many bytes.
    Truncate(u64),
    /// `corrupt:OFFSET`: a bit of that byte of each saved stream is wrong.
    Corrupt(u64),
}

impl fmt::Display for ScriptedFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ScriptedFault::Fail(step, 1) => write!(f, "fail:{step}"),
            ScriptedFault::Fail(step, times) => write!(f, "fail:{step}:{times}"),
            ScriptedFault::Error(step) => write!(f, "error:{step}"),
            ScriptedFault::Stall(step, ms) => write!(f, "stall:{step}:{ms}"),
            ScriptedFault::Truncate(bytes) => write!(f, "truncate:{bytes}"),
            ScriptedFault::Corrupt(offset) => write!(f, "corrupt:{offset}"),
        }
    }
}

impl From<ScriptedFault> for String {
    fn from(fault: ScriptedFault) -> String {
        fault.to_string()
    }
}

impl TryFrom<String> for ScriptedFault {
    type Error = String;

    fn try_from(text: String) -> Result<ScriptedFault, String> {
        text.parse()
    }
}

impl FromStr for ScriptedFault {
    type Err = String;

    fn from_str(text: &str) -> Result<ScriptedFault, String> {
        let number = |digits: &str| digits.parse().map_err(|_| format!("`{digits}` is no number"));
        let parts: Vec<&str> = text.split(':').collect();
        match parts[..] {
            ["fail", step] => Ok(ScriptedFault::Fail(step.parse()?, 1)),
            ["fail", step, times] => {
                let times = u32::try_from(number(times)?).map_err(|_| format!("{times} is too often"))?;
                Ok(ScriptedFault::Fail(step.parse()?, times))
            }
            ["error", step] => Ok(ScriptedFault::Error(step.parse()?)),
            ["stall", step, ms] => Ok(ScriptedFault::Stall(step.parse()?, number(ms)?)),
            ["truncate", bytes] => Ok(ScriptedFault::Truncate(number(bytes)?)),
            ["corrupt", offset] => Ok(ScriptedFault::Corrupt(number(offset)?)),
            _ => Err(format!(
                "`{text}` is none of fail:FROM>TO[:TIMES], error:FROM>TO, stall:FROM>TO:MS, truncate:BYTES, corrupt:OFFSET"
            )),
        }
    }
}

impl ScriptedFault {
    /// Refuses a fault that can never happen on a device with these flags.
    pub(super) fn check(&self, flags: MigrationFlags) -> Result<(), String> {
        let (step, refuses) = match self {
            ScriptedFault::Fail(step, _) | ScriptedFault::Error(step) => (step, true),
            ScriptedFault::Stall(step, _) => (step, false),
            ScriptedFault::Truncate(_) | ScriptedFault::Corrupt(_) => return Ok(()),
        };
        if !step.exists(flags) {
            return Err(format!("{self}: a device with {flags} never takes the step {step}"));
        }
        if refuses && step.only_ends_saving() {
            return Err(format!("{self}: the end of a saving session cannot fail"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_round_trip_through_their_text() {
        for text in [
            "fail:PRE_COPY_P2P>STOP_COPY",
            "fail:RUNNING>STOP:3",
            "error:STOP>RESUMING",
            "stall:RUNNING>PRE_COPY:250",
            "truncate:4096",
            "corrupt:17",
        ] {
            assert_eq!(text.parse::<ScriptedFault>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn faults_that_are_not_understood_are_refused_with_the_reason() {
        for (text, part) in [
            ("", "none of"),
            ("fail", "none of"),
            ("fail:STOP", "FROM>TO"),
            ("fail:STOP>HALT", "HALT"),
            ("fail:STOP>RUNNING:x", "`x`"),
            ("fail:STOP>RUNNING:4294967296", "too often"),
            ("stall:STOP>RUNNING", "none of"),
            ("truncate:-1", "`-1`"),
        ] {
            let said = text.parse::<ScriptedFault>().unwrap_err();
            assert!(said.contains(part), "{text}: {said}");
        }
    }

    #[test]
    fn faults_on_steps_that_a_device_never_takes_are_refused() {
        let check = |text: &str, flags| text.parse::<ScriptedFault>().unwrap().check(flags);
        let [plain, p2p, pre_copy, all] = MigrationFlags::SETS;
        assert!(check("fail:RUNNING>STOP", plain).is_ok());
        assert!(check("fail:RUNNING>STOP", p2p).is_err());
        assert!(check("fail:PRE_COPY>STOP_COPY", pre_copy).is_ok());
        assert!(check("fail:PRE_COPY>STOP_COPY", all).is_err());
        assert!(check("fail:STOP_COPY>RUNNING", all).is_err());
        assert!(check("error:PRE_COPY>RUNNING", all).is_err(), "cannot fail");
        assert!(check("stall:PRE_COPY>RUNNING:1", all).is_ok());
        assert!(check("error:RESUMING>STOP", all).is_ok());
    }
}
