//! Every bound of the node: a name with its unit, the reason, and relations asserted at compile time.
//!
//! What an operator may change is a key of the configuration with one of these as its default; the rest is fixed.

/// Bytes in a channel name. Long enough for every name in the field (Pusher: 164, Centrifugo: 255), short enough
/// that a name fits one cache line group and one metric label.
pub const CHANNEL_NAME_BYTES: usize = 255;

/// Channels one connection may subscribe to. Centrifugo's default is 128.
pub const CHANNELS_PER_CONNECTION: usize = 128;

/// Bytes in one publication's payload. Redis itself takes 512 MiB; a broadcast frame of more than this is a file.
pub const PUBLICATION_BYTES: usize = 64 * 1024;

/// Bytes in a request head (line and headers). nginx's and Node's ceilings are 8–32 KiB.
pub const REQUEST_HEAD_BYTES: usize = 16 * 1024;

/// Headers in a request head. Browsers send about 20.
pub const REQUEST_HEADERS: usize = 64;

/// Bytes in a request body: one batch of publications.
pub const REQUEST_BODY_BYTES: usize = 1024 * 1024;

/// Milliseconds a client may take to send a complete request head, then its body (slowloris).
pub const REQUEST_HEAD_MILLIS: u64 = 10_000;
/// See [`REQUEST_HEAD_MILLIS`].
pub const REQUEST_BODY_MILLIS: u64 = 30_000;

/// Milliseconds an idle kept-alive HTTP connection is held.
pub const KEEP_ALIVE_MILLIS: u64 = 75_000;

/// Bytes in one WebSocket message from a client, over all its fragments. Commands are small.
pub const CLIENT_MESSAGE_BYTES: usize = 64 * 1024;

/// Milliseconds an opening stream waits for its channels to go live on the backbone before it is answered 503.
pub const OPEN_MILLIS: u64 = 5_000;

/// Milliseconds a publish waits for the backbone's answer before it is answered 503.
pub const PUBLISH_MILLIS: u64 = 5_000;

/// Publications a channel's log holds. Equal to the default length of the stream in Redis.
pub const LOG_MESSAGES: usize = 1_024;
/// Payload bytes a channel's log holds, per wire format.
pub const LOG_BYTES: usize = 4 * 1024 * 1024;
/// Milliseconds a publication stays in the log.
pub const LOG_MILLIS: u64 = 300_000;

/// Publications a subscription may be behind the head before its connection is shed.
pub const LAG_MESSAGES: u64 = 512;
/// Bytes a subscription may be behind the head before its connection is shed.
pub const LAG_BYTES: u64 = 1024 * 1024;
/// Milliseconds the oldest unsent publication of a subscription may be old before its connection is shed.
pub const LAG_MILLIS: u64 = 10_000;

/// Messages in one shard's mailbox. At 100,000 publications a second this is 80 ms of a stalled shard.
pub const MAILBOX_MESSAGES: usize = 8_192;

/// Requests from all shards waiting for the backbone thread.
pub const RELAY_REQUESTS: usize = 16_384;

/// Milliseconds the backbone subscription of a channel outlives its last local subscriber.
pub const LINGER_MILLIS: u64 = 5_000;

const _: () = assert!(LAG_MESSAGES as usize <= LOG_MESSAGES, "whoever may lag must still be in the log");
const _: () = assert!(LAG_BYTES as usize <= LOG_BYTES, "whoever may lag must still be in the log");
const _: () = assert!(LAG_MILLIS <= LOG_MILLIS, "whoever may lag must still be in the log");
const _: () = assert!(PUBLICATION_BYTES * 2 <= LOG_BYTES, "the log must hold the largest publication");

/// Publications without an offset by which a place in a log is found again after a hand-over, 8 bytes each: more than reach
/// a client between two with an offset on all but the busiest channels.
pub const MARK_FRAMES: usize = 16;
/// Connections whose descriptors a shard that leaves makes at once; as many as one message of the process half carries
/// would be 253 (`SCM_MAX_FD`).
pub const HANDOVER_BATCH: usize = 64;
/// Milliseconds a shard that leaves waits for requests under way to be answered, or the hand-over fails: more than any of
/// them may wait for the backbone.
pub const HANDOVER_SETTLE_MILLIS: u64 = 8_000;
const _: () = assert!(HANDOVER_SETTLE_MILLIS > OPEN_MILLIS && HANDOVER_SETTLE_MILLIS > PUBLISH_MILLIS);

