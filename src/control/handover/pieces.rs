//! Pieces of what a relay holds as they go between processes: a head of numbers and one block of bytes that they count off.

use std::sync::Arc;

use bytes::{Buf, Bytes};
use serde::{Deserialize, Serialize};

use crate::backbone::handover::{Piece, SeedChannel, StoredChannel, StoredKey};
use crate::backbone::interface::{Stored, Tag};
use crate::log::frame::{FrameKind, FrameParts, Micros};
use crate::log::position::{Epoch, Position};
use crate::wire::channel_name;

/// Epoch and offset.
type Place = (u32, u64);

/// The numbers of a piece; its bytes follow in the same order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PieceHead {
    channels: Vec<ChannelHead>,
    stored: Vec<StoredHead>,
    keys: Vec<KeyHead>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct ChannelHead {
    name: String,
    tip: Place,
    tag: Option<u64>,
    ancestors: Vec<u32>,
    past: Vec<u32>,
    shards: Vec<usize>,
    restart: bool,
    more: bool,
    after_beat: u32,
    frames: Vec<FrameHead>,
}

/// Kind (0 publication, 1 without a position, 2 gap), tag, place, arrival, bytes of the event, of its data lines and of the WebSocket
/// frame, and where in that the publication lies.
type FrameHead = (u8, Option<u64>, Place, Micros, u32, u32, u32, (u32, u32));

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct StoredHead {
    name: String,
    head: Place,
    /// Offset, time and bytes of each publication.
    kept: Vec<(u64, Micros, u32)>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct KeyHead {
    channel: String,
    key: String,
    position: Place,
    until: Micros,
}

/// Takes a piece apart.
pub fn split(piece: &Piece) -> (PieceHead, Vec<u8>) {
    let mut body = Vec::new();
    let channels = piece.channels.iter().map(|channel| ChannelHead {
        name: channel.name.as_ref().to_owned(),
        tip: place(channel.tip),
        tag: channel.tag.map(|tag| tag.0),
        ancestors: channel.ancestors.iter().map(|epoch| epoch.0).collect(),
        past: channel.past.iter().map(|epoch| epoch.0).collect(),
        shards: channel.shards.clone(),
        restart: channel.restart,
        more: channel.more,
        after_beat: channel.after_beat,
        frames: channel.frames.iter().map(|(frame, tag)| split_frame(frame, *tag, &mut body)).collect(),
    });
    let channels = channels.collect();
    let stored = piece.stored.iter().map(|stored| StoredHead {
        name: stored.name.as_ref().to_owned(),
        head: place(stored.head),
        kept: stored
            .kept
            .iter()
            .map(|(kept, since)| {
                body.extend_from_slice(&kept.data);
                (kept.offset, *since, kept.data.len() as u32)
            })
            .collect(),
    });
    let stored = stored.collect();
    let keys = piece.keys.iter().map(|key| KeyHead {
        channel: key.channel.as_ref().to_owned(),
        key: key.key.as_ref().to_owned(),
        position: place(key.position),
        until: key.until,
    });
    (PieceHead { channels, stored, keys: keys.collect() }, body)
}

fn split_frame(frame: &FrameParts, tag: Option<Tag>, body: &mut Vec<u8>) -> FrameHead {
    body.extend_from_slice(&frame.sse);
    body.extend_from_slice(&frame.websocket);
    let kind = match frame.kind {
        FrameKind::Publication => 0,
        FrameKind::Unpositioned => 1,
        FrameKind::Gap => 2,
    };
    let (sse, websocket) = (frame.sse.len() as u32, frame.websocket.len() as u32);
    let publication = (frame.publication.start, frame.publication.end);
    (kind, tag.map(|tag| tag.0), place(frame.position), frame.arrived, sse, frame.sse_body, websocket, publication)
}

/// Puts a piece together.
///
/// # Errors
/// When a name is none or the bytes are fewer than counted.
pub fn join(head: PieceHead, mut body: Bytes) -> Result<Piece, String> {
    let mut piece = Piece::default();
    for channel in head.channels {
        let frames = channel.frames.into_iter().map(|frame| join_frame(frame, &mut body));
        piece.channels.push(SeedChannel {
            frames: frames.collect::<Result<_, _>>()?,
            name: name(channel.name)?,
            tip: position(channel.tip),
            tag: channel.tag.map(Tag),
            ancestors: channel.ancestors.into_iter().map(Epoch).collect(),
            past: channel.past.into_iter().map(Epoch).collect(),
            shards: channel.shards,
            restart: channel.restart,
            more: channel.more,
            after_beat: channel.after_beat,
        });
    }
    for stored in head.stored {
        let kept = stored.kept.into_iter().map(|(offset, since, length)| {
            // The embedded backbone loses no writes: nothing is tagged.
            let data = take(&mut body, length)?;
            Ok::<_, String>((Stored { offset, tag: None, previous: None, data }, since))
        });
        let kept = kept.collect::<Result<_, _>>()?;
        piece.stored.push(StoredChannel { name: name(stored.name)?, head: position(stored.head), kept });
    }
    for KeyHead { channel, key, position: at, until } in head.keys {
        piece.keys.push(StoredKey { channel: name(channel)?, key: key.into(), position: position(at), until });
    }
    if body.is_empty() { Ok(piece) } else { Err(format!("{} bytes more than its head counts", body.len())) }
}

fn join_frame(head: FrameHead, body: &mut Bytes) -> Result<(FrameParts, Option<Tag>), String> {
    let (kind, tag, at, arrived, sse, sse_body, websocket, (start, end)) = head;
    let kind = match kind {
        0 => FrameKind::Publication,
        1 => FrameKind::Unpositioned,
        2 => FrameKind::Gap,
        other => return Err(format!("a frame of kind {other}; allowed: 0 to 2")),
    };
    let (sse, websocket) = (take(body, sse)?, take(body, websocket)?);
    let parts = FrameParts { kind, position: position(at), arrived, sse, sse_body, websocket, publication: start..end };
    Ok((parts, tag.map(Tag)))
}

fn take(body: &mut Bytes, length: u32) -> Result<Bytes, String> {
    let length = length as usize;
    if length > body.remaining() {
        return Err(format!("{} bytes where its head counts {length}", body.remaining()));
    }
    Ok(body.split_to(length))
}

fn name(text: String) -> Result<Arc<str>, String> {
    channel_name::check(&text).map_err(|error| format!("{text:?} is no channel name: {error}"))?;
    Ok(text.into())
}

const fn place(position: Position) -> Place {
    (position.epoch.0, position.offset)
}

const fn position((epoch, offset): Place) -> Position {
    Position { epoch: Epoch(epoch), offset }
}
