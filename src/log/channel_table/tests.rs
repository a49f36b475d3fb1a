use super::*;

fn group_of(n: u32) -> Group {
    let mut group = Group::default();
    for slot in 0..n {
        assert_eq!(group.join(slot, 1), slot);
    }
    group
}

#[test]
fn a_pass_serves_each_member_once_whoever_leaves() {
    // Every direction, every choice of how many were served and who leaves: the others are served exactly once.
    for (backward, served) in (0..6).flat_map(|served| [(false, served), (true, served)]) {
        for leaver in 0..6u32 {
            let mut group = group_of(6);
            group.backward = backward;
            let mut index_of: Vec<u32> = (0..6).collect();
            let mut sent = [0; 6];
            group.begin_pass(5);
            for _ in 0..served {
                sent[group.next_in_pass().unwrap().1 as usize] += 1;
                group.served();
            }
            let had = group.sent_to(index_of[leaver as usize]);
            assert_eq!(had, if sent[leaver as usize] == 1 { 5 } else { 0 });
            for moved in group.leave(index_of[leaver as usize]).into_iter().flatten() {
                index_of[moved.slot as usize] = moved.index;
            }
            while let Some((index, slot)) = group.next_in_pass() {
                assert_eq!(index_of[slot as usize], index);
                sent[slot as usize] += 1;
                group.served();
            }
            for slot in (0..6u32).filter(|&slot| slot != leaver) {
                assert_eq!(sent[slot as usize], 1, "served {served}, left {leaver}, slot {slot}");
                assert_eq!(group.members()[index_of[slot as usize] as usize], slot);
                assert_eq!(group.sent_to(index_of[slot as usize]), 5);
            }
        }
    }
}

#[test]
fn who_was_last_is_first_the_next_time() {
    let mut group = group_of(3);
    let mut pass = |head| {
        group.begin_pass(head);
        let mut order = Vec::new();
        while let Some((_, slot)) = group.next_in_pass() {
            order.push(slot);
            group.served();
        }
        order
    };
    assert_eq!([pass(1), pass(2), pass(3)], [[0, 1, 2], [2, 1, 0], [0, 1, 2]]);
}

#[test]
fn nobody_joins_a_group_elsewhere_in_the_log() {
    let mut group = group_of(2);
    assert!(group.admits(1) && !group.admits(2));
    group.begin_pass(3);
    assert!(!group.admits(1) && !group.admits(4));
    while group.next_in_pass().is_some() {
        group.served();
    }
    assert!(group.admits(4));
    assert!(Group::default().admits(17));
}

#[test]
fn a_number_lives_until_the_relay_has_let_go() {
    let mut table = ChannelTable::new(Bounds { messages: 1, bytes: 1, age: 1, older_bytes: 1 });
    let name: Arc<str> = "a".into();
    assert_eq!(table.hold(&name), (0, Interest::Wanted));
    assert_eq!(table.hold(&name), (0, Interest::Unchanged));
    assert_eq!(table.release(0), Interest::Unchanged);
    assert_eq!(table.release(0), Interest::Unwanted);
    assert_eq!(table.hold(&name), (0, Interest::Unchanged), "comes back before the relay has let go");
    assert!(!table.open(0, Position::default(), Vec::new(), 0), "an answer to the first request is too late");
    assert_eq!(table.released(0), Interest::Wanted);
    assert!(table.open(0, Position::default(), Vec::new(), 0));
    assert_eq!(table.release(0), Interest::Unwanted);
    assert_eq!(table.released(0), Interest::Unchanged);
    assert!(table.is_empty());
}

#[test]
fn a_refused_channel_is_asked_for_again_by_who_comes_later() {
    let mut table = ChannelTable::new(Bounds { messages: 1, bytes: 1, age: 1, older_bytes: 1 });
    let name: Arc<str> = "a".into();
    table.hold(&name);
    assert_eq!(table.refuse(0), Interest::Unwanted);
    assert_eq!(table.release(0), Interest::Unchanged, "the relay was told already");
    assert_eq!(table.hold(&name), (0, Interest::Unchanged));
    assert_eq!(table.released(0), Interest::Wanted);
    assert!(table.open(0, Position::default(), Vec::new(), 0));
    assert_eq!(table.refuse(0), Interest::Unchanged, "a live channel is not refused");
    table.release(0);
    assert_eq!(table.refuse(0), Interest::Unchanged, "nor one that nobody waits for");
}
