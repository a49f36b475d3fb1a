//! The relay's bounds, as a value: tests take small ones, so that every bound is met within a few steps.

use crate::limits::{
    BACKBONE_PAYLOAD_BYTES, NODE_LOG_BYTES, OLDER_BYTES, OLDER_BYTES_MOST, OLDER_PAGE, PENDING_BYTES, PENDING_MESSAGES,
    RECOVERY_PAGE, RECOVERY_READS, RELAY_CHANNELS, RELAY_IN_FLIGHT, SUBSCRIBE_BATCH,
};

/// The relay's bounds. The default ones are those of [`crate::limits`], where each has its reason.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// See [`RELAY_CHANNELS`].
    pub channels: usize,
    /// See [`RELAY_IN_FLIGHT`].
    pub in_flight: usize,
    /// See [`SUBSCRIBE_BATCH`].
    pub subscribe_batch: usize,
    /// See [`RECOVERY_READS`]; as many again for clients.
    pub reads: usize,
    /// See [`RECOVERY_PAGE`]. At least 2: the first publication of a page is the one that is known.
    pub page: usize,
    /// See [`OLDER_PAGE`].
    pub older_page: usize,
    /// See [`OLDER_BYTES`].
    pub older_bytes: usize,
    /// See [`OLDER_BYTES_MOST`].
    pub older_bytes_most: usize,
    /// See [`PENDING_MESSAGES`].
    pub pending_messages: usize,
    /// See [`PENDING_BYTES`].
    pub pending_bytes: usize,
    /// See [`BACKBONE_PAYLOAD_BYTES`].
    pub payload_bytes: usize,
    /// See [`NODE_LOG_BYTES`].
    pub log_bytes: usize,
    /// Places in the order of all frames that may be stale before they are cleared away.
    pub stale_places: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            channels: RELAY_CHANNELS,
            in_flight: RELAY_IN_FLIGHT,
            subscribe_batch: SUBSCRIBE_BATCH,
            reads: RECOVERY_READS,
            page: RECOVERY_PAGE,
            older_page: OLDER_PAGE,
            older_bytes: OLDER_BYTES,
            older_bytes_most: OLDER_BYTES_MOST,
            pending_messages: PENDING_MESSAGES,
            pending_bytes: PENDING_BYTES,
            payload_bytes: BACKBONE_PAYLOAD_BYTES,
            log_bytes: NODE_LOG_BYTES,
            stale_places: 4_096,
        }
    }
}
