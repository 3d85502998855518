"""Pictures that Pillow opens as 8-bit grey or RGB although the file says more than that."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

_SIDE = 2
_TIFF_BITS, _TIFF_STRIPS, _TIFF_LENGTHS = 258, 273, 279


def _png(bits: int, colour: int, row: bytes, key: bytes = b"") -> bytes:
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", _SIDE, _SIDE, bits, colour, 0, 0, 0)]
    chunks += [b"tRNS" + key] if key else []
    chunks += [b"IDAT" + zlib.compress((b"\0" + row) * _SIDE), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def _tiff(planes: int) -> bytes:
    """A TIFF of 16-bit RGB in one strip, or in one for each of three planes."""
    start, size = 8 + 2 + 12 * 10 + 4, 2 * _SIDE**2 * (1 if planes == 3 else 3)
    strips = start + 6
    data = strips + (24 if planes == 3 else 0)
    tags = [(256, 1, _SIDE), (257, 1, _SIDE), (_TIFF_BITS, 3, start), (259, 1, 1), (262, 1, 2)]
    tags += [(_TIFF_STRIPS, planes, strips if planes == 3 else data), (277, 1, 3), (278, 1, _SIDE)]
    tags += [(_TIFF_LENGTHS, planes, strips + 12 if planes == 3 else size)]
    tags += [(284, 1, 2 if planes == 3 else 1)]
    long = (_TIFF_STRIPS, _TIFF_LENGTHS)
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in long else 3, count, value)
        for tag, count, value in tags
    )
    listed = [data + size * plane for plane in range(3)] + [size] * 3 if planes == 3 else []
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head + struct.pack(f"<3H{len(listed)}I", 16, 16, 16, *listed) + bytes(size * planes)


DEEP = {
    "rgb.png": _png(16, 2, bytes(6 * _SIDE)),
    "rgba.png": _png(16, 6, b"\xff" * 8 * _SIDE),
    "grey-alpha.png": _png(16, 4, b"\xff" * 4 * _SIDE),
    "rgb.ppm": b"P6 2 2 65535\n" + bytes(24),
    "plain.ppm": b"P3 1 1 65535\n1 2 3\n",
    "rgb.tiff": _tiff(1),
    "planes.tiff": _tiff(3),
}
"""name → content; 16 bits a channel."""

KEYED = {
    "two-bits.png": _png(2, 0, b"\x40", struct.pack(">H", 1)),
    "grey.png": _png(8, 0, b"\1\2", struct.pack(">H", 1)),
    "rgb.png": _png(8, 2, b"\1\2\3" * _SIDE, struct.pack(">HHH", 1, 2, 3)),
}
"""name → content; one colour of the picture is transparent."""


def write(folder: Path, pictures: dict[str, bytes], name: str) -> Path:
    """Write one of the pictures and return its path."""
    (folder / name).write_bytes(pictures[name])
    return folder / name
