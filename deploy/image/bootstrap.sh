#!/bin/sh
# Makes the two bases from Debian 12 packages, for machines without a registry:
# localhost/els-base (Python) and localhost/els-build-base (with a compiler). Needs root.
set -eu
sources=${SOURCES:-/etc/apt/sources.list.d/debian.sources}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

base() { # NAME PACKAGES
    mmdebstrap --quiet --variant=minbase --include="$2" bookworm "$folder/$1.tar" "$sources"
    printf 'FROM scratch\nADD %s.tar /\nENV PATH=/usr/local/bin:/usr/bin:/bin\n' "$1" \
        >"$folder/Containerfile"
    buildah build --quiet --isolation=chroot --format=docker --tag "localhost/$1" "$folder"
}

base els-base python3,ca-certificates
base els-build-base python3-venv,python3-dev,g++,ca-certificates
