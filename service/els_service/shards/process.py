"""Process of a shard: ``python -m els_service.shards.process FD MEMORY``, started by ``local``.

FD is one end of a pair of Unix sockets, MEMORY a file of shared memory for answers. The process
ends when the other end is closed, in the middle of a computation too, so that none outlives its
server.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import sys
import threading
import time
from queue import SimpleQueue

from els_kernels import ComputationStoppedError, Control
from els_service.errors import ElsError
from els_service.shards.messages import ClosedError, Message, receive, send
from els_service.shards.part import BankPart, PartSpec

BEAT_S = 0.25
"""Seconds between two reports of the progress of a computation."""


class _Process:
    """Answers the messages of one connection, one after another."""

    def __init__(self, connection: socket.socket, shared: mmap.mmap) -> None:
        self._connection, self._shared = connection, shared
        self._jobs: SimpleQueue[tuple[Message, Control]] = SimpleQueue()
        self._sending = threading.Lock()
        self._asked: dict[int, Control] = {}
        self._part: BankPart | None = None

    def run(self) -> None:
        """Read messages until the connection is closed."""
        for work in (self._work, self._report):
            threading.Thread(target=work, daemon=True).start()
        while True:
            message = receive(self._connection)
            if message.op == "stop":
                control = self._asked.get(message.number)
                if control is not None:
                    control.stop()
            else:
                control = self._asked[message.number] = Control()
                self._jobs.put((message, control))

    def _work(self) -> None:
        while True:
            message, control = self._jobs.get()
            try:
                with control:
                    answer = self._answer(message)
            except Exception as error:
                answer = failure(error, message.number)
            self._send(answer)
            del self._asked[message.number], message, answer

    def _answer(self, message: Message) -> Message:
        if message.op == "load":
            self._part = BankPart(PartSpec.of(message.fields))
            message = Message("sums", number=message.number)
        assert self._part is not None, "load comes first"
        return self._part.answer(message)

    def _report(self) -> None:
        while True:
            time.sleep(BEAT_S)
            asked = list(self._asked.values())
            if asked:
                progress = sum(control.progress for control in asked)
                self._send(Message("beat", {"progress": progress, "cpu_s": time.process_time()}))

    def _send(self, message: Message) -> None:
        with self._sending:
            send(self._connection, message, self._shared)


def failure(error: Exception, number: int) -> Message:
    """Return the answer that says why an operation failed, in plain values."""
    if isinstance(error, ComputationStoppedError):
        kind = "stopped"
    else:
        kind = "memory" if isinstance(error, MemoryError) else "failed"
    text = (
        str(error) if isinstance(error, ElsError | OSError) else f"{type(error).__name__}: {error}"
    )
    return Message("failure", {"kind": kind, "text": text}, number=number)


def main() -> None:
    """Serve the connection and the memory whose file descriptors are the arguments."""
    # A terminal sends Ctrl-C to all; the server ends its shards itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    shared = mmap.mmap(int(sys.argv[2]), 0)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        try:
            _Process(connection, shared).run()
        except (ClosedError, OSError):
            # Not at the end of a computation: no one waits for it.
            os._exit(0)


if __name__ == "__main__":
    main()
