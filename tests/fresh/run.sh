#!/usr/bin/env bash
# Set-up and use on machines that have nothing: `make fresh`, or  tests/fresh/run.sh [bookworm|trixie ...]
# Builds a minimal root file system of each Debian and works in it as a user would; prints a table of steps, times and disk.
#   bookworm  as root, with apt: set-up installs what Debian's Python lacks; then `make demo`, twice
#   trixie    a cluster's login node: an ordinary user without apt, dpkg, sudo, ninja and compilers; after set-up a home that is read-only
#             and no network
# Needs root, debootstrap, some 20 GB in CODA_FRESH (/var/tmp/coda-fresh), and this machine's settings of apt and pip, which it takes over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
fresh=${CODA_FRESH:-/var/tmp/coda-fresh}
project=/project/coda

fail() {
    printf 'fresh: %s\n' "$*" >&2
    exit 2
}
[ "$(id -u)" = 0 ] || fail "needs root, to build root file systems"
command -v debootstrap >/dev/null || fail "debootstrap is missing: apt-get install debootstrap"

mirror() { # of this machine's own sources
    sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb \(\[[^]]*\] \)\?\([^ ]*\) .*/\2/p' \
        /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null | head -n 1
}

# pip's settings on this machine, as variables of the environment: files of settings are not read by another user.
pip_settings() {
    python3 -m pip config list | sed -n "s/^[^.]*\.\([a-z-]*\)='\(.*\)'$/\1 \2/p" | while read -r name value; do
        [ "$name" = cert ] || echo "PIP_$(tr 'a-z-' 'A-Z_' <<<"$name")=$value"
    done
    env | grep -E '^([A-Za-z_]*(PROXY|proxy)|SSL_CERT_FILE|REQUESTS_CA_BUNDLE)=' || true
    [ -z "${SSL_CERT_FILE:-}" ] || echo "PIP_CERT=$SSL_CERT_FILE"
}

# Files and folders that those settings name; an index in a folder names files beside it.
pip_paths() {
    pip_settings | grep -oE "(file://)?/[^ '=]+" | sed 's|^file://\(.*\)/.*|\1|' | sort -u
}

# Minimal root file system with the words of `debootstrap --include`.
build() { # SUITE PACKAGES
    local root=$fresh/$1 path
    umount_all "$root"
    rm -rf "$root"
    mkdir -p "$fresh"
    debootstrap --variant=minbase --include="$2" "$1" "$root" "$(mirror)" >"$fresh/$1-debootstrap.log" 2>&1 ||
        fail "debootstrap $1 failed: see $fresh/$1-debootstrap.log"
    cp -r /etc/apt/apt.conf.d /etc/apt/auth.conf.d "$root/etc/apt/" 2>/dev/null || true
    cp /etc/resolv.conf /etc/hosts "$root/etc/"
    for path in $(pip_paths); do
        [ -e "$path" ] || continue
        if [ -d "$path" ]; then
            mkdir -p "$root$path"
            mount --rbind -o ro "$path" "$root$path"
        else
            mkdir -p "$root$(dirname "$path")"
            cp -L "$path" "$root$path"
        fi
    done
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mkdir -p "$root$project"
    git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -c 2>/dev/null | tar -x -C "$root$project"
}

umount_all() { # ROOT
    local point
    while read -r point; do
        umount -l "$point"
    done < <(awk -v root="$1/" 'index($2, root) == 1 { print $2 }' /proc/self/mounts | sort -r)
}

# COMMAND in the project, as after a new login: of this environment nothing passes but where pip finds packages.
inside() { # [WRAPPER ...] -- COMMAND
    local wrapper=()
    while [ "$1" != -- ]; do
        wrapper+=("$1")
        shift
    done
    "${wrapper[@]}" env -i "${settings[@]}" PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "${identity[@]}" \
        chroot "${user[@]}" "$root" sh -c "cd $project && $2"
}

mapfile -t settings < <(pip_settings)
rows=()
step() { # NAME: COMMAND of the rest, its time and the last line that it said
    local name=$1 start=$SECONDS log=$fresh/$suite-${1// /-}.log seconds
    shift
    printf '%s: %s ... ' "$suite" "$name"
    if ! "$@" >"$log" 2>&1; then
        printf 'FAILED; the end of %s:\n' "$log"
        tail -n 30 "$log"
        exit 1
    fi
    seconds=$((SECONDS - start))
    rows+=("| $machine | $name | $seconds s |")
    printf '%s s\n' "$seconds"
}

two_processes="OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc-per-node 2 -m pipeline train digits_resnet20 name=two training.epochs=1"
two_tests="OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/test_recipe.py tests/interpret/test_explain.py"

bookworm() {
    suite=bookworm machine="Debian 12, root, apt"
    root=$fresh/$suite user=() identity=(HOME=/root USER=root)
    build $suite python3,make,git,ca-certificates
    step "demo with set-up" inside -- "make demo"
    step "second demo" inside -- "make demo"
    step "doctor" inside -- ".venv/bin/coda doctor"
    step "two processes" inside -- "$two_processes"
    step "two tests" inside -- "$two_tests"
    disk
}

trixie() {
    suite=trixie machine="Debian 13, a user, no apt, home read-only, no network after set-up"
    root=$fresh/$suite user=(--userspec=1234:1234) identity=(HOME=/home/user USER=user)
    build $suite python3,python3-venv,make,git,ca-certificates
    mkdir -p "$root/home/user"
    echo "user:x:1234:1234::/home/user:/bin/sh" >>"$root/etc/passwd"
    chown -R 1234:1234 "$root/home/user" "$root/project"
    find "$root"/{usr/,}{bin,sbin} \( -name 'apt*' -o -name 'dpkg*' -o -name 'sudo*' -o -name 'ninja*' -o -name 'g++*' -o -name 'gcc*' -o -name 'cc' \) \
        -delete 2>/dev/null || true
    step "set-up" inside -- "make setup"
    mount --bind "$root/home/user" "$root/home/user"
    mount -o remount,bind,ro "$root/home/user"
    # without network, but with the loopback interface, which no machine lacks
    local up="import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh', b'lo', 0x41))"
    local alone=(unshare --net sh -c "python3 -c \"$up\" && exec \"\$@\"" sh)
    step "doctor" inside "${alone[@]}" -- ".venv/bin/coda doctor"
    step "short demo" inside "${alone[@]}" -- ".venv/bin/coda train digits_resnet20 training.epochs=1 && \
        .venv/bin/coda train digits_coda_resnet20 training.epochs=1 && .venv/bin/coda compare runs/digits_coda_resnet20 runs/digits_resnet20"
    step "two processes" inside "${alone[@]}" -- "$two_processes"
    step "two tests" inside "${alone[@]}" -- "$two_tests"
    disk
}

disk() {
    rows+=("| $machine | disk of .venv | $(du -sh "$root$project/.venv" | cut -f1), $(find "$root$project/.venv" -type f | wc -l) files |")
    rows+=("| $machine | disk of the system | $(du -shx --exclude="$root/project" "$root" | cut -f1) |")
    umount_all "$root"
}

trap 'for suite in bookworm trixie; do umount_all "$fresh/$suite"; done' EXIT
for suite in "${@:-bookworm trixie}"; do
    for name in $suite; do "$name"; done
done
printf '\n| machine | step | time or size |\n|---|---|---|\n'
printf '%s\n' "${rows[@]}"