/// Pieces of memory in one send. The kernel's bound is 1,024 (`UIO_MAXIOV`).
pub const PIECES_PER_SEND: usize = 512;

/// Bytes in one send, unless a single frame is larger: what a default socket buffer can grow to on a fast path, so that
/// a healthy reader takes it whole.
pub const BYTES_PER_SEND: usize = 256 * 1024;

/// Sends one channel may have in a turn (budget): about 3 ms of the kernel's time at 6 µs a send, which is how long the
/// other channels of the shard wait for a channel with 50,000 subscribers.
pub const SENDS_PER_CHANNEL_TURN: usize = 512;

/// Connections served from their own cursors in a turn (budget), for the same reason.
pub const OWN_SENDS_PER_TURN: usize = 512;

/// Channels fanned out in a turn (budget): with one subscriber each, as long as one hot channel's share.
pub const CHANNELS_PER_TURN: usize = 512;

/// Messages taken from the mailbox in a turn (budget): a turn reads less than it can send.
pub const MESSAGES_PER_TURN: usize = 1_024;

/// Bytes of ids made for streams of many channels in one batch.
pub const TAIL_BYTES_PER_BATCH: usize = 1024 * 1024;

/// Bytes of replies that may wait for a WebSocket client that does not read them. Past it, commands whose reply may carry a
/// whole log are refused as too many for now; past [`CONTROL_BYTES`] the client is shed as slow.
pub const REPLY_BYTES: usize = 1024 * 1024;
/// See [`REPLY_BYTES`]: that, and one reply with a whole log of the default size, twice over.
pub const CONTROL_BYTES: usize = 2 * (REPLY_BYTES + LOG_BYTES);

/// Bytes of what is due to one connection that become its own bytes in a hand-over, because no log of the other process need
/// have them. What is past it is found there by its position; of what took no offset nothing would remain.
pub const HANDOVER_DUE_BYTES: usize = CONTROL_BYTES / 2;
const _: () = assert!(LAG_BYTES as usize <= HANDOVER_DUE_BYTES, "whoever may lag loses nothing in a hand-over");

/// Bytes of what a subscriber missed that one reply lists; the rest follows as publications. A whole log of the default size.
pub const RECOVERED_BYTES: usize = LOG_BYTES;

/// Publications in one reply to a `history` command. Centrifugo's cap.
pub const HISTORY_PUBLICATIONS: usize = 300;

/// Bytes of one channel's older frames, per wire format, that a shard holds for clients that come back from a position
/// before the log's: what a history of the default length takes when every publication is as large as the default allows.
/// What lies further back is announced as a gap.
pub const OLDER_BYTES: usize = LOG_MESSAGES * PUBLICATION_BYTES;
/// The same over all channels of a shard, and over what the relay keeps for the other shards. Past it such clients are sent
/// away to try again: those who are here read theirs first.
pub const OLDER_BYTES_MOST: usize = 4 * OLDER_BYTES;
/// Milliseconds older frames are held after a client has asked for them, or was last seen reading them: longer than a fetch may
/// take ([`OLDER_FETCH_MILLIS`]), and many times the second in which each connection is looked at.
pub const OLDER_MILLIS: u64 = 10_000;
/// Milliseconds a client waits for what lies before the node's log until it is sent away to try again.
pub const OLDER_FETCH_MILLIS: u64 = 5_000;
/// Publications in one read of what lies before a log: the default history in one read.
pub const OLDER_PAGE: usize = LOG_MESSAGES;
/// Milliseconds the relay keeps what it fetched for the shards that ask a little later.
pub const OLDER_KEPT_MILLIS: u64 = 2_000;
const _: () = assert!(OLDER_FETCH_MILLIS < OLDER_MILLIS, "what is waited for must still be held when it comes");

/// Milliseconds a disconnected client has to read its parting words, and then to close.
pub const FAREWELL_MILLIS: u64 = 5_000;

/// Milliseconds a WebSocket client has to send its `connect` command.
pub const CONNECT_MILLIS: u64 = 10_000;

const _: () = assert!(PIECES_PER_SEND <= 1024, "UIO_MAXIOV");

/// Bytes in the line that gives a chunk's size, extensions included. Real ones have a few digits.
pub const CHUNK_LINE_BYTES: usize = 256;

