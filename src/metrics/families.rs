//! The table of everything that is exported: name, help, and where its samples come from.

use super::*;

/// One metric. Its type follows from its source and its name: `_total` is a counter.
pub(super) struct Family {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    pub(super) source: Source,
}

/// Where a metric's samples come from.
#[derive(Clone, Copy)]
pub(super) enum Source {
    /// One sample a shard.
    Shard(fn(&ShardMetrics) -> u64),
    /// One sample a shard and label value.
    ShardBy { label: &'static str, values: &'static [&'static str], read: fn(&ShardMetrics, usize) -> u64 },
    /// One sample.
    Node(fn(&NodeSnapshot) -> u64),
    /// One sample a label value.
    NodeBy { label: &'static str, values: &'static [&'static str], read: fn(&NodeSnapshot) -> &[u64] },
    /// One sample in seconds, of a value in microseconds.
    NodeSeconds(fn(&NodeSnapshot) -> u64),
    /// One sample a shard that another thread counts.
    NodeByShard(fn(&NodeSnapshot) -> &[u64]),
    /// The program's version as a label.
    Version,
    /// Buckets over all shards, in seconds.
    Histogram(fn(&Histograms) -> &Histogram<u64>),
}

pub(super) const fn family(name: &'static str, help: &'static str, source: Source) -> Family {
    Family { name, help, source }
}

/// Every metric of the node, in the order it is shown.
pub(super) const FAMILIES: &[Family] = &[
    family("weir_build_info", "Always 1; the label says which version runs.", Source::Version),
    family("weir_ready", "1 when the node takes traffic, else 0.", Source::Node(|n| u64::from(n.ready))),
    family(
        "weir_phase",
        "1 for where the node is in its life, else 0.",
        Source::NodeBy { label: "phase", values: &PHASES, read: |n| &n.phase },
    ),
    family(
        "weir_descriptor_limit",
        "File descriptors the process may open (RLIMIT_NOFILE, soft).",
        Source::Node(|n| n.descriptor_limit),
    ),
    family(
        "weir_handovers_total",
        "Hand-overs of all connections to a next process, by outcome; the count goes over with them.",
        Source::NodeBy { label: "outcome", values: &["moved", "failed"], read: |n| &n.handovers },
    ),
    family(
        "weir_handover_pause_seconds",
        "Time during which the last hand-over delivered nothing; 0 before the first.",
        Source::NodeSeconds(|n| n.handover_pause_micros),
    ),
    family(
        "weir_connections",
        "Open connections: established streams by protocol, polls that wait, and other HTTP connections.",
        Source::ShardBy {
            label: "protocol",
            values: &PROTOCOLS,
            read: |s, protocol| [&s.sse, &s.websocket, &s.poll, &s.http][protocol].get(),
        },
    ),
    family("weir_accepted_total", "Connections accepted.", Source::Shard(|s| s.accepted.get())),
    family(
        "weir_disconnects_total",
        "Established streams and waiting polls ended, by reason.",
        Source::ShardBy { label: "reason", values: &DISCONNECT_REASONS, read: |s, reason| s.disconnects[reason].get() },
    ),
    family(
        "weir_http_requests_total",
        "HTTP requests answered, by status class.",
        Source::ShardBy { label: "status", values: &STATUS_CLASSES, read: |s, class| s.http_requests[class].get() },
    ),
    family(
        "weir_publishes_total",
        "Publications that clients asked for, by result.",
        Source::ShardBy {
            label: "result",
            values: &PUBLISH_RESULTS,
            read: |s, result| [&s.publishes_ok, &s.publishes_refused][result].get(),
        },
    ),
    family("weir_channels", "Channels with a subscriber on the shard.", Source::Shard(|s| s.channels.get())),
    family(
        "weir_subscriptions",
        "Subscriptions: connections times channels.",
        Source::Shard(|s| s.subscriptions.get()),
    ),
    family(
        "weir_publications_total",
        "Publications the shard took from its mailbox.",
        Source::Shard(|s| s.publications.get()),
    ),
    family(
        "weir_deliveries_total",
        "Publications sent whole, counted once a connection, and those in answers to polls.",
        Source::Shard(|s| s.deliveries.get()),
    ),
    family(
        "weir_delivered_bytes_total",
        "Bytes given to the kernel on established streams.",
        Source::Shard(|s| s.delivered_bytes.get()),
    ),
    family("weir_sends_total", "Send operations on established streams.", Source::Shard(|s| s.sends.get())),
    family(
        "weir_sends_short_total",
        "Send operations that could not take the whole.",
        Source::Shard(|s| s.sends_short.get()),
    ),
    family(
        "weir_received_bytes_total",
        "Bytes received on established streams.",
        Source::Shard(|s| s.received_bytes.get()),
    ),
    family("weir_lagging_connections", "Connections behind the head of a channel.", Source::Shard(|s| s.lagging.get())),
    family("weir_turns_total", "Turns of the engine.", Source::Shard(|s| s.turns.get())),
    family(
        "weir_mailbox_depth",
        "Messages in the shard's mailbox at the start of its last turn.",
        Source::Shard(|s| s.mailbox_depth.get()),
    ),
    family(
        "weir_mailbox_overflows_total",
        "Publications that found the shard's mailbox full and were repaired later.",
        Source::NodeByShard(|n| &n.mailbox_overflows),
    ),
    family(
        "weir_delivery_latency_seconds",
        "Time from a publication's arrival at the node to its submitted send, one value a delivery to a stream or a \
         waiting poll.",
        Source::Histogram(|h| &h.latency),
    ),
    family("weir_turn_seconds", "Time of one turn of the engine.", Source::Histogram(|h| &h.turn)),
    family(
        "weir_backbone_connected",
        "1 while the backbone is connected, else 0.",
        Source::Node(|n| u64::from(n.backbone_connected)),
    ),
    family(
        "weir_backbone_connects_total",
        "Connections made to the backbone, the first included.",
        Source::Node(|n| n.backbone_connects),
    ),
    family(
        "weir_backbone_heartbeat_seconds",
        "Time the node's last message to itself took through the backbone.",
        Source::NodeSeconds(|n| n.backbone_heartbeat_micros),
    ),
    family(
        "weir_backbone_in_flight",
        "Requests to the backbone that are not answered yet.",
        Source::Node(|n| n.backbone_in_flight),
    ),
    family(
        "weir_backbone_publications_total",
        "Publications received from the backbone.",
        Source::Node(|n| n.backbone_publications),
    ),
    family(
        "weir_backbone_duplicates_total",
        "Publications dropped because the node had them.",
        Source::Node(|n| n.backbone_duplicates),
    ),
    family(
        "weir_backbone_strays_total",
        "Publications dropped because the channel's history does not know their position.",
        Source::Node(|n| n.backbone_strays),
    ),
    family(
        "weir_backbone_invalid_total",
        "Payloads that were not UTF-8, delivered with replacement characters.",
        Source::Node(|n| n.backbone_invalid),
    ),
    family(
        "weir_backbone_oversized_total",
        "Payloads too large to deliver, announced as gaps.",
        Source::Node(|n| n.backbone_oversized),
    ),
    family(
        "weir_backbone_overruns_total",
        "Times the node fell behind the backbone and read every channel anew.",
        Source::Node(|n| n.backbone_overruns),
    ),
    family(
        "weir_backbone_refused_total",
        "Channels not subscribed to because the node had too many.",
        Source::Node(|n| n.backbone_refused),
    ),
    family(
        "weir_backbone_repairs_total",
        "Times a missed range was read from a channel's history.",
        Source::Node(|n| n.backbone_repairs),
    ),
    family(
        "weir_backbone_repaired_publications_total",
        "Publications recovered by reading a missed range.",
        Source::Node(|n| n.backbone_repaired),
    ),
    family(
        "weir_backbone_fetches_total",
        "Reads of publications from before the node's logs, for clients that came back from there.",
        Source::Node(|n| n.backbone_fetches),
    ),
    family(
        "weir_backbone_fetched_publications_total",
        "Publications brought by those reads.",
        Source::Node(|n| n.backbone_fetched),
    ),
    family(
        "weir_backbone_failed_reads_total",
        "Reads of a channel's history that failed and are tried again.",
        Source::Node(|n| n.backbone_failed_reads),
    ),
    family("weir_backbone_gaps_total", "Gaps announced to subscribers.", Source::Node(|n| n.backbone_gaps)),
    family(
        "weir_backbone_channels",
        "Channels the node is subscribed to on the backbone.",
        Source::Node(|n| n.backbone_channels),
    ),
    family("weir_log_bytes", "Bytes of frames in the node's log.", Source::Node(|n| n.log_bytes)),
];
