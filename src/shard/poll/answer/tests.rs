use super::*;
use crate::log::channel_log::Bounds;
use crate::log::channel_table::State;
use crate::log::frame::testing::frame;
use crate::log::frame::{ChannelBlocks, FrameEncoder};
use crate::log::position::{ChannelTag, Epoch, parse_cursor};

const WIDE: Bounds = Bounds { messages: 10_000, bytes: 1 << 30, age: 1 << 40, older_bytes: 0 };

fn at(epoch: u32, offset: u64) -> Position {
    Position { epoch: Epoch(epoch), offset }
}

fn entry(name: &str, position: Position) -> CursorEntry {
    CursorEntry { tag: ChannelTag::of(name), position }
}

/// Live channels with empty logs that stand at (1, 0).
fn table(names: &[&str]) -> ChannelTable {
    let mut table = ChannelTable::new(WIDE);
    for name in names {
        let (id, _) = table.hold(&Arc::from(*name));
        table.open(id, at(1, 0), Vec::new(), 0);
    }
    table
}

fn publish(table: &mut ChannelTable, id: ChannelId, position: Position, arrived: Micros) {
    table.append(id, frame(FrameKind::Publication, position, arrived), arrived);
}

/// One channel's answer as a reader sees it.
fn read(table: &ChannelTable, asked: Option<Position>) -> (Option<(Position, Position)>, Vec<u64>, Position, bool) {
    let cursor: Vec<CursorEntry> = asked.map(|position| entry("a", position)).into_iter().collect();
    let reading = Reading::of(table, &[0], &cursor);
    let channel = &reading.channels[0];
    let offsets = channel.publications.iter().map(|frame| frame.position.offset).collect();
    (channel.gap, offsets, channel.reached, reading.more)
}

#[test]
fn without_a_cursor_the_answer_is_a_position_to_start_from() {
    let mut table = table(&["a", "b"]);
    publish(&mut table, 0, at(1, 1), 1);
    let answer = Reading::of(&table, &[0, 1], &[]).answer();
    assert!(answer.news && answer.publications == 0);
    let value: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    let cursor = parse_cursor(value["cursor"].as_str().unwrap(), 2).unwrap();
    assert_eq!(cursor, [entry("a", at(1, 1)), entry("b", at(1, 0))]);
    assert_eq!(value["channels"]["a"], serde_json::json!({"epoch": "00000001", "offset": 1, "publications": []}));
    let next = Reading::of(&table, &[0, 1], &cursor).answer();
    assert!(!next.news);
    assert!(Reading::of(&table, &[0, 1], &cursor[..1]).answer().news, "where b is was not known");
}

#[test]
fn what_came_after_the_cursor_is_given_in_order() {
    let mut table = table(&["a"]);
    for offset in 1..=5 {
        publish(&mut table, 0, at(1, offset), offset);
    }
    assert_eq!(read(&table, Some(at(1, 2))), (None, vec![3, 4, 5], at(1, 5), false));
    assert_eq!(read(&table, Some(at(1, 5))), (None, vec![], at(1, 5), false));
    assert_eq!(read(&table, None), (None, vec![], at(1, 5), false));
}

#[test]
fn equal_answers_have_equal_tags_and_others_do_not() {
    let mut table = table(&["a", "b"]);
    let tag = |table: &ChannelTable, cursor: &[CursorEntry]| Reading::of(table, &[0, 1], cursor).answer().tag;
    let cursor = [entry("a", at(1, 0)), entry("b", at(1, 0))];
    let mut tags = vec![tag(&table, &cursor), tag(&table, &cursor[..1]), tag(&table, &[])];
    assert_eq!(tag(&table, &cursor), tags[0]);
    publish(&mut table, 0, at(1, 1), 1);
    tags.push(tag(&table, &cursor));
    tags.push(tag(&table, &[entry("a", at(1, 1)), cursor[1]]));
    publish(&mut table, 1, at(1, 1), 1);
    tags.push(tag(&table, &cursor));
    tags.push(tag(&table, &[entry("a", at(2, 1)), cursor[1]]));
    for (index, tag) in tags.iter().enumerate() {
        assert!(tag.len() == 42 && tag.starts_with('"') && tag.ends_with('"'), "{tag}");
        assert!(!tags[..index].contains(tag), "{index}");
    }
}