/// Bytes in the trailer section of a chunked body. It is read over and not used.
pub const TRAILER_BYTES: usize = 4 * 1024;

/// Bytes of encoded publications the node keeps over all channels, so that a shard's new subscribers need no read from
/// the backbone. The oldest go first.
pub const NODE_LOG_BYTES: usize = 256 * 1024 * 1024;

/// Channels this node subscribes to on the backbone. About 400 bytes each in the relay.
pub const RELAY_CHANNELS: usize = 1_000_000;
/// Publishes and reads under way towards the backbone. The relay takes no more requests from the shards meanwhile.
pub const RELAY_IN_FLIGHT: usize = 4_096;
/// Messages and requests the relay takes up before it wakes the shards it wrote to.
pub const RELAY_TURN: usize = 512;

/// Messages of one channel held while its history is being read. The oldest are dropped: the next read brings them.
pub const PENDING_MESSAGES: usize = 1_024;
/// Bytes of one channel's messages held while its history is being read.
pub const PENDING_BYTES: usize = 4 * 1024 * 1024;
/// Channels in one SUBSCRIBE or UNSUBSCRIBE command.
pub const SUBSCRIBE_BATCH: usize = 512;
/// Reads of channel histories under way at once when many channels have to be repaired.
pub const RECOVERY_READS: usize = 32;
/// Publications in one such read; a longer range takes several.
pub const RECOVERY_PAGE: usize = 512;
/// Milliseconds until a read that the backbone refused is tried again.
pub const RECOVERY_RETRY_MILLIS: u64 = 1_000;
/// Milliseconds until a full mailbox is tried again.
pub const MAILBOX_RETRY_MILLIS: u64 = 1;

/// Bytes of a payload that came over the backbone. A larger one is announced as a gap: [`PUBLICATION_BYTES`] binds who
/// publishes through a node, this binds who publishes to Redis.
pub const BACKBONE_PAYLOAD_BYTES: usize = 16 * 1024 * 1024;
/// Messages from the backbone that wait for the relay. When it is full messages are dropped and every channel is read anew.
pub const BACKBONE_QUEUE: usize = 65_536;
/// Bytes of messages from the backbone that wait for the relay.
pub const BACKBONE_QUEUE_BYTES: usize = 64 * 1024 * 1024;
/// Commands queued towards the backbone on one connection.
pub const BACKBONE_COMMANDS: usize = 1_024;
/// Milliseconds a connection to the backbone may take to be established.
pub const BACKBONE_CONNECT_MILLIS: u64 = 5_000;
/// Milliseconds: the first reconnect waits a random part of this, and each further one of twice as much.
pub const BACKOFF_LEAST_MILLIS: u64 = 100;
/// Milliseconds the random wait before a reconnect never exceeds.
pub const BACKOFF_MOST_MILLIS: u64 = 5_000;
/// Sentinels that one node asks, each over a connection of its own. Three or five are usual.
pub const SENTINELS_MOST: usize = 16;
/// Milliseconds between two questions to a sentinel. Its announcement of a fail-over comes sooner; this bounds what a lost
/// one costs.
pub const SENTINEL_ASK_MILLIS: u64 = 1_000;
/// Milliseconds a sentinel may take to be connected to, and to answer.
pub const SENTINEL_ANSWER_MILLIS: u64 = 1_000;
/// Milliseconds between the messages a node sends to itself through the backbone.
pub const HEARTBEAT_MILLIS: u64 = 1_000;
/// Milliseconds without such a message after which the node is not ready and connects anew.
pub const HEARTBEAT_STALE_MILLIS: u64 = 5_000;

/// Seconds a channel's epoch and offset are kept while nobody publishes. Much longer than its history, so that a client that
/// comes back late learns exactly what it missed. `publish.lua` has the same number.
pub const META_SECONDS: u64 = 30 * 24 * 3_600;
/// Publications a channel's history in Redis may be configured to keep. `publish.lua` has the same number.
pub const HISTORY_MESSAGES_MOST: usize = 1_000_000;
/// Seconds a repeated idempotency key is recognised.
pub const IDEMPOTENCY_SECONDS: u64 = 300;

