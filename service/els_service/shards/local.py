"""Shards in processes of this machine, restarted when they end or hang."""

from __future__ import annotations

import logging
import math
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

from els_service.shards.messages import (
    SHARED_BYTES,
    Array,
    ClosedError,
    Message,
    Receiver,
    numbered,
    send,
)
from els_service.shards.part import PartSpec
from els_service.shards.shard import ShardLostError, error_of
from els_service.shards.shared_control import SharedControl

_log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.05, 10.0
"""Seconds before a restart, doubled by each that fails before the shard is ready."""
_LEAST_SHARE = 0.01
"""Share of a core that counts as progress of a shard."""
_POLL_S = 0.5
_LOAD_S = 120.0
"""Seconds without progress after which a start counts as hung: imports report none."""


class LocalShard:
    """Process with a part of a bank, and the thread that keeps one running.

    Args:
        name: index of the shard.
        spec: what it loads.
        stall_s: seconds without progress after which a computation or a load counts as hung.
    """

    def __init__(self, name: str, spec: PartSpec, stall_s: float) -> None:
        self.name, self._spec, self._stall_s = name, spec, stall_s
        self.restarts, self.reason = 0, ""
        self.pid = 0
        """Of the current process."""
        self.sums: Future[Array] = Future()
        """Sums of its blocks, [K, 1 + C]; fails with what the first load failed with."""
        self._centre: Array | None = None
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._control: SharedControl | None = None
        self._pending: dict[int, Future[Message]] = {}
        self._ready = threading.Event()
        self._closed = threading.Event()
        self._sending = threading.Lock()
        self._seen: tuple[int, float] = (0, 0.0)
        self._thread = threading.Thread(target=self._keep, name=f"els-shard-{name}", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether its slice is loaded and it can be asked."""
        return self._ready.is_set()

    def ask(self, operation: Message) -> Future[Message]:
        """Return the future answer of an operation; see ``Shard``."""
        answer = Future[Message]()
        with self._lock:
            connection = self._connection if self._ready.is_set() else None
            if connection is None:
                answer.set_exception(ShardLostError(self._lost()))
                return answer
            self._pending[operation.number] = answer
        self._send(connection, operation)
        return answer

    def stop(self, number: int) -> None:
        """Stop an operation between two tiles."""
        control = self._control
        if control is not None and number in self._pending:
            control.stop(number)

    def keep(self, centre: Array) -> None:
        """Pack the bank about its centre after every restart."""
        self._centre = centre

    def close(self) -> None:
        """End the process."""
        self._closed.set()
        connection = self._connection
        if connection is not None:
            # Wakes the reading thread, which a close does not.
            _shut(connection)

    def _lost(self) -> str:
        return f"shard {self.name} is not ready{self.reason and ': '}{self.reason}"

    def _send(self, connection: socket.socket, message: Message) -> None:
        try:
            with self._sending:
                send(connection, message)
        except OSError:
            # The reading thread finds the connection closed, and fails what was asked.
            _shut(connection)

    def _keep(self) -> None:
        """Start processes, one after another, until the shard is closed."""
        pause_s = _FIRST_PAUSE_S
        while not self._closed.is_set():
            was_ready = self._serve()
            if self._closed.is_set():
                return
            if not self.sums.done():
                # The first load, for which its caller waits.
                self.sums.set_exception(ShardLostError(self._lost()))
                return
            pause_s = _FIRST_PAUSE_S if was_ready else min(2 * pause_s, _MOST_PAUSE_S)
            extra = {"shard": self.name, "reason": self.reason}
            _log.warning("shard lost, starting it again", extra=extra)
            self.restarts += 1
            self._closed.wait(pause_s)

    def _serve(self) -> bool:
        """Start a process and read its messages until it ends; return whether it was ready."""
        own, other = socket.socketpair()
        # A clean start: a fork would have the threads' locks, and the server's memory.
        memory = os.memfd_create("els-shard")
        os.ftruncate(memory, SHARED_BYTES)
        shared = mmap.mmap(memory, SHARED_BYTES)
        given = [other.fileno(), memory]
        command = [sys.executable, "-m", "els_service.shards.process", *map(str, given)]
        process = subprocess.Popen(
            command, pass_fds=given, stdin=subprocess.DEVNULL, start_new_session=True
        )
        other.close()
        os.close(memory)
        self.pid, self._connection, self._control = process.pid, own, SharedControl(shared)
        reader = _Reader(self, own, shared)
        try:
            self._load(own, reader)
            while True:
                reader.step()
        except (ClosedError, OSError) as error:
            self.reason = str(error)
        except ShardLostError as error:
            self.reason = str(error)
        finally:
            was_ready = self._ready.is_set()
            self._end(process, own)
        return was_ready

    def _load(self, own: socket.socket, reader: _Reader) -> None:
        """Load the slice, pack it if it was packed before, and be ready."""
        sums = self._wait(own, reader, numbered("load", self._spec.fields))
        if self._centre is not None:
            self._wait(own, reader, numbered("prepare", arrays=[self._centre]))
        self.reason = ""
        self._ready.set()
        if not self.sums.done():
            self.sums.set_result(sums.arrays[0])

    def _wait(self, own: socket.socket, reader: _Reader, message: Message) -> Message:
        answer = self._pending[message.number] = Future[Message]()
        self._send(own, message)
        while not answer.done():
            reader.step()
        error = answer.exception()
        if error is not None:
            raise ShardLostError(str(error))
        return answer.result()

    def _end(self, process: subprocess.Popen[bytes], own: socket.socket) -> None:
        with self._lock:
            self._ready.clear()
            self._connection = None
            pending, self._pending = self._pending, {}
        own.close()
        # Also one that is stopped by a signal.
        process.kill()
        code = process.wait()
        if code and not self._closed.is_set():
            self.reason = f"its process ended with {code}: {self.reason}"
        for answer in pending.values():
            answer.set_exception(ShardLostError(self._lost()))

    def take(self, message: Message) -> bool:
        """Take what the process sent; return whether that is progress."""
        if message.op == "beat":
            progress, cpu_s = message.fields["progress"], message.fields["cpu_s"]
            seen, seen_cpu_s = self._seen
            if progress == seen and cpu_s - seen_cpu_s < _LEAST_SHARE * _POLL_S:
                return False
            self._seen = progress, cpu_s
            return True
        answer = self._pending.pop(message.number, None)
        if answer is not None and message.op == "failure":
            answer.set_exception(error_of(message))
        elif answer is not None:
            answer.set_result(message)
        return True

    @property
    def silence_s(self) -> float:
        """Seconds without progress after which the process counts as hung; infinite if idle."""
        if not self._pending:
            return math.inf
        return self._stall_s if self._ready.is_set() else max(self._stall_s, _LOAD_S)


class _Reader:
    """Reads the messages of one process, and judges its silence."""

    def __init__(self, shard: LocalShard, connection: socket.socket, shared: mmap.mmap) -> None:
        self._shard, self._receiver = shard, Receiver(connection, shared)
        self._at, self._idle_s = time.monotonic(), 0.0

    def step(self) -> None:
        """Take the next message.

        Raises:
            ClosedError: The process closed the connection.
            ShardLostError: It was asked and makes no progress.
        """
        message = self._receiver.receive(self._judge)
        if self._shard.take(message):
            self._idle_s = 0.0
        self._judge()

    def _judge(self) -> None:
        now = time.monotonic()
        passed_s, self._at = now - self._at, now
        limit_s = self._shard.silence_s
        # No more than a poll at a time: this process itself may have been suspended.
        self._idle_s = 0.0 if limit_s == math.inf else self._idle_s + min(passed_s, _POLL_S)
        if self._idle_s >= limit_s:
            raise ShardLostError(f"it made no progress for {limit_s:g} s")


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed already
