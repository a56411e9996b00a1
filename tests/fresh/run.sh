#!/usr/bin/env bash
# Set-up and use on machines that have nothing: `make fresh`, or
#   tests/fresh/run.sh [bookworm|trixie|container ...]
# Builds minimal root file systems and works in them as a user would; prints steps, times and disk.
#   bookworm   Debian 12 as root, with apt: `make demo` twice, set-up after damage and offline
#   trixie     Debian 13 as a cluster's login node: an ordinary user without apt, dpkg, sudo, ninja
#              and compilers; after set-up a home that is read-only and no network
#   container  Debian 12 without Python: the steps of the container's image
# Needs root, debootstrap and some 30 GB in CODA_FRESH (/var/tmp/coda-fresh), and takes over this
# machine's settings of apt and pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
fresh=${CODA_FRESH:-/var/tmp/coda-fresh}
project=/project/coda
system_path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

fail() {
    printf 'fresh: %s\n' "$*" >&2
    exit 2
}
[ "$(id -u)" = 0 ] || fail "needs root, to build root file systems"
command -v debootstrap >/dev/null || fail "debootstrap is missing: apt-get install debootstrap"
# In a mount namespace of its own: whatever ends this script, no mount is left behind.
[ -n "${FRESH_ALONE:-}" ] || FRESH_ALONE=1 exec unshare --mount bash tests/fresh/run.sh "$@"

# The mirror in this machine's own sources.
mirror() {
    sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb \(\[[^]]*\] \)\?\([^ ]*\) .*/\2/p' \
        /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null | head -n 1
}

# pip's settings on this machine, as variables: its files of settings are not read by another user.
pip_settings() {
    local name value
    python3 -m pip config list | sed -n "s/^[^.]*\.\([a-z-]*\)='\(.*\)'$/\1 \2/p" |
        while read -r name value; do
            [ "$name" = cert ] || echo "PIP_$(tr 'a-z-' 'A-Z_' <<<"$name")=$value"
        done
    env | grep -E '^([A-Za-z_]*(PROXY|proxy)|SSL_CERT_FILE|REQUESTS_CA_BUNDLE)=' || true
    [ -z "${SSL_CERT_FILE:-}" ] || echo "PIP_CERT=$SSL_CERT_FILE"
}

# Files and folders that those settings name; an index in a folder names files beside it.
pip_paths() {
    pip_settings | grep -oE "(file://)?/[^ '=]+" | sed 's|^file://\(.*\)/.*|\1|' | sort -u
}

# A minimal root file system, with the project in it.
build() { # SUITE PACKAGES
    local path log=$fresh/$name-debootstrap.log
    umount_all "$root"
    rm -rf "$root"
    mkdir -p "$fresh"
    debootstrap --variant=minbase --include="$2" "$1" "$root" "$(mirror)" >"$log" 2>&1 ||
        fail "debootstrap $1 failed: see $log"
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
    git ls-files -z --cached --others --exclude-standard |
        tar --null --ignore-failed-read -T - -c 2>/dev/null | tar -x -C "$root$project"
}

umount_all() { # ROOT
    local point
    while read -r point; do
        umount -l "$point"
    done < <(awk -v root="$1/" 'index($2, root) == 1 { print $2 }' /proc/self/mounts | sort -r)
}

# Words that start a command without network, but with the loopback interface, which every machine
# has.
loopback="import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh', b'lo', 0x41))"
# shellcheck disable=SC2016
alone=(unshare --net sh -c 'python3 -c "$0" && exec "$@"' "$loopback")

