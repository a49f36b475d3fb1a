use std::sync::atomic::{AtomicUsize, Ordering};

use super::client::{AskError, ask};
use super::*;

struct Fake;

impl Operated for Fake {
    fn status(&self) -> Value {
        json!({ "phase": "serving" })
    }
}

/// A place of this test's own.
fn somewhere() -> Place {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    Place::Unix(std::env::temp_dir().join(format!("weir-admin-test-{}-{number}/a.sock", std::process::id())))
}

fn commander() -> (Commander, mpsc::Receiver<Command>) {
    let (commands, received) = mpsc::channel();
    (Commander { commands, bell: Arc::new(Bell::new().expect("a bell")) }, received)
}

#[test]
fn a_command_reaches_the_main_thread_and_its_answer_the_client() {
    let (commander, received) = commander();
    let admin = Admin::start(somewhere(), false, commander, Arc::new(Fake)).expect("a socket");
    let main = std::thread::spawn(move || {
        let Ok(Command::Drain(reply)) = received.recv() else { panic!("a drain is asked for") };
        reply.send(json!({ "connections": 3 })).expect("it waits");
        let Ok(Command::Upgrade(reply)) = received.recv() else { panic!("an upgrade is asked for") };
        reply.send(Err("not now".into())).expect("it waits");
    });
    let place = admin.place().clone();
    assert_eq!(ask(&place, "GET", "/admin/status").expect("an answer"), json!({ "phase": "serving" }));
    assert_eq!(ask(&place, "POST", "/admin/drain").expect("an answer"), json!({ "connections": 3 }));
    let refused = ask(&place, "POST", "/admin/upgrade").expect_err("it is refused").to_string();
    assert_eq!(refused, "the node refused: not now");
    main.join().expect("no panic");
    let nothing = ask(&place, "GET", "/").expect_err("nothing is there").to_string();
    assert!(nothing.contains("POST /admin/drain"), "{nothing}");
    let stopping = ask(&place, "POST", "/admin/drain").expect_err("nobody takes commands").to_string();
    assert!(stopping.contains("stopping"), "{stopping}");
}

#[test]
fn only_its_user_may_open_it_and_a_second_node_may_not_take_it() {
    let place = somewhere();
    let Place::Unix(path) = place.clone() else { unreachable!() };
    let admin = Admin::start(place.clone(), false, commander().0, Arc::new(Fake)).expect("a socket");
    let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(path.parent().expect("a directory"))), (0o600, 0o700));
    let error = Admin::start(place.clone(), false, commander().0, Arc::new(Fake)).expect_err("taken").to_string();
    assert!(error.contains("another node answers there") && error.contains("admin.listen"), "{error}");

    let successor = Admin::start(place.clone(), true, commander().0, Arc::new(Fake)).expect("it succeeds the first");
    admin.leave();
    assert!(ask(&place, "GET", "/admin/status").is_ok(), "the successor answers");
    drop(successor);
    assert!(!path.exists());
    assert!(matches!(ask(&place, "GET", "/admin/status"), Err(AskError::Unreachable(..))));
}

#[test]
fn what_a_killed_node_left_is_replaced() {
    let place = somewhere();
    let Place::Unix(path) = place.clone() else { unreachable!() };
    fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
    drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket"));
    assert!(path.exists());
    let _admin = Admin::start(place.clone(), false, commander().0, Arc::new(Fake)).expect("nobody answers there");
    assert!(ask(&place, "GET", "/admin/status").is_ok());
}
