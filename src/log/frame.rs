//! Frames: a publication encoded once for each wire format, in bytes that every shard shares.

use std::ops::Range;

use bytes::{Bytes, BytesMut};

use super::position::{ChannelTag, CursorEntry, Position, write_entry};
use crate::wire::{centrifugo, sse, websocket};

/// Microseconds of the node's monotonic clock.
pub type Micros = u64;

/// What a frame announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// A publication that took the next offset of its epoch.
    Publication,
    /// A publication that took no offset (plain `PUBLISH`): it moves no position and cannot be resumed.
    Unpositioned,
    /// Publications are missing before this point and cannot be had; `position` is where the channel goes on.
    Gap,
}

impl FrameKind {
    /// The position before a frame of this kind whose own is `position`. A gap frame follows nothing, so nothing before it can
    /// be resumed.
    #[must_use]
    pub fn before(self, position: Position) -> Position {
        match self {
            Self::Publication => Position { offset: position.offset.saturating_sub(1), ..position },
            Self::Unpositioned | Self::Gap => position,
        }
    }
}

/// One publication, encoded for every wire format. Never changes, so it is shared without a lock.
#[derive(Debug)]
pub struct Frame {
    /// What it is.
    pub kind: FrameKind,
    /// The channel's position once this frame was seen.
    pub position: Position,
    /// When the node got it from the backbone.
    pub arrived: Micros,
    sse: Bytes,
    sse_body: u32,
    websocket: Bytes,
    publication: Range<u32>,
}

impl Frame {
    /// The whole server-sent event of a single-channel stream: data lines, `id:` line, blank line.
    #[must_use]
    pub fn sse(&self) -> &Bytes {
        &self.sse
    }

    /// The data lines alone, for streams of many channels: each connection adds its own `event:`, `id:` and blank line.
    #[must_use]
    pub fn sse_body(&self) -> &[u8] {
        &self.sse[..self.sse_body as usize]
    }

    /// The whole WebSocket text frame of a Centrifugo publication push.
    #[must_use]
    pub fn websocket(&self) -> &Bytes {
        &self.websocket
    }

    /// What another process makes the same frame of: see [`ChannelBlocks::restore`].
    #[must_use]
    pub fn parts(&self) -> FrameParts {
        FrameParts {
            kind: self.kind,
            position: self.position,
            arrived: self.arrived,
            sse: self.sse.clone(),
            sse_body: self.sse_body,
            websocket: self.websocket.clone(),
            publication: self.publication.clone(),
        }
    }

    /// The Centrifugo `Publication` object alone, for replies that list publications (recovery, history, poll).
    #[must_use]
    pub fn publication_json(&self) -> &[u8] {
        &self.websocket[self.publication.start as usize..self.publication.end as usize]
    }
}

/// A frame on its way to another process, in its encoded forms: connections may be in the middle of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameParts {
    /// See [`Frame::kind`].
    pub kind: FrameKind,
    /// See [`Frame::position`].
    pub position: Position,
    /// See [`Frame::arrived`]; the clock is the machine's, so it means the same in both processes.
    pub arrived: Micros,
    /// See [`Frame::sse`].
    pub sse: Bytes,
    /// Bytes of it that are data lines.
    pub sse_body: u32,
    /// See [`Frame::websocket`].
    pub websocket: Bytes,
    /// Where in it the `Publication` object lies.
    pub publication: Range<u32>,
}

/// The parts of a frame do not fit together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a frame's parts lie outside of it")]
pub struct FramePartsError;

/// Smallest block of frame bytes a channel allocates, once it has published twice.
const BLOCK_LEAST: usize = 1024;
/// Largest block: 320 frames of 200 B lie side by side, and one straggler pins no more than this.
const BLOCK_MOST: usize = 64 * 1024;

/// The block one wire format of one channel is being written into. Consecutive frames lie side by side in it, so that
/// what is due to a cursor is one run of memory. A channel that publishes rarely gets blocks of its frames' own size.
#[derive(Debug, Default)]
struct Block {
    open: BytesMut,
    next: usize,
}

impl Block {
    fn append(&mut self, bytes: &[u8]) -> Bytes {
        if self.open.capacity() - self.open.len() < bytes.len() {
            self.open = BytesMut::with_capacity(bytes.len().max(self.next));
            self.next = (self.next * 2).clamp(BLOCK_LEAST, BLOCK_MOST);
        }
        self.open.extend_from_slice(bytes);
        self.open.split().freeze()
    }
}

/// The open blocks of one channel.
#[derive(Debug, Default)]
pub struct ChannelBlocks {
    sse: Block,
    websocket: Block,
}

