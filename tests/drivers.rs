//! The choice between io_uring and epoll: made once, visible, and right where io_uring is forbidden.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use crate::harness::{Driver, Weir};

scenarios! {
    each_driver: [
        chosen_driver_is_the_one_in_use,
    ],
}

fn rings(weir: &Weir) -> usize {
    weir.descriptors().iter().filter(|target| target.contains("io_uring")).count()
}

fn chosen_driver_is_the_one_in_use(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut sse = weir.sse(&["news"]);
    weir.publish("news", "1");
    assert_eq!(sse.next().data, "1");
    match driver {
        Driver::Uring => assert!(rings(&weir) > 0, "{:?}", weir.descriptors()),
        Driver::Epoll => assert_eq!(rings(&weir), 0, "neither the engine nor the runtime opens a ring"),
    }
    let named = weir.wait_log("the driver", |line| line.contains("driver") && line.contains(driver.flag()));
    assert!(named.contains("reason"), "the choice is logged with its reason: {named}");
}

/// A filter that answers `io_uring_setup` with an error, as container runtimes do.
fn without_io_uring(errno: libc::c_int) -> BpfProgram {
    let rules = BTreeMap::from([(libc::SYS_io_uring_setup, vec![])]);
    let refuse = SeccompAction::Errno(errno.unsigned_abs());
    let architecture = std::env::consts::ARCH.try_into().expect("an architecture that seccomp knows");
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, architecture).expect("a filter");
    filter.try_into().expect("the filter compiles")
}

#[test]
fn without_io_uring_the_node_serves_on_epoll_and_says_why() {
    for (errno, reason) in [(libc::EPERM, "not permitted"), (libc::ENOSYS, "not implemented")] {
        let weir = Weir::command(Driver::Epoll).driver("auto").seccomp(without_io_uring(errno)).start();
        let choice = weir.wait_log("the driver", |line| line.contains("driver") && line.contains("epoll"));
        assert!(choice.contains(reason), "{choice}");
        assert_eq!(rings(&weir), 0);
        let mut sse = weir.sse(&["news"]);
        let mut websocket = weir.centrifugo();
        websocket.subscribe("news");
        weir.publish("news", "1");
        assert_eq!(sse.next().data, "1");
        assert_eq!(websocket.next_data(1), [1]);
    }
}

#[test]
fn without_io_uring_the_uring_driver_refuses_to_start() {
    let (status, text) = Weir::command(Driver::Uring).seccomp(without_io_uring(libc::EPERM)).run_to_refusal();
    assert!(!status.success());
    for part in ["io_uring", "not permitted", "epoll"] {
        assert!(text.contains(part), "names {part:?}: {text}");
    }
}

#[test]
fn auto_prefers_io_uring_where_it_works() {
    let weir = Weir::command(Driver::Uring).driver("auto").start();
    assert!(rings(&weir) > 0, "{:?}", weir.descriptors());
}

#[test]
fn unknown_driver_is_refused_with_the_known_ones() {
    let (status, text) = Weir::command(Driver::Uring).driver("kqueue").run_to_refusal();
    assert!(!status.success());
    for part in ["kqueue", "auto", "uring", "epoll"] {
        assert!(text.contains(part), "names {part:?}: {text}");
    }
}
