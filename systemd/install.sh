#!/usr/bin/env bash
# Installs weir on this machine, or into a directory that becomes one (--root), and removes it again.
#
#   systemd/install.sh [--root DIR] [--prefix DIR] [--binary FILE] [--connections N] [--dry-run]
#   systemd/install.sh --uninstall [--root DIR] [--prefix DIR] [--purge] [--dry-run]
#
#   --root DIR         install below DIR, for an image or a package; nothing that runs is touched
#   --prefix DIR       where programs go (/usr/local; a package uses /usr)
#   --binary FILE      the program (target/release/weir)
#   --connections N    what the sysctl values are computed for (200000)
#   --purge            remove the configuration also when it was changed
#   --dry-run          say what would be done, and do nothing
#
# What was made is listed in PREFIX/share/weir/manifest; a removal takes away what is listed there, and so leaves nothing.
# A second installation replaces everything but the configuration. Nothing is enabled, started or stopped by an
# installation: afterwards `systemctl enable --now weir`, or `weir upgrade` where it runs already.
set -euo pipefail
project=$(cd "$(dirname "$0")/.." && pwd)

root=""
prefix=/usr/local
binary=$project/target/release/weir
connections=200000
action=install
purge=no
dry=no

die() {
    echo "install.sh: $1" >&2
    exit 1
}

while [ $# -gt 0 ]; do
    case $1 in
    --root | --prefix | --binary | --connections)
        [ $# -ge 2 ] || die "$1 needs a value"
        case $1 in
        --root) root=${2%/} ;;
        --prefix) prefix=${2%/} ;;
        --binary) binary=$2 ;;
        --connections) connections=$2 ;;
        esac
        shift
        ;;
    --uninstall) action=uninstall ;;
    --purge) purge=yes ;;
    --dry-run) dry=yes ;;
    -h | --help)
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
        exit 0
        ;;
    *) die "unknown argument $1; allowed: --root, --prefix, --binary, --connections, --uninstall, --purge, --dry-run" ;;
    esac
    shift
done
[[ $prefix == /* ]] || die "--prefix is $prefix; allowed: an absolute path"
[ -z "$root" ] || [ -d "$root" ] || die "--root is $root, which is no directory"
[ -n "$root" ] || [ "$dry" = yes ] || [ "$(id -u)" = 0 ] || die "must run as root, or with --root or --dry-run"

manifest=$root$prefix/share/weir/manifest
configuration=/etc/weir/weir.toml

# Does it, or says what it would do.
act() {
    if [ "$dry" = yes ]; then printf 'would run: %s\n' "$*"; else "$@"; fi
}

# Whether this system's service manager is to be told.
running() { [ -z "$root" ] && [ -d /run/systemd/system ]; }

# Notes a path, relative to the root, once.
note() {
    if [ "$dry" = yes ] || grep -qxF -- "$1" "$manifest" 2>/dev/null; then return; fi
    printf '%s\n' "$1" >>"$manifest"
}

# Makes a directory and those above it, and notes the ones that were not there.
make_directory() {
    [ -d "$root$1" ] && return
    [ "$1" = / ] || make_directory "$(dirname "$1")"
    [[ " ${new_directories[*]} " != *" $1 "* ]] || return 0
    act mkdir -m 755 "$root$1"
    new_directories+=("$1")
}

# Puts a file in place: source, place, mode. The name points to the old file or to the new one at any time, so that a running
# node may be upgraded at any time.
place() {
    make_directory "$(dirname "$2")"
    act install -m "$3" "$1" "$root$2.new"
    act mv -f "$root$2.new" "$root$2"
    note "file $2"
}

install_all() {
    [ -x "$binary" ] || die "no program at $binary; build it with cargo build --release, or give --binary"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "$project/tuning/apply" print --connections "$connections" ${root:+--root "$root"} >"$work/sysctl"
    sed "s|^ExecStart=/usr/local/|ExecStart=$prefix/|" "$project/systemd/weir.service" >"$work/service"
    # Every key with its meaning, none of them set: a default that changes with a version then changes here too.
    sed -E 's/^([a-z_]+ = )/#\1/' "$project/weir.example.toml" >"$work/toml"

    new_directories=()
    make_directory "$prefix/share/weir"
    for directory in "${new_directories[@]}"; do note "directory $directory"; done
    new_directories=()
    note "file $prefix/share/weir/manifest"
    place "$binary" "$prefix/bin/weir" 755
    place "$work/service" "$prefix/lib/systemd/system/weir.service" 644
    place "$project/systemd/weir.socket" "$prefix/lib/systemd/system/weir.socket" 644
    place "$project/systemd/weir.sysusers" "$prefix/lib/sysusers.d/weir.conf" 644
    place "$project/systemd/weir.tmpfiles" "$prefix/lib/tmpfiles.d/weir.conf" 644
    place "$work/sysctl" "$prefix/lib/sysctl.d/60-weir.conf" 644
    if [ -e "$root$configuration" ]; then
        echo "kept $configuration"
    else
        place "$work/toml" "$configuration" 640
        place "$work/toml" "$prefix/share/weir/weir.toml" 644
    fi
    for directory in "${new_directories[@]}"; do note "directory $directory"; done

    if running; then
        act systemd-sysusers "$prefix/lib/sysusers.d/weir.conf"
        act systemd-tmpfiles --create "$prefix/lib/tmpfiles.d/weir.conf"
        act systemctl daemon-reload
    fi
    [ "$dry" = no ] || return 0
    echo "installed; edit $configuration, then: systemctl enable --now weir   (running already: weir upgrade)"
    echo "kernel settings take effect at the next boot, or now with: tuning/apply apply --connections $connections"
}

uninstall_all() {
    [ -e "$manifest" ] || die "nothing is installed: there is no $manifest"
    if running; then act systemctl disable --now weir.socket weir.service; fi
    if [ "$purge" = no ] && ! cmp -s "$root$configuration" "$root$prefix/share/weir/weir.toml"; then
        echo "kept $configuration, which was changed (--purge removes it)"
        keep=$configuration
    fi
    local kind path lines
    mapfile -t lines <"$manifest"
    for line in "${lines[@]}"; do
        read -r kind path <<<"$line"
        if [ "$kind" = file ] && [ "$path" != "${keep:-}" ]; then act rm -f "$root$path"; fi
    done
    # The deepest first. One that somebody else uses by now stays.
    while read -r path; do
        if [ "$dry" = yes ]; then
            echo "would run: rmdir $root$path"
        else
            rmdir --ignore-fail-on-non-empty "$root$path" 2>/dev/null || true
        fi
    done < <(printf '%s\n' "${lines[@]}" | sed -n 's/^directory //p' | awk '{ print length, $0 }' | sort -rn | cut -d' ' -f2-)
    if running; then act systemctl daemon-reload; fi
    [ "$dry" = no ] || return 0
    echo "removed; the user weir stays, since files may belong to it (userdel weir)"
}

"${action}_all"
