//! A node that reads its configuration again while it serves.

use std::fs;

use crate::harness::{Driver, Http, TempDir, Weir, eventually};

scenarios! {
    each_driver: [
        what_may_change_changes_under_live_clients_and_the_rest_is_named,
        configuration_that_is_wrong_changes_nothing,
    ],
}

fn what_may_change_changes_under_live_clients_and_the_rest_is_named(driver: Driver) {
    let folder = TempDir::new();
    let file = folder.path().join("weir.toml");
    fs::write(&file, "[limits]\npublication_bytes = 100\n").expect("write the configuration");
    let weir = Weir::command(driver).configured_by(&file).start();
    let mut stream = weir.sse(&["news"]);
    let long = "x".repeat(150);
    let publish = |http: &mut Http| http.send("POST", "/publish/news", &[], long.as_bytes()).status;
    assert_eq!(publish(&mut Http::open(weir.address())), 413);
    let mut kept = Http::open(weir.address());
    assert_eq!(kept.send("GET", "/health/live", &[], b"").status, 200);

    fs::write(
        &file,
        "shards = 3\n[limits]\npublication_bytes = 200\n[log]\nfilter = \"debug\"\n[drain]\nwindow = \"9s\"\n",
    )
    .expect("write the configuration");
    let told = weir.operate("reload").expect("an answer");
    let keys = |list: &str| -> Vec<String> {
        let list = told[list].as_array().expect("a list");
        list.iter().map(|change| change["key"].as_str().expect("a key").to_owned()).collect()
    };
    // The flags of the command line say what the window is, and they win over the file.
    assert_eq!(keys("changed"), ["limits.publication_bytes", "log.filter"], "{told}");
    assert_eq!(keys("needs_restart"), ["shards"], "{told}");

    eventually("the new bound is in force", || (publish(&mut Http::open(weir.address())) == 200).then_some(()));
    assert_eq!(publish(&mut kept), 200, "also on the connection that was there");
    assert_eq!(stream.next_data(2), [&*long, &*long], "the stream goes on");
    weir.wait_log("lines of the new level", |line| line.contains("\"level\":\"DEBUG\""));
}

fn configuration_that_is_wrong_changes_nothing(driver: Driver) {
    let folder = TempDir::new();
    let file = folder.path().join("weir.toml");
    fs::write(&file, "[sse]\nretry = \"3s\"\n").expect("write the configuration");
    let weir = Weir::command(driver).configured_by(&file).start();
    let mut stream = weir.sse(&["news"]);
    fs::write(&file, "[sse]\nretry = \"3 fortnights\"\n[lag]\nmesages = 9\n").expect("write the configuration");
    let error = weir.operate("reload").expect_err("it is wrong");
    assert!(error.contains("sse.retry = \"3 fortnights\" is not allowed") && error.contains("lag.messages"), "{error}");
    weir.signal(libc::SIGHUP);
    weir.wait_log("the refusal", |line| line.contains("the configuration stays as it is"));
    weir.publish("news", "on");
    assert_eq!(stream.next().data, "on");
}
