#!/usr/bin/env bash
# Guess: a callback of a future is gone once it has run, so `future.add_done_callback(queue.put)` hands a result over
# and leaves nothing behind: with the last reference to the queue the result is freed, by reference counts alone.
#
# Real behaviour: true of asyncio, whose futures empty their list of callbacks when they call them. One of
# concurrent.futures keeps them for good. A result that nobody takes from the queue, because its caller failed, was
# cancelled or had enough, is then in a cycle (future, bound method, queue, future), and its memory stays until the
# cyclic collector happens to look at that generation.
# Version: CPython 3.11 (standard library; no package).
# Source: Lib/concurrent/futures/_base.py, Future._invoke_callbacks, beside Lib/asyncio/futures.py,
# __schedule_callbacks.
# Bitten: whoever gathers large answers of threads, processes or Ray (ObjectRef.future()) by callbacks, with a collector
# that is frozen, tuned down or simply rare; the arrays are no objects that it counts. A callback that puts a key, not
# the future, makes no cycle.
#
# Output seen:
#   concurrent.futures: the future in the queue: kept; a key in the queue: freed
#   asyncio:            the future in the queue: freed; a key in the queue: freed
#
# Exits 1 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 - <<'PYTHON'
import asyncio
import concurrent.futures
import gc
import sys
import weakref
from queue import SimpleQueue

gc.disable()


class Answer(bytearray):
    """A megabyte that can be referred to weakly."""


def ask(future, key):
    """Return a reference to an answer that no one takes from the queue."""
    answers, answer = SimpleQueue(), Answer(1 << 20)
    future.add_done_callback(answers.put if key is None else lambda _: answers.put(key))
    future.set_result(answer)
    return weakref.ref(answer)


def of_threads(key):
    return ask(concurrent.futures.Future(), key)() is not None


async def of_loop(key):
    kept = ask(asyncio.get_running_loop().create_future(), key)
    await asyncio.sleep(0)  # callbacks run
    return kept() is not None


found = {
    "concurrent.futures": [of_threads(key) for key in (None, 0)],
    "asyncio": [asyncio.run(of_loop(key)) for key in (None, 0)],
}
for name, (future, key) in found.items():
    words = ["kept" if kept else "freed" for kept in (future, key)]
    print(f"{name + ':':19} the future in the queue: {words[0]}; a key in the queue: {words[1]}")
sys.exit(0 if found == {"concurrent.futures": [True, False], "asyncio": [False, False]} else 1)
PYTHON