/// Channels of the embedded backbone, with subscribers or without.
pub const MEMORY_CHANNELS: usize = 1_000_000;
/// Milliseconds the embedded backbone keeps the epoch and offset of a channel that is neither published to nor subscribed to.
pub const MEMORY_IDLE_MILLIS: u64 = 3_600_000;
/// Milliseconds between two passes over all channels of the embedded backbone; what is asked for is checked at once.
pub const MEMORY_SWEEP_MILLIS: u64 = 60_000;
/// Idempotency keys the embedded backbone remembers; the oldest are forgotten first.
pub const MEMORY_IDEMPOTENCY_KEYS: usize = 100_000;

const _: () = assert!(PAYLOAD_BYTES_MOST <= BACKBONE_PAYLOAD_BYTES, "what a node publishes it must also take");
const _: () = assert!(BACKBONE_PAYLOAD_BYTES <= BACKBONE_QUEUE_BYTES, "the queue must hold the largest payload");
const _: () = assert!(HEARTBEAT_MILLIS * 2 < HEARTBEAT_STALE_MILLIS, "one lost heartbeat is no outage");

/// Bytes in the payload of a WebSocket control frame (RFC 6455, section 5.5). A close frame's code takes two of them.
pub const CONTROL_FRAME_BYTES: usize = 125;

/// Microseconds above which a histogram stops telling values apart: six times [`LAG_MILLIS`].
pub const HISTOGRAM_MICROS: u64 = 60_000_000;
/// Decimal digits a histogram keeps. Two are 1% and 20 KB each; three would be 140 KB copied a second and shard.
pub const HISTOGRAM_DIGITS: u8 = 2;
const _: () = assert!(HISTOGRAM_MICROS >= LAG_MILLIS * 1_000, "a subscription about to be shed must still be measured");

/// Receive buffers a ring provides: at most this many connections' bytes wait for one turn. A power of two.
pub const RECEIVE_BUFFERS: u16 = 256;
/// Bytes in one: a WebSocket command or a ping fits many times over.
pub const RECEIVE_BUFFER_BYTES: usize = 4096;

/// Entries of a ring's submission queue: a turn's sends for one channel and its connections' own, in one system call.
pub const RING_SUBMISSIONS: u32 = 2048;
/// Entries of a ring's completion queue: a whole submission of refused sends, and as many receives beside it.
pub const RING_COMPLETIONS: u32 = 8192;

/// Pieces and messages of connections' own sends in one batch of a ring.
pub const BATCH_PIECES: usize = 16 * 1024;
/// See [`BATCH_PIECES`].
pub const BATCH_MESSAGES: usize = 1024;

/// Events taken from epoll in one turn.
pub const EPOLL_EVENTS: usize = 256;
/// Bytes read from one socket at a time under epoll; one buffer a shard.
pub const EPOLL_READ_BYTES: usize = 16 * 1024;

const _: () = assert!(RECEIVE_BUFFERS.is_power_of_two(), "the kernel's ring wants it");
const _: () = assert!(BATCH_PIECES >= PIECES_PER_SEND, "an empty batch takes any send");
/// Most shards that may be configured: more cores than one broadcast node is built for.
pub const SHARDS_MOST: usize = 512;
/// Most connections that may be configured for a node. At 4 KB of kernel memory each this is 40 GB.
pub const CONNECTIONS_MOST: usize = 10_000_000;
/// Most publications a channel's history may be configured to hold.
pub const LOG_MESSAGES_MOST: usize = 1_000_000;
const _: () =
    assert!(LOG_MESSAGES_MOST <= HISTORY_MESSAGES_MOST, "a history that Redis would refuse is not configured");
/// Most bytes a channel's history may be configured to hold. Frames count their bytes in 32 bits.
pub const LOG_BYTES_MOST: usize = 1024 * 1024 * 1024;
/// Most milliseconds a history may be configured to reach back: a week. Longer is a database's work.
pub const LOG_MILLIS_MOST: u64 = 7 * 86_400_000;
const _: () = assert!(LOG_MILLIS_MOST / 1_000 < META_SECONDS, "positions outlive any history");
/// Most bytes a publication, a client's message or a request body may be configured to have.
pub const PAYLOAD_BYTES_MOST: usize = 16 * 1024 * 1024;
/// Most channels one connection may be configured to subscribe to: a stream's id has 38 bytes for each.
pub const CHANNELS_PER_CONNECTION_MOST: usize = 1_024;
/// Most milliseconds any other interval or timeout may be configured to: an hour.
pub const INTERVAL_MILLIS_MOST: u64 = 3_600_000;

