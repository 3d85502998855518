#!/usr/bin/env bash
# Guess: a `bytes` field whose JSON is no base64 is a ParseError, as a wrong number or enum value is.
#
# Real behaviour: Python's json_format decodes with base64.urlsafe_b64decode, which DROPS every character
# outside of the alphabet and everything after padding. "%%%%" becomes no bytes, "A*Q*I*D" the bytes of
# "AQID". A document that was damaged on its way, or whose sender mixed up fields, is accepted with
# other bytes.
# Version: protobuf 7.36.2, CPython 3.11.
# Source: _ConvertScalarFieldValue of google/protobuf/json_format.py; base64.b64decode documents that
# characters outside of the alphabet are discarded unless validate=True.
# Bitten: gateways from JSON to gRPC in Python that leave validation to the parser; tensors and signatures
# in base64.
#
# Output seen:
#   "AQID" → b'\x01\x02\x03'
#   "A*Q*I*D" → b'\x01\x02\x03'
#   "%%%%" → b''
#   "AQ=ID" → b'\x01\x02\x03'
#
# Exits 1 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet protobuf==7.36.2
"$folder/venv/bin/python" - <<'PYTHON'
import sys

from google.protobuf import json_format, wrappers_pb2

found = []
for text in ('"AQID"', '"A*Q*I*D"', '"%%%%"', '"AQ=ID"'):
    message = wrappers_pb2.BytesValue()
    try:
        json_format.Parse(text, message)
    except json_format.ParseError as error:
        print(f"{text}: {error}")
    else:
        found.append(message.value)
        print(f"{text} → {message.value}")
sys.exit(0 if found == [b"\1\2\3", b"\1\2\3", b"", b"\1\2\3"] else 1)
PYTHON
