"""Control of the operation of a process, in memory that its server maps too.

The server stops an operation, and sees its progress, without a message: the process reads none
while it computes.
"""

from __future__ import annotations

import ctypes
import mmap

from els_kernels import Control

_NUMBER_AT = 1024
"""Apart from the control, whose cache lines the kernel writes."""


class SharedControl:
    """Control of one operation after another, and the number of the last that was stopped.

    Args:
        memory: of the server and the process.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self.control = Control(memory)
        self._stopped = ctypes.c_int64.from_buffer(memory, _NUMBER_AT)

    def begin(self, number: int) -> Control:
        """Return the control for an operation that the process begins; it may be stopped already.

        Numbers rise. A stop writes the number before the flag, which is cleared here before the
        number is read: none is lost.
        """
        self.control.resume()
        if self._stopped.value >= number:
            self.control.stop()
        return self.control

    def stop(self, number: int) -> None:
        """Stop an operation and all before it, begun or not."""
        self._stopped.value = max(self._stopped.value, number)
        self.control.stop()