/// Connections that may wait to be accepted, a shard; the kernel cuts it to `net.core.somaxconn` (4,096 by default).
pub const ACCEPT_BACKLOG: i32 = 4_096;

/// Milliseconds over which a drain spreads the parting words: at 50,000 connections some 800 a second come to the other
/// nodes, a small part of what one of them takes in.
pub const DRAIN_WINDOW_MILLIS: u64 = 60_000;
/// Milliseconds a node is not ready before a drain begins: longer than the interval of a balancer's checks, 5 s as a rule.
pub const DRAIN_UNREADY_MILLIS: u64 = 10_000;
/// The window of a drain that was hastened: somebody waits for its end.
pub const DRAIN_HASTENED_MILLIS: u64 = 2_000;
/// Milliseconds until a command is answered: the longest is an upgrade, whose steps have bounds of their own below it.
pub const ADMIN_ANSWER_MILLIS: u64 = 120_000;
/// Milliseconds in which the last answers to the operator have to be written: they are small, and go no further than this machine.
pub const ADMIN_FAREWELL_MILLIS: u64 = 1_000;
/// Milliseconds that somebody who is to be parted from waits for what is due to others, when a turn cannot do it all.
pub const DISMISSAL_PATIENCE_MILLIS: u64 = 1_000;

/// Milliseconds from the last parting words until the process ends in any case: longer than a client has to read its parting
/// words, shorter than what service managers wait before they kill (systemd 90 s, Kubernetes 30 s).
pub const STOP_MILLIS: u64 = 10_000;

/// Descriptors in one message between two processes: the kernel's bound (`SCM_MAX_FD`, unix(7)).
pub const HANDOVER_DESCRIPTORS: usize = 253;
/// Bytes of publications in one piece of what the relay hands over: what it gathers in well below a millisecond, since
/// nothing is delivered meanwhile.
pub const HANDOVER_PIECE_BYTES: usize = 1024 * 1024;
/// Bytes of one message between two processes: a piece with the largest publication in it, in all its forms.
pub const HANDOVER_MESSAGE_BYTES: usize = 256 * 1024 * 1024;
/// Messages on their way that were not acknowledged.
pub const HANDOVER_WINDOW: usize = 4;
/// Questions of a hand-over that wait for the backbone thread. They are asked one after the other.
pub const HANDOVER_ORDERS: usize = 4;
/// Milliseconds from the start of the next process to its first word: it reads its configuration before.
pub const HANDOVER_START_MILLIS: u64 = 20_000;
/// Milliseconds it has to take in the channels and to subscribe to all of them. Nothing stands still meanwhile.
pub const HANDOVER_PREPARE_MILLIS: u64 = 60_000;
/// Milliseconds the shards have to stand still: longer than each of them gives what it is answering.
pub const HANDOVER_FREEZE_MILLIS: u64 = 10_000;
/// Milliseconds a step may take while nothing is delivered. On an idle machine all of them together take tens.
pub const HANDOVER_STEP_MILLIS: u64 = 5_000;

/// Descriptors kept for listeners, handshakes, requests, the backbone and files when established sockets use the rest.
pub const RESERVED_DESCRIPTORS: u64 = 2_048;

/// Locked memory to provide for a shard, in bytes. Measured with 20,000 sockets on Linux 6.18: the two rings of a shard (the
/// front's and the engine's) start with 390 KiB and not with 370; the rest is for other kernels' sizes.
pub const SHARD_LOCKED_BYTES: u64 = 512 << 10;

/// Established sockets a shard takes at most, whatever the limits: the kernel's bound on a ring's file table
/// (`IORING_MAX_FIXED_FILES`).
pub const MOST_SLOTS: u32 = 1 << 20;
/// Connections of one shard that are not established streams: handshakes, requests, idle kept-alive ones. At about 6 KiB
/// each they hold 50 MiB. Further ones are closed at once.
/// Connections of one shard that are not established streams: handshakes, requests, idle kept-alive ones. At 7 KiB
/// each (measured, 4,000 idle ones) they hold 57 MiB. Further ones are closed at once.
pub const FRONT_CONNECTIONS: u64 = 8_192;

/// Bytes of one of them: see above.
pub const FRONT_CONNECTION_BYTES: u64 = 7 * 1024;

