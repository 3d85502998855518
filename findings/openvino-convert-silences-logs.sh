#!/usr/bin/env bash
# Guess: openvino.convert_model(..., verbose=False) prints nothing of its own. The application's log is the
# application's: converting a model in a background thread changes nothing for others.
#
# Real behaviour: while it works it sets the level of Python's ROOT logger to ERROR and adds a filter to it, and
# restores both at the end. Every record of INFO and WARNING of every other thread whose logger has no level of
# its own, so nearly all, is dropped meanwhile, for seconds with a large network. Two conversions at once restore
# each other's state: the one that began second saw ERROR, and if it ends last the level stays ERROR for good.
# Version: openvino 2026.4.1, CPython 3.11, Linux x86-64.
# Source: openvino/tools/ovc/convert_impl.py (get_logger_state, init_logger, restore_logger_state), logger.py.
# Bitten: servers that load models while they serve; whoever looks for a fault of the minute in which a model was
# loaded. The frontends do not do it: FrontEndManager().load_by_framework("onnx"), or Core.read_model.
#
# Output seen:
#   before:           root level WARNING
#   while converting: root level ERROR; of a thread's warnings 0 reached the handler
#   two at once:      root level ERROR afterwards
#
# Exits 1 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 onnx==1.23.2
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import logging
import sys
import threading

# No reports to the vendor, see openvino-import-reports.sh.
sys.modules["openvino_telemetry"] = None

import openvino
from onnx import TensorProto, helper, save
from openvino.tools.ovc import convert_impl

path = f"{sys.argv[1]}/net.onnx"
x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "xy")
save(helper.make_model(helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "g", [x], [y])), path)

root, reached = logging.getLogger(), []


class Kept(logging.Handler):
    def emit(self, record):
        reached.append(record)


root.addHandler(Kept())
level = logging.getLevelName
before = level(root.level)
print(f"before:           root level {before}")

# Something of the conversion is held up, as if the network were large, while other threads go on.
prepare, inside, go_on = convert_impl.prepare_ir, threading.Semaphore(0), [threading.Event() for _ in "ab"]
waiting = iter(go_on)


def held(argv):
    event = next(waiting, None)
    inside.release()
    if event:
        event.wait()
    return prepare(argv)


convert_impl.prepare_ir = held


def start():
    thread = threading.Thread(target=openvino.convert_model, args=(path,))
    thread.start()
    inside.acquire()
    return thread


first = start()
during = level(root.level)
other = threading.Thread(target=lambda: logging.getLogger("server").warning("disk is full"))
other.start()
other.join()
print(f"while converting: root level {during}; of a thread's warnings {len(reached)} reached the handler")
second = start()
go_on[0].set()
first.join()
go_on[1].set()
second.join()
after = level(root.level)
print(f"two at once:      root level {after} afterwards")
sys.exit((before, during, len(reached), after) != ("WARNING", "ERROR", 0, "ERROR"))
PYTHON
