//! End-to-end tests: the real binary over real sockets, spoken to by clients of our own that share no codec with it.
//!
//! A scenario is named for the fault it injects or the promise it checks, and runs on both drivers: its name appears as
//! `…::uring::…` and `…::epoll::…`, and where the backbone matters also under `memory` and `redis`. Nothing here sleeps
//! and hopes: a test waits for a condition with a deadline, and no test of correctness asserts a speed.
//!
//! Some modules need programs besides cargo: `redis-server`, `redis-cli`, `node` with the packages of `tests/web`, and
//! `chromium`. `tests/run.sh` installs what is missing.

/// Generates one `#[test]` for each scenario and driver (`each_driver`, functions of a [`harness::Driver`]) and for each
/// scenario, driver and backbone (`each_backbone`, functions of a [`harness::Place`]).
macro_rules! scenarios {
    (each_driver: [$($plain:ident),* $(,)?], each_backbone: [$($both:ident),* $(,)?] $(,)?) => {
        scenarios!(@driver uring, Uring, [$($plain),*], [$($both),*]);
        scenarios!(@driver epoll, Epoll, [$($plain),*], [$($both),*]);
    };
    (each_driver: [$($plain:ident),* $(,)?] $(,)?) => {
        scenarios!(each_driver: [$($plain),*], each_backbone: []);
    };
    (each_backbone: [$($both:ident),* $(,)?] $(,)?) => {
        scenarios!(each_driver: [], each_backbone: [$($both),*]);
    };
    (@driver $module:ident, $driver:ident, [$($plain:ident),*], []) => {
        mod $module {
            $(#[test] fn $plain() { super::$plain(crate::harness::Driver::$driver); })*
        }
    };
    (@driver $module:ident, $driver:ident, [$($plain:ident),*], [$($both:ident),+]) => {
        mod $module {
            $(#[test] fn $plain() { super::$plain(crate::harness::Driver::$driver); })*
            mod memory {
                $(#[test] fn $both() { super::super::$both(&crate::harness::Place::memory(crate::harness::Driver::$driver)); })*
            }
            mod redis {
                $(#[test] fn $both() { super::super::$both(&crate::harness::Place::redis(crate::harness::Driver::$driver)); })*
            }
        }
    };
}

mod activation;
mod backbone;
mod browser;
mod centrifuge;
mod commands;
mod delivery;
mod doctor;
mod drain;
mod drivers;
mod failover;
mod faults;
mod harness;
mod hostile;
mod http;
mod layers;
mod leaks;
mod older;
mod outage;
mod poll;
mod protocol;
mod reload;
mod resume;
mod shutdown;
mod slow;
mod storms;
mod systemd;
mod tuning;
mod upgrade;