/// Bytes of the process that an established, idle connection is counted with: 173 (SSE) and 236 (WebSocket) were measured with
/// one subscription (`cargo bench --bench idle`), and each further one takes about 100.
pub const CONNECTION_USER_BYTES: u64 = 256;
/// Bytes of kernel slab that a socket is counted with: 4.0 to 4.8 KB were measured by the same bench.
pub const CONNECTION_KERNEL_BYTES: u64 = 4_800;
/// Bytes of TCP memory that a frame waiting in a socket is counted with: the kernel accounts a page to it at least.
pub const CONNECTION_SEND_BYTES: u64 = 4_096;
/// Percent of the available memory that a configuration may need before `weir doctor` warns: the rest is for the buffers of
/// connections that have fallen behind, which come when a node is least at ease.
pub const MEMORY_COMFORT_PERCENT: u64 = 75;

/// Pings of Redis that `weir doctor` takes the median of.
pub const EXAMINE_PINGS: usize = 20;
/// Publications to Redis that `weir doctor` takes the median of.
pub const EXAMINE_PUBLISHES: usize = 10;
/// Microseconds of such a median above which it warns: a hop within one site is a tenth of it.
pub const ROUND_TRIP_MICROS: u64 = 5_000;
/// Bytes below which it finds the output buffer of a node's subscription small: two of the largest payloads, or a second of
/// 80,000 small publications. Redis's own soft limit is 8 MiB.
pub const PUBSUB_BUFFER_LEAST_BYTES: u64 = 32 * 1024 * 1024;
const _: () = assert!(PUBSUB_BUFFER_LEAST_BYTES as usize >= 2 * BACKBONE_PAYLOAD_BYTES);
/// Bytes and seconds that it lets a replica be behind: a healthy one acknowledges once a second.
pub const REPLICA_LAG_BYTES: u64 = 1024 * 1024;
/// See [`REPLICA_LAG_BYTES`].
pub const REPLICA_LAG_SECONDS: u64 = 2;

/// Bytes a request's read buffer starts with and grows by: a browser's head in one read.
pub const FRONT_READ_BYTES: usize = 4 * 1024;

/// Milliseconds the accept loop rests after an error: the process is out of descriptors, and until one is given back
/// every further attempt fails as well.
pub const ACCEPT_PAUSE_MILLIS: u64 = 100;
/// Milliseconds between two log lines about it.
pub const ACCEPT_WARNING_MILLIS: u64 = 1_000;

/// Milliseconds a client that is sent away has to read the answer before its connection is closed under it
/// (RFC 9112, section 9.6).
pub const LINGER_CLOSE_MILLIS: u64 = 2_000;
/// Bytes that are read over meanwhile.
pub const LINGER_CLOSE_BYTES: usize = REQUEST_BODY_BYTES;

/// Publications in one batch, counted once a channel. All of them wait for the backbone at the same time.
pub const PUBLICATIONS_PER_REQUEST: usize = 1_000;
const _: () = assert!(PUBLICATIONS_PER_REQUEST < RELAY_REQUESTS, "one batch may not fill the queue to the backbone");

/// Bytes in an idempotency key. A UUID has 36.
pub const IDEMPOTENCY_KEY_BYTES: usize = 255;

/// Seconds of the longest `Retry-After` given out; each is drawn from 1 up to it, so that clients do not return as one.
pub const RETRY_AFTER_SECONDS: u32 = 5;

/// Milliseconds a command-line client waits for a TCP connection.
pub const CLIENT_CONNECT_MILLIS: u64 = 5_000;
/// Milliseconds `weir publish` waits for the server's answer: more than the server's own [`PUBLISH_MILLIS`].
pub const CLIENT_ANSWER_MILLIS: u64 = 15_000;
/// Milliseconds of silence after which `weir subscribe` takes a stream for dead: several heartbeats or pings.
pub const CLIENT_SILENCE_MILLIS: u64 = 90_000;
/// Bytes of a response body a command-line client reads. Answers about one publication have about 200.
pub const CLIENT_RESPONSE_BODY_BYTES: usize = 1024 * 1024;
/// Bytes of one event or message a command-line client reads: the largest publication in JSON, every byte escaped.
pub const CLIENT_EVENT_BYTES: usize = 8 * PUBLICATION_BYTES;
/// First and longest milliseconds `weir subscribe` waits before it connects again, when the server advises nothing.
pub const CLIENT_RECONNECT_MILLIS: (u64, u64) = (500, 20_000);

