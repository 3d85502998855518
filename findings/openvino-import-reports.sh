#!/usr/bin/env bash
# Guess: `import openvino` loads a library. Nothing is sent anywhere, least of all without being asked.
#
# Real behaviour: importing it starts a forked child process (multiprocessing) that posts an event to
# www.google-analytics.com, and writes a random client id to ~/intel. The wheel requires openvino-telemetry, and
# `openvino.tools.ovc`, which `import openvino` imports for convert_model, sends `import / general_import` with
# enable_opt_in_dialog=False: then no consent file in the home means yes. Errors are swallowed, so without a
# network one sees nothing but a child. Only a CI (some variables are looked at) or `opt_in_out --opt_out` stops
# it; so does a missing package: `sys.modules["openvino_telemetry"] = None` before the import selects its stub.
# Version: openvino 2026.4.1, openvino-telemetry 2025.2.0, CPython 3.11, Linux x86-64.
# Source: openvino/tools/ovc/__init__.py, telemetry_utils.py; openvino_telemetry/main.py, backend/backend_ga4.py.
# Bitten: servers that import it in a process with threads, such as gRPC's (a fork there may hang, and inherits
# listening sockets); containers with a read-only home; networks where an unexpected connection is an incident.
#
# The script lets nothing out: HTTPS goes to a proxy on 127.0.0.1 that notes the address and hangs up.
#
# Output seen:
#   import openvino:               asks for www.google-analytics.com:443, writes intel/openvino_ga_cid
#   import openvino with the stub: asks for nothing, writes nothing
#
# Exits 1 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 openvino-telemetry==2025.2.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

folder = Path(sys.argv[1])
listener = socket.create_server(("127.0.0.1", 0))
proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
asked = []


def note():
    while True:
        connection, _ = listener.accept()
        with connection:
            asked.append(connection.recv(1000).split()[1].decode())


threading.Thread(target=note, daemon=True).start()
stub = "import sys; sys.modules['openvino_telemetry'] = None; "
found = {}
for name, first in (("import openvino:", ""), ("import openvino with the stub:", stub)):
    asked.clear()
    home = folder / f"home-{len(found)}"
    home.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "https_proxy": proxy}
    # The executor of its sender is joined at exit, and its child after three seconds.
    subprocess.run(
        [sys.executable, "-c", f"{first}import openvino"], env=environment, check=True, timeout=60
    )
    written = sorted(str(path.relative_to(home)) for path in home.rglob("*cid"))
    found[name] = sorted(set(asked)), written
    print(f"{name:30} asks for {' '.join(found[name][0]) or 'nothing'},", end=" ")
    print(f"writes {' '.join(written) or 'nothing'}")
(hosts, written), (none, nothing) = found.values()
sys.exit(not (hosts == ["www.google-analytics.com:443"] and written and not none and not nothing))
PYTHON
