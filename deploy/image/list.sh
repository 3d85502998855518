#!/bin/sh
# Lists the contents of /opt/els: a CycloneDX bill of materials, and the text of every licence.
set -eu
out=/usr/share/doc/els-denoise
mkdir -p "$out"
/opt/tools/bin/cyclonedx-py environment --output-reproducible --output-format JSON \
    --output-file "$out/sbom.cdx.json" /opt/els/bin/python
/opt/tools/bin/pip-licenses --python=/opt/els/bin/python --from=mixed --format=plain-vertical \
    --with-system --with-urls --with-license-file --with-notice-file --no-license-path \
    --output-file="$out/THIRD_PARTY.txt"
