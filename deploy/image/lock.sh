#!/bin/sh
# Regenerates locks/*.txt: every package with its version and the hashes of its files.
# Needs pip-tools of Python 3.11 on Linux. Packages come from pip's configured indexes, which are not
# written down. For CPU these must have torch's CPU build; for GPU only variables are used
# (PIP_INDEX_URL), as the hash of a CPU build beside CUDA's would be locked, too.
set -eu
cd "$(dirname "$0")/../.."
locks=deploy/image/locks

lock() { # NAME ARGUMENTS…
    name=$1 && shift
    pip-compile --quiet --strip-extras --allow-unsafe --generate-hashes --no-header --no-annotate \
        --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
        --output-file "$locks/$name.txt" "$@"
}

kinds="--extra server --extra web --extra tracing --extra onnx --extra diffusers"
lock tools "$locks/tools.in"
# shellcheck disable=SC2086  # the options are several words
lock cpu $kinds --extra openvino pyproject.toml
# What both have is of one version: pins that are there are kept.
cp "$locks/cpu.txt" "$locks/ray.txt"
# shellcheck disable=SC2086
lock ray $kinds --extra openvino --extra ray pyproject.toml
export PIP_CONFIG_FILE=/dev/null
unset PIP_FIND_LINKS PIP_EXTRA_INDEX_URL
# shellcheck disable=SC2086
lock gpu $kinds --extra gpu --constraint "$locks/gpu.in" pyproject.toml
