//! [`Profile`]: a device's claims, and the checks that it has to pass.

use std::collections::BTreeSet;

use limosa_protocol::MigrationFlags;
use serde::Deserialize;

use crate::check::{Family, Outcome};
use crate::families;
use crate::report::Report;

/// A device's claims, as JSON. A device that lacks a claimed feature fails; a check that the profile excuses may fail.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Profile {
    /// The device that makes these claims.
    pub name: String,
    /// The migration flags that the device has to have, such as `STOP_COPY+PRE_COPY`.
    pub flags: Option<String>,
    /// The features that it has to have, by the standard's names.
    pub features: Vec<String>,
    /// The families of which no check may fail; all of them when empty.
    pub families: Vec<Family>,
    /// Checks that may fail, each with the reason.
    pub excused: Vec<Excused>,
}

/// A check that may fail.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Excused {
    /// The check's id.
    pub id: String,
    /// Why.
    pub why: String,
}

/// Why a text is not a profile.
#[derive(Debug)]
pub struct ProfileError(String);

impl std::fmt::Display for ProfileError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "not a profile: {}", self.0)
    }
}

impl std::error::Error for ProfileError {}

impl Profile {
    /// Reads a profile, and checks that the flags, features and checks that it names exist.
    pub fn parse(text: &str) -> Result<Profile, ProfileError> {
        let profile: Profile = serde_json::from_str(text).map_err(|error| ProfileError(error.to_string()))?;
        if let Some(flags) = &profile.flags {
            flags.parse::<MigrationFlags>().map_err(|error| ProfileError(format!("flags: {error}")))?;
        }
        let features: BTreeSet<String> = (0..)
            .map(limosa_protocol::FeatureIndex)
            .take_while(|index| index.rules().is_some())
            .map(|index| index.to_string())
            .collect();
        if let Some(unknown) = profile.features.iter().find(|feature| !features.contains(*feature)) {
            return Err(ProfileError(format!("features: there is no {unknown}")));
        }
        let ids: BTreeSet<String> = families::checks().iter().map(|check| check.id.to_string()).collect();
        if let Some(unknown) = profile.excused.iter().find(|excused| !ids.contains(&excused.id)) {
            return Err(ProfileError(format!("excused: there is no check {}", unknown.id)));
        }
        Ok(profile)
    }

    /// The requirements of the profile that the report does not fulfil, a line each; empty if the device fulfils its
    /// claims.
    pub fn broken_by(&self, report: &Report) -> Vec<String> {
        let mut broken = Vec::new();
        let claimed = self.flags.as_ref().and_then(|flags| flags.parse::<MigrationFlags>().ok());
        if let Some(missing) = claimed.map(|claimed| claimed.difference(report.facts.flags))
            && !missing.is_empty()
        {
            broken
                .push(format!("the flags {missing} are claimed, and the device has {}", report.facts.flags));
        }
        for feature in self.features.iter().filter(|feature| !report.facts.features.contains(feature)) {
            broken.push(format!("{feature} is claimed, and the device does not have it"));
        }
        for check in &report.checks {
            let required = self.families.is_empty() || self.families.contains(&check.family);
            let excused = self.excused.iter().any(|excused| excused.id == check.id);
            if let (true, false, Outcome::Fail(what)) = (required, excused, &check.outcome) {
                broken.push(format!("{}: {what}", check.id));
            }
        }
        if let Some(why) = &report.ended_early {
            broken.push(format!("the suite ended early: {why}"));
        }
        broken
    }

    /// Excused checks that passed: the excuse is out of date.
    pub fn out_of_date(&self, report: &Report) -> Vec<&str> {
        let passed =
            |id: &str| report.checks.iter().any(|check| check.id == id && check.outcome == Outcome::Pass);
        self.excused.iter().map(|excused| &*excused.id).filter(|id| passed(id)).collect()
    }
}
