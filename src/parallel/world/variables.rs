//! Environment variables, read as numbers or refused by name.

use std::time::Duration;

use crate::error::{Error, Result};

/// The environment, or what a test puts in its place. An empty variable is none.
pub(super) struct Variables<'a>(pub &'a dyn Fn(&str) -> Option<String>);

impl Variables<'_> {
    pub fn text(&self, name: &str) -> Option<String> {
        (self.0)(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    pub fn has(&self, name: &str) -> bool {
        self.text(name).is_some()
    }

    pub fn number(&self, name: &str) -> Result<Option<usize>> {
        // Ranks are sent as 32 bits.
        let parse = |value: String| match value.parse::<u32>() {
            Ok(number) => Ok(number as usize),
            Err(_) => Err(wrong(name, &format!("{value:?}"), "a whole number, 0 or more")),
        };
        self.text(name).map(parse).transpose()
    }

    pub fn port(&self, name: &str) -> Result<Option<u16>> {
        let parse = |value: String| match value.parse::<u16>() {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(wrong(name, &format!("{value:?}"), "a port from 1 to 65535")),
        };
        self.text(name).map(parse).transpose()
    }

    pub fn seconds(&self, name: &str) -> Result<Option<Duration>> {
        let parse = |value: String| match value.parse::<f64>() {
            Ok(seconds) if (0.1..=1e9).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
            _ => Err(wrong(name, &format!("{value:?}"), "seconds, 0.1 or more")),
        };
        self.text(name).map(parse).transpose()
    }
}

pub(super) fn wrong(name: &str, found: &str, expected: &str) -> Error {
    Error::config(format!("environment variable {name}"), format!("found {found}, expected {expected}"))
}

pub(super) fn missing(name: &str, beside: &str) -> Error {
    Error::config(
        format!("environment variable {name}"),
        format!("is not set, but {beside} is; expected both, as a launcher sets them, or neither"),
    )
}