/// Connections of one load-generator run: the source addresses 127.0.0.1 to .3 of loopback have ports for these.
pub const BENCH_CONNECTIONS: usize = 60_000;
/// Connections of one load-generator process: below the common hard limit of 20,000 descriptors.
pub const BENCH_WORKER_CONNECTIONS: usize = 15_000;
/// Connections from one source address: Linux gives about 28,000 ports to one, and earlier runs leave some in TIME_WAIT.
pub const BENCH_SOURCE_CONNECTIONS: usize = 20_000;
/// Connections a worker is establishing at once: a small part of a listen backlog of 4,096.
pub const BENCH_OPENING: usize = 512;
/// Milliseconds a worker waits, after it opened its last connection, for the rest to be established.
pub const BENCH_SETTLE_MILLIS: u64 = 15_000;
/// Bytes a worker reads at once, into one buffer for all its connections.
pub const BENCH_READ_BYTES: usize = 256 * 1024;
/// Bytes of receive buffer of a connection that never reads, so that a short run shows what a long stall does.
pub const BENCH_STALLED_RECEIVE_BYTES: usize = 4 * 1024;
/// Gaps a worker remembers by their sequence numbers, to tell late publications from duplicates: below 100 MB.
pub const BENCH_MISSING_RANGES: usize = 1_000_000;
/// Distinct reasons a report lists; further ones are counted together.
pub const BENCH_REASONS: usize = 16;
/// Publications that wait for an answer on one publishing connection.
pub const BENCH_PIPELINE: usize = 256;
/// Publishing connections of a run.
pub const BENCH_PUBLISHERS: u16 = 64;
/// Channels of a run: one a connection at the most.
pub const BENCH_CHANNELS: u32 = BENCH_CONNECTIONS as u32;

/// Clients of a simulated fleet: about 12 bytes each.
pub const SIMULATE_CLIENTS: u32 = 100_000_000;
/// Nodes of a simulated fleet.
pub const SIMULATE_NODES: u32 = 10_000;
/// Seconds of each of its windows and waits.
pub const SIMULATE_SECONDS: u32 = 3_600;
/// Steps of a tenth of a second after which a simulation gives up: five days, a rolling deploy of 10,000 nodes in 40 s each.
pub const SIMULATE_STEPS: u64 = 5 * 86_400 * 10;

const _: () = assert!(CLIENT_ANSWER_MILLIS > PUBLISH_MILLIS, "the server's own timeout must be heard");

/// Milliseconds a peer may leave what it was sent unacknowledged before the kernel breaks the connection
/// (`TCP_USER_TIMEOUT`): a vanished client is noticed at the second heartbeat instead of after a quarter of an hour.
pub const PEER_SILENCE_MILLIS: u64 = 30_000;

/// Publications in one answer to a poll. The rest is asked for at once, so this bounds only how long a shard works on one
/// answer: 20 microseconds at 200 bytes each (measured).
pub const POLL_PUBLICATIONS: usize = 256;
/// Bytes of publications in one answer to a poll, unless a single one is larger: what one send takes.
pub const POLL_BYTES: usize = BYTES_PER_SEND;
/// Milliseconds a poll may wait when nothing is new. Proxies commonly give up on a silent request after 30 to 60 seconds.
pub const POLL_WAIT_MILLIS: u64 = 25_000;
/// Milliseconds a cache may give one answer to all who ask the same: how much later a reader behind it learns of something.
pub const POLL_MAX_AGE_MILLIS: u64 = 1_000;

const _: () = assert!(POLL_WAIT_MILLIS <= INTERVAL_MILLIS_MOST, "the default is allowed");

/// Listening sockets a service manager may pass in: several addresses, or one a shard ([`SHARDS_MOST`]).
pub const ACTIVATION_LISTENERS: usize = 1_024;
const _: () = assert!(ACTIVATION_LISTENERS >= SHARDS_MOST, "one a shard is allowed");

/// Milliseconds a starting node tries an address that is in use: many times what the kernel takes to free the listeners of a
/// node that was killed, which is some tens of milliseconds, and on a loaded machine a few hundred.
pub const LISTEN_RETRY_MILLIS: u64 = 2_000;
/// Milliseconds between two such tries.
pub const LISTEN_PAUSE_MILLIS: u64 = 20;

/// Epochs of a channel that the relay remembers to have left, 4 bytes each: a backbone that fails over again and again may
/// come back to one of them, and its offsets must not be taken for new ones.
pub const PAST_EPOCHS: usize = 8;
