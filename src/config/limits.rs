//! The section `[limits]`: how much callers may take of the HTTPS endpoint.
//!
//! May not live here: keeping to it (`health::limits`).

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// How much callers may take of the HTTPS endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitSettings {
    /// Connections at once: 8 to 10,000. A quarter of them is kept for callers with a certificate.
    pub connections: usize,
    /// Of these, without a certificate and from one source (an IPv4 address, an IPv6 /64): 1 to 10,000.
    pub connections_per_source: usize,
    /// Requests a second without a certificate, and new connections a second, from one source. 0: no limit.
    pub requests: u32,
    /// Requests a second with a certificate, from one source. 0: no limit.
    pub control_plane_requests: u32,
}

impl Default for LimitSettings {
    fn default() -> Self {
        Self {
            connections: 256,
            connections_per_source: 32,
            requests: 50,
            control_plane_requests: 500,
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawLimits {
    connections: Option<usize>,
    connections_per_source: Option<usize>,
    requests: Option<u32>,
    control_plane_requests: Option<u32>,
}

impl LimitSettings {
    /// Takes over what a file says.
    pub(super) fn apply(&mut self, raw: RawLimits) -> Result<(), String> {
        set(&mut self.connections, "connections", 8..=10_000, raw.connections)?;
        let each = raw.connections_per_source;
        set(
            &mut self.connections_per_source,
            "connections_per_source",
            1..=10_000,
            each,
        )?;
        set(&mut self.requests, "requests", 0..=1_000_000, raw.requests)?;
        let trusted = raw.control_plane_requests;
        set(
            &mut self.control_plane_requests,
            "control_plane_requests",
            0..=1_000_000,
            trusted,
        )
    }
}

fn set<T: PartialOrd + std::fmt::Display>(
    target: &mut T,
    name: &str,
    range: RangeInclusive<T>,
    value: Option<T>,
) -> Result<(), String> {
    let Some(value) = value else { return Ok(()) };
    if !range.contains(&value) {
        let (least, most) = (range.start(), range.end());
        return Err(format!("limits.{name}: {value} is not from {least} to {most}"));
    }
    *target = value;
    Ok(())
}
