#!/bin/sh
# Installs packages of the distribution: apt-install.sh PACKAGE...
set -eu
apt-get update --quiet
DEBIAN_FRONTEND=noninteractive exec apt-get install --quiet --yes --no-install-recommends "$@"
