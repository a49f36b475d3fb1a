//! The node's threads: which code runs in them.

use std::sync::Arc;

use super::clock::monotonic_micros;
use super::node::{BackboneReport, BackboneStart, Parts};
use crate::backbone::relay;
use crate::backbone::status::BackboneStatus;
use crate::metrics::NodeSnapshot;
use crate::shard::start;

/// The bodies of a real node's threads, for so many shards.
#[must_use]
pub fn of(shards: usize) -> Parts {
    let status = Arc::new(BackboneStatus::new(shards, monotonic_micros));
    let report = Arc::clone(&status);
    Parts {
        backbone: Box::new(move |BackboneStart { settings, requests, shards, clock, succession }| {
            relay::run(settings, requests, shards, status, clock, succession).map_err(|error| error.to_string())
        }),
        shard: start::run,
        report,
    }
}

impl BackboneReport for BackboneStatus {
    fn ready(&self) -> Result<(), String> {
        BackboneStatus::ready(self)
    }

    fn turns(&self) -> u64 {
        self.turns.get()
    }

    fn measure(&self, snapshot: &mut NodeSnapshot) {
        snapshot.backbone_connected = self.connected();
        snapshot.backbone_connects = self.connects.get();
        snapshot.backbone_heartbeat_micros = self.heartbeat_age.get();
        snapshot.backbone_in_flight = self.in_flight.get();
        snapshot.backbone_publications = self.received.get();
        snapshot.backbone_duplicates = self.duplicates.get();
        snapshot.backbone_strays = self.strays.get();
        snapshot.backbone_invalid = self.invalid.get();
        snapshot.backbone_oversized = self.oversized.get();
        snapshot.backbone_overruns = self.overruns.get();
        snapshot.backbone_refused = self.refused.get();
        snapshot.backbone_repairs = self.repairs.get();
        snapshot.backbone_repaired = self.repaired.get();
        snapshot.backbone_fetches = self.fetches.get();
        snapshot.backbone_fetched = self.fetched.get();
        snapshot.backbone_failed_reads = self.failed_reads.get();
        snapshot.backbone_gaps = self.gaps.get();
        snapshot.backbone_channels = self.channels.get();
        snapshot.log_bytes = self.log_bytes.get();
        snapshot.mailbox_overflows = self.overflows.iter().map(|count| count.get()).collect();
    }
}