#[test]
fn a_position_that_cannot_be_resumed_is_answered_with_the_gap_and_what_is_left() {
    let mut table = table(&["a"]);
    for offset in 1..=5 {
        publish(&mut table, 0, at(1, offset), offset);
    }
    let Some(State::Live(log)) = table.get_mut(0).map(|channel| &mut channel.state) else { panic!("live") };
    log.trim(5, Bounds { messages: 2, ..WIDE });
    let left = |asked| (Some((asked, at(1, 3))), vec![4, 5], at(1, 5), false);
    assert_eq!(read(&table, Some(at(1, 1))), left(at(1, 1)), "too old");
    assert_eq!(read(&table, Some(at(9, 4))), left(at(9, 4)), "of another epoch");
    assert_eq!(read(&table, Some(at(1, 3))), (None, vec![4, 5], at(1, 5), false));
}

#[test]
fn a_gap_in_the_log_ends_one_answer_and_begins_the_next() {
    let mut table = table(&["a"]);
    publish(&mut table, 0, at(1, 1), 1);
    table.append(0, frame(FrameKind::Gap, at(1, 4), 2), 2);
    table.append(0, frame(FrameKind::Gap, at(1, 6), 3), 3);
    publish(&mut table, 0, at(1, 7), 4);
    assert_eq!(read(&table, Some(at(1, 0))), (None, vec![1], at(1, 1), true));
    assert_eq!(read(&table, Some(at(1, 1))), (Some((at(1, 1), at(1, 6))), vec![7], at(1, 7), false));
    assert_eq!(read(&table, Some(at(1, 6))), (None, vec![7], at(1, 7), false));
}

#[test]
fn an_earlier_epoch_is_not_given_out_after_its_end() {
    let mut table = table(&["a"]);
    publish(&mut table, 0, at(1, 1), 1);
    table.append(0, frame(FrameKind::Gap, at(2, 3), 2), 2);
    publish(&mut table, 0, at(2, 4), 3);
    assert_eq!(read(&table, Some(at(7, 7))), (Some((at(7, 7), at(2, 3))), vec![4], at(2, 4), false));
    assert_eq!(read(&table, Some(at(1, 1))), (Some((at(1, 1), at(2, 3))), vec![4], at(2, 4), false));
    assert_eq!(read(&table, Some(at(2, 3))), (None, vec![4], at(2, 4), false));
}

#[test]
fn a_reader_from_a_node_that_is_ahead_gets_nothing_twice() {
    let mut table = table(&["a"]);
    publish(&mut table, 0, at(1, 1), 1);
    let ahead = Some(at(1, 3));
    assert_eq!(read(&table, ahead), (None, vec![], at(1, 3), false));
    let empty = Reading::of(&table, &[0], &[entry("a", at(1, 3))]).answer();
    for offset in 2..=4 {
        publish(&mut table, 0, at(1, offset), offset);
    }
    assert!(!empty.news);
    assert_eq!(read(&table, ahead), (None, vec![4], at(1, 4), false));
}

#[test]
fn publications_without_an_offset_are_left_out() {
    let mut table = table(&["a"]);
    publish(&mut table, 0, at(1, 1), 1);
    table.append(0, frame(FrameKind::Unpositioned, at(1, 1), 2), 2);
    publish(&mut table, 0, at(1, 2), 3);
    table.append(0, frame(FrameKind::Unpositioned, at(1, 2), 4), 4);
    assert_eq!(read(&table, Some(at(1, 0))), (None, vec![1, 2], at(1, 2), false));
    assert!(!Reading::of(&table, &[0], &[entry("a", at(1, 2))]).is_news());
}