impl ChannelBlocks {
    /// Makes the frame that [`Frame::parts`] was taken from, in the channel's open blocks.
    ///
    /// # Errors
    /// When the ranges are not within the bytes.
    pub fn restore(&mut self, parts: &FrameParts) -> Result<Frame, FramePartsError> {
        let FrameParts { kind, position, arrived, ref sse, sse_body, ref websocket, ref publication } = *parts;
        let fits = |end: u32, bytes: &Bytes| usize::try_from(end).is_ok_and(|end| end <= bytes.len());
        if !fits(sse_body, sse) || !fits(publication.end, websocket) || publication.start > publication.end {
            return Err(FramePartsError);
        }
        let (sse, websocket) = (self.sse.append(sse), self.websocket.append(websocket));
        Ok(Frame { kind, position, arrived, sse, sse_body, websocket, publication: publication.clone() })
    }
}

/// Encodes publications. One for the node: it holds the scratch memory.
#[derive(Debug, Default)]
pub struct FrameEncoder {
    text: Vec<u8>,
    framed: Vec<u8>,
}

impl FrameEncoder {
    /// Encodes one publication of `channel` into its open blocks.
    pub fn encode(
        &mut self,
        blocks: &mut ChannelBlocks,
        channel: &str,
        kind: FrameKind,
        position: Position,
        data: &str,
        arrived: Micros,
    ) -> Frame {
        self.text.clear();
        if kind == FrameKind::Gap {
            sse::write_event_name(&mut self.text, "gap");
        }
        sse::write_data(&mut self.text, data);
        let sse_body = self.text.len() as u32;
        sse::write_id(&mut self.text, |out| {
            write_entry(out, CursorEntry { tag: ChannelTag::of(channel), position });
        });
        sse::end_event(&mut self.text);
        let sse = blocks.sse.append(&self.text);

        self.text.clear();
        let offset = (kind == FrameKind::Publication).then_some(position.offset);
        let object = centrifugo::write_publication_push(&mut self.text, channel, offset, data);
        self.framed.clear();
        websocket::write_header(&mut self.framed, websocket::Opcode::Text, self.text.len());
        let header = self.framed.len() as u32;
        self.framed.extend_from_slice(&self.text);
        let websocket = blocks.websocket.append(&self.framed);
        let publication = object.start as u32 + header..object.end as u32 + header;

        Frame { kind, position, arrived, sse, sse_body, websocket, publication }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::position::Epoch;

    #[test]
    fn a_frame_is_the_same_after_its_way_to_another_process() {
        let position = Position { epoch: Epoch(3), offset: 9 };
        let mut blocks = ChannelBlocks::default();
        let frame =
            FrameEncoder::default().encode(&mut blocks, "c", FrameKind::Publication, position, "{\"a\":1}\nb", 7);
        let restored = ChannelBlocks::default().restore(&frame.parts()).expect("its parts fit");
        assert_eq!(restored.parts(), frame.parts());
        assert_eq!((restored.sse_body(), restored.publication_json()), (frame.sse_body(), frame.publication_json()));
    }

    #[test]
    fn parts_that_lie_outside_are_refused() {
        let position = Position::default();
        let mut blocks = ChannelBlocks::default();
        let parts = FrameEncoder::default().encode(&mut blocks, "c", FrameKind::Publication, position, "x", 0).parts();
        let (past, end) = (u32::MAX, parts.publication.end);
        for broken in [
            FrameParts { sse_body: past, ..parts.clone() },
            FrameParts { publication: 0..past, ..parts.clone() },
            FrameParts { publication: end..end - 1, ..parts.clone() },
        ] {
            assert_eq!(blocks.restore(&broken).err(), Some(FramePartsError));
        }
    }
}

#[cfg(test)]
pub mod testing {
    //! Frames for tests of the log, without a codec.

    use std::sync::Arc;

    use super::{Bytes, Frame, FrameKind, Micros, Position};

    /// A frame whose bytes name its offset.
    pub fn frame(kind: FrameKind, position: Position, arrived: Micros) -> Arc<Frame> {
        let body = format!("data: {kind:?} {}\n", position.offset);
        let sse = Bytes::from(format!("{body}id: {}.{}\n\n", position.epoch, position.offset));
        let websocket = Bytes::from(format!("ws {}", position.offset));
        Arc::new(Frame {
            kind,
            position,
            arrived,
            sse_body: body.len() as u32,
            sse,
            publication: 3..websocket.len() as u32,
            websocket,
        })
    }
}
