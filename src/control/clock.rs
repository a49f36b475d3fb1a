//! The node's one clock.

use crate::log::frame::Micros;

/// Microseconds of the system's monotonic clock (`CLOCK_MONOTONIC`): never steps back, and all threads read the same.
#[must_use]
pub fn monotonic_micros() -> Micros {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec into a live local. The clock exists on every Linux, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn it_runs_in_microseconds() {
        let (began, start) = (monotonic_micros(), Instant::now());
        std::thread::sleep(Duration::from_millis(20));
        let (passed, most) = (monotonic_micros() - began, start.elapsed().as_micros() as u64 + 1_000);
        assert!((20_000..=most.max(20_000)).contains(&passed), "{passed} µs, at most {most}");
    }
}
