use super::*;

fn subscription(channel: &str) -> Place {
    let unpositioned = vec![u64::MAX, 3];
    let at = At { epoch: u32::MAX, offset: u64::MAX, unpositioned, floor: Some((1, 2)), backlog: 7 };
    Place { channel: channel.into(), at: Some(at) }
}

/// One of each form, in the middle of everything.
fn states() -> Vec<State> {
    let held: Held = serde_json::from_str(
        r#"{"head":[129],"frame":{"opcode":1,"last":false,"left":9,"key":[1,2,3,4]},"text":true,"control":[1]}"#,
    )
    .unwrap();
    let conversation = Conversation {
        held: held.with_message(b"{\"id\":".to_vec()),
        connected: true,
        opened: 5_000,
        pinged: 300,
        waits_for_pong: true,
        pending: vec![PendingSubscribe {
            channel: "later".into(),
            command: 9,
            recovers: true,
            position: Some((3, 4)),
            left: 100,
            then_unsubscribe: Some(10),
        }],
    };
    let poll = WaitingPoll {
        cursor: "00000001.00000002.3".into(),
        known: Some("\"tag\"".into()),
        origin: Some("https://a.example".into()),
        left: 20_000,
    };
    let request = Request {
        received: b"POST /publish/a HTTP/1.1\r\n".to_vec(),
        unsent: vec![0, 255, 10],
        last: true,
        invited: true,
        left: 8_000,
    };
    let later = Place { channel: "later".into(), at: None };
    let of = |form, subscriptions| State { form, silent: 1_200, subscriptions, control: b"\x81\x02{}".to_vec() };
    vec![
        of(Form::Sse, vec![subscription("räume/a"), subscription("b")]),
        of(Form::WebSocket(conversation), vec![subscription("a"), later]),
        of(Form::Poll(poll), vec![subscription("a")]),
        of(Form::Request(request), Vec::new()),
    ]
}

/// The same state with its JSON object changed.
fn with_head(state: &State, change: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
    let bytes = state.clone().encode();
    let length = u32::from_le_bytes(bytes[..4].try_into().unwrap()) as usize;
    let mut head: serde_json::Value = serde_json::from_slice(&bytes[4..4 + length]).unwrap();
    change(&mut head);
    let head = serde_json::to_vec(&head).unwrap();
    [&(head.len() as u32).to_le_bytes()[..], &head, &bytes[4 + length..]].concat()
}

#[test]
fn every_form_survives_its_bytes() {
    for state in states() {
        assert_eq!(State::decode(&state.clone().encode()), Ok(state));
    }
}

#[test]
fn a_state_cut_anywhere_is_refused() {
    for state in states() {
        let bytes = state.encode();
        for end in 0..bytes.len() {
            assert!(State::decode(&bytes[..end]).is_err(), "{end} of {}", bytes.len());
        }
        assert!(State::decode(&[&bytes[..], b"x"].concat()).is_err());
    }
}

#[test]
fn a_state_with_a_wrong_byte_is_no_panic() {
    for state in states() {
        let bytes = state.encode();
        for at in 0..bytes.len() {
            for value in [0, b'9', b'"', 0xff] {
                let mut changed = bytes.clone();
                changed[at] = value;
                // Some of these are states too; none may bring the node down.
                let _ = State::decode(&changed);
            }
        }
    }
}

#[test]
fn the_versions_before_and_after_are_understood_and_no_others() {
    for state in states() {
        for version in [STATE_VERSION - 1, STATE_VERSION, STATE_VERSION + 1] {
            let bytes = with_head(&state, |head| head["version"] = version.into());
            assert_eq!(State::decode(&bytes).as_ref(), Ok(&state));
        }
        let bytes = with_head(&state, |head| head["version"] = (STATE_VERSION + 2).into());
        assert_eq!(State::decode(&bytes), Err(StateError::Version(STATE_VERSION + 2)));
    }
}

#[test]
fn fields_and_runs_of_a_later_version_are_read_over_and_missing_ones_have_defaults() {
    let state = &states()[1];
    let mut bytes = with_head(state, |head| {
        head["version"] = (STATE_VERSION + 1).into();
        head["mood"] = "good".into();
        head["form"]["WebSocket"]["mood"] = 3.into();
        head["subscriptions"][0]["at"]["mood"] = serde_json::Value::Null;
        head["runs"].as_array_mut().unwrap().push(4.into());
    });
    bytes.extend_from_slice(b"more");
    assert_eq!(State::decode(&bytes).as_ref(), Ok(state));

    let bytes = with_head(state, |head| {
        head["version"] = (STATE_VERSION - 1).into();
        for field in ["connected", "waits_for_pong", "pending"] {
            head["form"]["WebSocket"].as_object_mut().unwrap().remove(field);
        }
        head.as_object_mut().unwrap().remove("silent");
        head["subscriptions"][0]["at"].as_object_mut().unwrap().remove("unpositioned");
    });
    let decoded = State::decode(&bytes).unwrap();
    let Form::WebSocket(conversation) = &decoded.form else { panic!("another form") };
    assert_eq!((conversation.connected, conversation.pending.len(), decoded.silent), (false, 0, 0));
    assert_eq!(decoded.subscriptions[0].at.as_ref().unwrap().unpositioned, Vec::<u64>::new());
}