mapfile -t settings < <(pip_settings)
rows=()
# Run a command in the project, as after a new login: nothing of this environment reaches it but
# where pip finds packages. Ends the script if the command fails.
step() { # NAME COMMAND [WRAPPER ...]
    local what=$1 command=$2 start=$SECONDS log
    shift 2
    log=$fresh/$name-${what//[ \/]/-}.log
    printf '%s: %s ... ' "$name" "$what"
    if ! "$@" env -i "${settings[@]}" PATH=$system_path "${identity[@]}" \
        chroot "${user[@]}" "$root" sh -c "cd $project && $command" >"$log" 2>&1; then
        printf 'FAILED; the end of %s:\n' "$log"
        tail -n 30 "$log"
        exit 1
    fi
    rows+=("| $machine | $what | $((SECONDS - start)) s |")
    printf '%s s\n' $((SECONDS - start))
}

size() { # WHAT FOLDER
    rows+=("| $machine | $1 | $(du -sh "$2" | cut -f1), $(find "$2" -type f | wc -l) files |")
}

two_processes="OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc-per-node 2 \
    -m pipeline train digits_resnet20 name=two training.epochs=1"
two_tests="OMP_NUM_THREADS=1 .venv/bin/python -m pytest \
    tests/test_recipe.py tests/interpret/test_contributions.py"
short_demo=".venv/bin/coda train digits_resnet20 training.epochs=1 &&
    .venv/bin/coda train digits_coda_resnet20 training.epochs=1 &&
    .venv/bin/coda compare runs/digits_coda_resnet20 runs/digits_resnet20"
damage="rm -r .venv/lib/python3*/site-packages/numba .venv/lib/python3*/site-packages/timm/models"

bookworm() {
    machine="Debian 12, root, apt" user=() identity=(HOME=/root USER=root)
    build bookworm python3,make,git,ca-certificates
    step "demo with set-up" "make demo"
    tail -n 30 "$fresh/$name-demo-with-set-up.log"
    step "second demo" "make demo"
    step "doctor" ".venv/bin/coda doctor"
    step "two processes" "$two_processes"
    step "two tests" "$two_tests"
    size .venv "$root$project/.venv"
    step "set-up after two packages lost files" "$damage && make setup && .venv/bin/coda doctor"
    step "wheelhouse" "make wheelhouse"
    size wheelhouse "$root$project/wheelhouse"
    step "set-up without network" "make setup VENV=/other WHEELHOUSE=wheelhouse" "${alone[@]}"
}

trixie() {
    machine="Debian 13, a user, no apt" user=(--userspec=1234:1234)
    identity=(HOME=/home/user USER=user)
    build trixie python3,python3-venv,make,git,ca-certificates
    mkdir -p "$root/home/user"
    echo "user:x:1234:1234::/home/user:/bin/sh" >>"$root/etc/passwd"
    chown -R 1234:1234 "$root/home/user" "$root/project"
    find "$root"/{usr/,}{bin,sbin} -regextype posix-extended \
        -regex '.*/(apt|dpkg|sudo|ninja|g\+\+|gcc|cc)[^/]*' -delete 2>/dev/null || true
    step "set-up" "make setup"
    machine+=", home read-only, no network"
    mount --bind "$root/home/user" "$root/home/user"
    mount -o remount,bind,ro "$root/home/user"
    step "doctor" ".venv/bin/coda doctor" "${alone[@]}"
    step "short demo" "$short_demo" "${alone[@]}"
    step "two processes" "$two_processes" "${alone[@]}"
    step "two tests" "$two_tests" "${alone[@]}"
    size .venv "$root$project/.venv"
    size "the system beside it" "$root/usr"
}

container() {
    machine="the container's steps" user=() identity=(HOME=/root USER=root)
    build bookworm ca-certificates
    step "install/container.sh" "sh install/container.sh"
    step "doctor" "/opt/coda/bin/coda doctor"
    step "one epoch" "/opt/coda/bin/coda train digits_resnet20 training.epochs=1"
    # The folders in which pip found packages are not part of it.
    umount_all "$root"
    size "the image" "$root"
}

[ $# -gt 0 ] || set -- bookworm trixie container
for name; do
    root=$fresh/$name
    "$name"
    umount_all "$root"
done
printf '\n| machine | step | time or size |\n|---|---|---|\n'
printf '%s\n' "${rows[@]}"