#[test]
fn the_oldest_publications_of_all_channels_come_first() {
    let mut table = table(&["busy", "quiet"]);
    for offset in 1..=POLL_PUBLICATIONS as u64 + 10 {
        publish(&mut table, 0, at(1, offset), 10 * offset);
    }
    publish(&mut table, 1, at(1, 1), 55);
    let reading = Reading::of(&table, &[0, 1], &[entry("busy", at(1, 0)), entry("quiet", at(1, 0))]);
    assert!(reading.more);
    let lengths: Vec<usize> = reading.channels.iter().map(|channel| channel.publications.len()).collect();
    assert_eq!(lengths, [POLL_PUBLICATIONS - 1, 1]);
}

#[test]
fn an_answer_is_bounded_in_bytes_and_holds_at_least_one_publication() {
    let mut table = table(&["a"]);
    let (mut encoder, mut blocks) = (FrameEncoder::default(), ChannelBlocks::default());
    let mut append = |offset: u64, bytes: usize| {
        let data = "x".repeat(bytes);
        let frame = encoder.encode(&mut blocks, "a", FrameKind::Publication, at(1, offset), &data, offset);
        table.append(0, Arc::new(frame), offset);
    };
    append(1, 2 * POLL_BYTES);
    for offset in 2..=4 {
        append(offset, POLL_BYTES / 2 - 100);
    }
    assert_eq!(read(&table, Some(at(1, 0))), (None, vec![1], at(1, 1), true));
    assert_eq!(read(&table, Some(at(1, 1))), (None, vec![2, 3], at(1, 3), true));
    assert_eq!(read(&table, Some(at(1, 3))), (None, vec![4], at(1, 4), false));
}

/// Readers go through random logs from everywhere, poll by poll. Whatever they start from, each publication follows what
/// they had or a gap that says what does not, and they arrive at the head.
#[test]
fn polls_lead_from_anywhere_to_the_head_without_a_silent_hole() {
    let mut state = 42u64;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for _ in 0..40 {
        let mut table = table(&["a"]);
        let mut places = vec![at(1, 0), at(99, 3)];
        let mut position = at(1, 0);
        for arrived in 1..=700 {
            let kind = match random(100) {
                0 => {
                    position = at(position.epoch.0 + 1, random(5));
                    FrameKind::Gap
                }
                1..3 => {
                    position.offset += 1 + random(9);
                    FrameKind::Gap
                }
                3..10 => FrameKind::Unpositioned,
                _ => {
                    position.offset += 1;
                    FrameKind::Publication
                }
            };
            table.append(0, frame(kind, position, arrived), arrived);
            places.push(position);
        }
        places.push(Position { offset: position.offset + 7, ..position });
        let Some(State::Live(log)) = table.get_mut(0).map(|channel| &mut channel.state) else { panic!("live") };
        log.trim(700, Bounds { messages: 1 + random(700) as usize, ..WIDE });
        for start in places {
            let mut here = start;
            for polls in 0.. {
                assert!(polls < 40, "from {start:?}: no end, at {here:?}");
                let reading = Reading::of(&table, &[0], &[entry("a", here)]);
                let channel = &reading.channels[0];
                if let Some((from, to)) = channel.gap {
                    assert_eq!(from, here, "from {start:?}");
                    here = to;
                }
                for frame in &channel.publications {
                    assert_eq!(frame.position, Position { offset: here.offset + 1, ..here }, "from {start:?}");
                    here = frame.position;
                }
                assert_eq!(channel.reached, here);
                if !reading.more {
                    break;
                }
                assert!(reading.is_news(), "from {start:?}: more and nothing, at {here:?}");
            }
            assert!(here == position || here == start && start.offset > position.offset, "from {start:?} to {here:?}");
        }
    }
}
