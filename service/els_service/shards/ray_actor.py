"""Actor of a shard on a node of a Ray cluster; nothing here needs Ray.

Its slice of the bank is read from the file in the actor, whenever Ray starts it: banks never pass
through the object store. Messages are framed bytes, and failures are among them as plain values, as
errors lose their class between processes.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import torch

from els_kernels import Control
from els_service.shards.messages import Message, encode, parse
from els_service.shards.part import BankPart, PartSpec
from els_service.shards.process import failure


class ShardActor:
    """Part of a bank. ``answer`` is called one at a time, the others at any time beside it.

    Args:
        fields: of its ``PartSpec``.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        self._spec = PartSpec.of(fields)
        self._part: BankPart | None = None
        self._asked: dict[int, Control] = {}
        self._stopped: set[int] = set()
        self._lock = threading.Lock()
        self._prepared = False
        self.fault = ""
        self._load()

    def answer(self, frame: bytes, centre: bytes) -> bytes:
        """Return the framed answer to a framed operation.

        Args:
            frame: of the operation.
            centre: of the whole bank, float64, about which an actor that was started again packs;
                empty if it was not packed.
        """
        message = parse(frame)
        control = Control()
        with self._lock:
            self._asked[message.number] = control
            if message.number in self._stopped:
                control.stop()
        try:
            with control:
                found = self._answer(message, centre)
        except Exception as error:
            found = failure(error, message.number)
        finally:
            with self._lock:
                del self._asked[message.number]
                self._stopped.discard(message.number)
        return b"".join(bytes(part) for part in encode(found))

    def stop(self, number: int) -> None:
        """Stop an operation between two tiles; to cancel a call of Ray would not free the actor."""
        with self._lock:
            control = self._asked.get(number)
            if control is None:
                self._stopped.add(number)
            else:
                control.stop()

    def state(self) -> dict[str, Any]:
        """Return the process, its progress, and why its slice is not loaded, if it is not."""
        asked = list(self._asked.values())
        return {
            "pid": os.getpid(),
            "busy": bool(asked),
            "progress": sum(control.progress for control in asked),
            "cpu_s": time.process_time(),
            "fault": self.fault,
        }

    def _load(self) -> None:
        try:
            self._part, self.fault = BankPart(self._spec), ""
        except Exception as error:
            # An actor whose construction fails is not started again.
            self.fault = str(error)

    def _answer(self, message: Message, centre: bytes) -> Message:
        if self._part is None:
            self._load()
        if self._part is None:
            return Message("failure", {"kind": "lost", "text": self.fault}, number=message.number)
        if centre and not self._prepared and message.op != "prepare":
            known = torch.frombuffer(bytearray(centre), dtype=torch.float64)
            self._part.answer(Message("prepare", arrays=[known.numpy()]))
            self._prepared = True
        answer = self._part.answer(message)
        self._prepared = self._prepared or message.op == "prepare"
        return answer
