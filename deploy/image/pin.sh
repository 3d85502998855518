#!/bin/sh
# Pins the Containerfile's bases to the current digests of their tags: pin.sh [REGISTRY/PATH/]
# Needs skopeo and a registry; the argument is a prefix of the names, for a mirror.
set -eu
file=$(dirname "$0")/Containerfile
for argument in BASE BUILD_BASE; do
    name=$(sed -n "s/^ARG $argument=\([^@]*\).*/\1/p" "$file")
    digest=$(skopeo inspect --format '{{.Digest}}' "docker://${1:-}$name")
    sed -i "s|^ARG $argument=.*|ARG $argument=$name@$digest|" "$file"
    echo "$argument=$name@$digest"
done
