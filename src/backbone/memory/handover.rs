//! The embedded backbone's part in a hand-over: all of it goes to the next process.

use std::sync::Arc;

use bytes::Bytes;

use super::{Channel, Kept, MemoryBackbone, STORED_OVERHEAD};
use crate::backbone::handover::{Piece, Place, StoredChannel, StoredKey};
use crate::backbone::interface::Stored;
use crate::log::frame::Micros;
use crate::log::position::Position;

/// How far an export has come.
#[derive(Debug, Default)]
pub(super) struct Export {
    round: u64,
    /// The channels of this pass. They are listed once, since the table moves while it grows.
    names: Vec<Arc<str>>,
    /// How many keys were ever given.
    keys: u64,
}

impl MemoryBackbone {
    /// Gives what changed since the last pass of a hand-over, from the channel with number `from` on, up to about `room`
    /// bytes.
    pub(in crate::backbone) fn export(&mut self, round: u64, from: usize, mut room: usize, piece: &mut Piece) {
        if self.export.round != round {
            self.export = Export { round, ..Export::default() };
        }
        if from == 0 {
            self.export.names = self.channels.keys().cloned().collect();
            self.export_keys(piece);
        }
        for (index, name) in self.export.names.iter().enumerate().skip(from) {
            if room == 0 {
                piece.next = Some(Place::Stored(index));
                return;
            }
            // It may have been forgotten meanwhile.
            let Some(channel) = self.channels.get_mut(name) else { continue };
            let (stored, more) = channel.export(round, name, &mut room);
            piece.stored.extend(stored);
            if more {
                piece.next = Some(Place::Stored(index));
                return;
            }
        }
        self.export.names = Vec::new();
    }

    fn export_keys(&mut self, piece: &mut Piece) {
        let once = &self.once;
        let fresh = (once.added - self.export.keys).min(once.order.len() as u64) as usize;
        for (until, channel, key) in once.order.range(once.order.len() - fresh..) {
            if let Some((position, _)) = once.positions.get(&(channel.clone(), key.clone())) {
                let (channel, key) = (channel.clone(), key.clone());
                piece.keys.push(StoredKey { channel, key, position: *position, until: *until });
            }
        }
        self.export.keys = once.added;
    }

    /// Takes over what another process had.
    pub(in crate::backbone) fn import(&mut self, stored: Vec<StoredChannel>, keys: Vec<StoredKey>, now: Micros) {
        for StoredChannel { name, head, kept } in stored {
            let channel = self.channel(&name, now);
            if channel.head.epoch != head.epoch {
                channel.kept.clear();
                channel.bytes = 0;
            }
            channel.head = head;
            for (stored, since) in kept {
                channel.bytes += stored.data.len() + STORED_OVERHEAD;
                // A copy: what arrived is part of the memory of a whole piece.
                let stored = Stored { data: Bytes::copy_from_slice(&stored.data), ..stored };
                channel.kept.push_back(Kept { stored, since });
            }
        }
        for StoredKey { channel, key, position, until } in keys {
            self.once.put_until(&channel, &key, position, until);
        }
    }
}

impl Channel {
    fn export(&mut self, round: u64, name: &Arc<str>, room: &mut usize) -> (Option<StoredChannel>, bool) {
        let (before, given) = self.exported;
        let fresh = before != round;
        let given = if fresh || given.epoch != self.head.epoch { Position { offset: 0, ..self.head } } else { given };
        let start = self.kept.partition_point(|kept| kept.stored.offset <= given.offset);
        let (mut last, mut more, mut kept) = (self.head.offset, false, Vec::new());
        for next in self.kept.range(start..) {
            if *room == 0 {
                more = true;
                last = next.stored.offset - 1;
                break;
            }
            *room = room.saturating_sub(next.stored.data.len() + STORED_OVERHEAD);
            kept.push((next.stored.clone(), next.since));
        }
        *room = room.saturating_sub(name.len());
        let head = Position { offset: last, ..self.head };
        let news = fresh || head != given;
        self.exported = (round, head);
        (news.then(|| StoredChannel { name: name.clone(), head, kept }), more)
    }
}
