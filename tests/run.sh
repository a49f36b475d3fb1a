#!/usr/bin/env bash
# Runs every test of the project and ends with a line "N passed, N failed" summed over all suites; exits 0 only when
# nothing failed. Installs what is missing first (Debian packages, npm packages in tests/web), so that a fresh machine with
# a Rust toolchain is enough. May be run again at any time. Needs root or sudo only when a package is missing.
#
#   tests/run.sh            everything
#   tests/run.sh FILTER     the cargo tests whose name contains FILTER, and nothing else
set -uo pipefail
cd "$(dirname "$0")/.."

passed=0
failed=0
failures=()
log=$(mktemp -d)
policy=""

finish() {
    rm -rf "$log"
    if [ -n "$policy" ]; then as_root rm -f "$policy"; fi
}
trap finish EXIT

say() { printf '\n==> %s (%ss)\n' "$1" "$SECONDS"; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# Counts one check that either holds or not.
check() {
    local name=$1
    shift
    say "$name"
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        failures+=("$name")
    fi
}

# Installs Debian packages. A package's service must not be started by that: a Redis on the standard port is nothing that
# these tests use, and on a developer's machine it would be a surprise.
install_packages() {
    say "installing: $*"
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        policy=/usr/sbin/policy-rc.d
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod 755 "$policy"
    fi
    as_root apt-get update -q && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends "$@"
}

prepare() {
    if ! command -v cargo >/dev/null; then
        echo "cargo is missing: install a Rust toolchain of at least the rust-version in Cargo.toml" >&2
        return 1
    fi
    local missing=()
    command -v redis-server >/dev/null || missing+=(redis-server)
    command -v redis-cli >/dev/null || missing+=(redis-tools)
    command -v node >/dev/null || missing+=(nodejs)
    command -v npm >/dev/null || missing+=(npm)
    [ -x "${CHROMIUM:-/usr/bin/chromium}" ] || missing+=(chromium)
    # The tests do without it; the instruction counts among the benches do not.
    command -v valgrind >/dev/null || missing+=(valgrind)
    # For its tools alone: nothing of it is started.
    command -v systemd-analyze >/dev/null || missing+=(systemd)
    command -v cc >/dev/null || missing+=(gcc libc6-dev)
    python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3 python3-venv)
    if [ ${#missing[@]} -gt 0 ]; then
        install_packages "${missing[@]}" || return 1
    fi
    # The mark is written after a complete install of exactly this lock file.
    local mark=tests/web/node_modules/.installed
    if ! cmp -s tests/web/package-lock.json "$mark"; then
        say "npm ci in tests/web"
        (cd tests/web && npm ci --ignore-scripts) && cp tests/web/package-lock.json "$mark" || return 1
    fi
}

# Runs cargo test with the given arguments and adds up the "test result" lines of its binaries.
cargo_tests() {
    say "cargo test $*"
    local out=$log/cargo-test status count
    cargo test --locked --no-fail-fast "$@" 2>&1 | tee "$out"
    status=${PIPESTATUS[0]}
    count=$(awk '/^test result:/ { for (i = 1; i < NF; i++) if ($(i + 1) ~ /^passed/) sum += $i } END { print sum + 0 }' "$out")
    passed=$((passed + count))
    count=$(awk '/^test result:/ { for (i = 1; i < NF; i++) if ($(i + 1) ~ /^failed/) sum += $i } END { print sum + 0 }' "$out")
    failed=$((failed + count))
    if [ "$status" != 0 ]; then
        # Something that did not compile or a binary that died has no result line of its own.
        if [ "$count" = 0 ]; then failed=$((failed + 1)); fi
        failures+=("cargo test")
        while read -r name; do failures+=("  $name"); done < <(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$out")
    fi
}

# Runs the Autobahn cases against the WebSocket codec; its summary line is
# "N ok, N non-strict, N informational, N failed".
autobahn() {
    say "Autobahn"
    local out=$log/autobahn status summary
    python3 tests/autobahn/run.py 2>&1 | tee "$out"
    status=${PIPESTATUS[0]}
    summary=$(sed -nE 's/^([0-9]+) ok, ([0-9]+) non-strict, ([0-9]+) informational, ([0-9]+) failed$/\1 \2 \3 \4/p' "$out")
    if [ -n "$summary" ]; then
        local ok loose open bad
        read -r ok loose open bad <<<"$summary"
        passed=$((passed + ok + loose + open))
        failed=$((failed + bad))
    fi
    if [ "$status" != 0 ] || [ -z "$summary" ]; then
        if [ "${bad:-0}" = 0 ]; then failed=$((failed + 1)); fi
        failures+=("Autobahn")
    fi
}

# The scenarios mostly wait, so more of them than cores run side by side.
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-4}
export RUST_BACKTRACE=${RUST_BACKTRACE:-1}

if ! prepare; then
    echo "preparing failed; see above" >&2
    echo "0 passed, 1 failed"
    exit 1
fi
if [ $# -gt 0 ]; then
    cargo_tests "$@"
else
    check "cargo fmt" cargo fmt --all --check
    check "cargo clippy" cargo clippy --locked --all-targets -- -D warnings
    cargo_tests
    autobahn
fi

say "done"
for name in "${failures[@]}"; do echo "FAILED: $name"; done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ ${#failures[@]} = 0 ]
