"""Speed of the native kernel against the torch path and against SDPA on unfolded patches.

All contenders run in one process, alternating. Work is counted in pairs (query pixel, source);
``gpairs`` is 1e9 pairs per second of wall time, ``gpairs_cpu`` per second of CPU time with all
threads busy, which is meaningful on a machine with other jobs, too. Both are of the fastest run.
Slow contenders have a smaller bank. Results are compared before timing.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad, scaled_dot_product_attention, unfold

from benchmarks.kernels.naive import in_process
from els_kernels import GEOMETRIES, Posterior, count_pairs
from els_kernels.attention import Implementation
from els_kernels.native import Native
from els_kernels.torch_tiled import Tiled

Row = dict[str, Any]

WINDOWS = (3, 5, 7, 9, 11, 13, 17, 21, 25)
PEER_WINDOWS = (3, 5, 9, 11, 17, 25)
KEOPS_WINDOWS = (5, 11)
"""Windows for KeOps: each is a separate formula, which takes half a minute to compile."""
PEER_WORK = 4e8
"""Pairs of a contender's run at k = 1; fewer for larger k²C, for about a second per run."""


@dataclass(frozen=True)
class Setting:
    """One shape of images and bank at one noise level."""

    images: int
    channels: int
    side: int
    t: float = 0.5

    def bank(self, images: int) -> Tensor:
        """Return smooth random images in [-1, 1]."""
        noise = torch.rand(images, self.channels, self.side + 4, self.side + 4)
        return avg_pool2d(noise * 6 - 3, 5, 1).clamp(-1, 1)

    def level(self) -> tuple[float, float]:
        """Return the scales a and s of signal and noise (cosine schedule)."""
        a = math.cos(math.pi * self.t / 2 / 1.008)
        return a, math.sqrt(1 - a * a)

    def query(self, bank: Tensor, batch: int = 1) -> Tensor:
        """Return noisy images of the bank."""
        a, s = self.level()
        clean = bank[torch.arange(batch) % len(bank)]
        return a * clean + s * torch.randn_like(clean)


@dataclass
class Clock:
    """The fastest of several runs, in wall seconds and in processor seconds of all threads."""

    seconds: float = math.inf
    cpu_seconds: float = math.inf

    def time(self, work: Callable[[], object]) -> None:
        """Time one more run."""
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        self.seconds = min(self.seconds, time.perf_counter() - wall)
        self.cpu_seconds = min(self.cpu_seconds, time.process_time() - cpu)

    def rates(self, pairs: int) -> Row:
        """Return the rates for this number of pairs per run."""
        busy = self.cpu_seconds / torch.get_num_threads()
        return {
            "seconds": self.seconds,
            "gpairs": pairs / self.seconds / 1e9,
            "gpairs_cpu": pairs / busy / 1e9,
        }


def attend(
    implementation: Implementation,
    setting: Setting,
    x: Tensor,
    images: int,
    k: int,
    machine: str,
    padding: str = "zeros",
) -> Posterior:
    """Return the posterior of an implementation for a batch at one level and window."""
    a, s = setting.level()
    batch = len(x)
    geometry = GEOMETRIES[machine, padding]
    ranges = [(0, images)] * batch
    return implementation(x, [a] * batch, [s] * batch, [k] * batch, ranges, geometry)


def mean(
    implementation: Implementation, setting: Setting, x: Tensor, images: int, k: int
) -> Tensor:
    """Return the mean of the circular ELS machine."""
    return attend(implementation, setting, x, images, k, "els", "circular").mean


def run_all(works: list[Callable[[], object]]) -> None:
    """Run them one after another."""
    for work in works:
        work()


def patches(images: Tensor, k: int) -> Tensor:
    """Return every patch on the torus, [N·H·W, C·k²]."""
    r = k // 2
    wrapped = pad(images, (r, r, r, r), mode="circular")
    return unfold(wrapped, k).transpose(1, 2).flatten(0, 1).contiguous()


def sdpa(setting: Setting, x: Tensor, bank: Tensor, k: int) -> Callable[[], Tensor]:
    """Return attention over unfolded patches on the torus, the keys' norms as one more column.

    Values are padded to the keys' depth: otherwise torch uses a kernel that writes all logits to
    memory, and takes up to four times as long.
    """
    a, s = setting.level()
    keys, queries = patches(bank, k), patches(x, k) * (a / s / s)
    norms = keys.square().sum(1, keepdim=True) * (-a * a / s / s / 2)
    keys = torch.cat([keys, norms], 1)[None, None]
    queries = torch.cat([queries, torch.ones(len(queries), 1)], 1)[None, None]
    values = torch.zeros_like(keys)
    values[0, 0, :, : setting.channels] = bank.flatten(2).transpose(1, 2).flatten(0, 1)

    def attend_once() -> Tensor:
        answer = scaled_dot_product_attention(queries, keys, values, scale=1.0)
        return answer[0, 0, :, : setting.channels].T.reshape(x.shape)

    return attend_once


def keops(setting: Setting, x: Tensor, bank: Tensor, k: int) -> Callable[[], Tensor]:
    """Return the same by a KeOps reduction, which does not store the logits; compiles first."""
    from pykeops.torch import LazyTensor

    (a, s), keys = setting.level(), patches(bank, k)
    values = bank.flatten(2).transpose(1, 2).flatten(0, 1).contiguous()
    query, key = LazyTensor(patches(x, k)[:, None]), LazyTensor(a * keys[None])
    logits = -((query - key) ** 2).sum(-1) / (2 * s * s)

    def attend_once() -> Tensor:
        answer: Tensor = logits.sumsoftmaxweight(LazyTensor(values[None]), axis=1)
        return answer.T.reshape(x.shape)

    return attend_once


def agree(got: Tensor, want: Tensor, what: str) -> None:
    """Raise RuntimeError unless two contenders give the same mean."""
    error = float((got - want).norm() / want.norm())
    if not error < 1e-3:
        raise RuntimeError(f"{what}: relative error {error:.1e}, not timed")


def native_rates(setting: Setting, repeats: int) -> Iterator[Row]:
    """Yield the native kernel's rate at every window, on the torus and boundary-broken."""
    bank = setting.bank(setting.images)
    native, x = Native(bank), setting.query(bank)
    for padding in ("circular", "zeros"):
        for k in WINDOWS:
            clock = Clock()
            for _ in range(repeats):
                clock.time(partial(attend, native, setting, x, len(bank), k, "els", padding))
            geometry = GEOMETRIES["els", padding]
            pairs = len(bank) * count_pairs(geometry, setting.side, setting.side, k)
            yield {**asdict(setting), "padding": padding, "k": k, **clock.rates(pairs)}


def compare(setting: Setting, repeats: int) -> Iterator[Row]:
    """Yield the rates of the contenders on the torus, the native kernel's beside each."""
    bank = setting.bank(setting.images)
    native, x = Native(bank), setting.query(bank)
    for k in PEER_WINDOWS:
        pairs = count_pairs(GEOMETRIES["els", "circular"], setting.side, setting.side, k)
        depth = k * k * setting.channels
        few = bank[: max(16, int(PEER_WORK / (1 + depth / 100) / pairs))]
        ours = partial(attend, native, setting, x, len(bank), k, "els", "circular")
        want = attend(native, setting, x, len(few), k, "els", "circular").mean
        tiled = Tiled(few)
        contenders: dict[str, Callable[[], Tensor]] = {
            "torch": partial(mean, tiled, setting, x, len(few), k),
            "sdpa": sdpa(setting, x, few, k),
        }
        if find_spec("pykeops") and k in KEOPS_WINDOWS:
            contenders["pykeops"] = keops(setting, x, few, k)
        row: Row = {**asdict(setting), "k": k, "peer_images": len(few)}
        for name, run in contenders.items():
            agree(want, run(), f"native and {name}, k={k}")
            mine, theirs = Clock(), Clock()
            for _ in range(repeats):
                theirs.time(run)
                mine.time(ours)
            fast, slow = mine.rates(pairs * len(bank)), theirs.rates(pairs * len(few))
            row[name] = slow
            row[f"native_beside_{name}"] = fast
            row[f"speedup_over_{name}"] = fast["gpairs"] / slow["gpairs"]
            row[f"speedup_over_{name}_cpu"] = fast["gpairs_cpu"] / slow["gpairs_cpu"]
        yield row


def peak_mib(setting: Setting, machine: str, k: int, batch: int) -> float:
    """Return the peak memory of a batch in addition to the bank, in MiB: for a new process.

    Creating a bank takes more memory than a batch: free memory is returned to the system and the
    high-water mark reset (proc(5), clear_refs). This is not possible after an earlier batch, hence
    the new process.
    """
    bank = setting.bank(setting.images)
    native, x = Native(bank), setting.query(bank, batch)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    attend(native, setting, x, len(bank), k, machine)
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status: expected a field {field}, got none")


def batches(repeats: int) -> Iterator[Row]:
    """Yield the time of a batch of 16 relative to its images one by one, and its memory."""
    for images, channels, side, machine, k in (
        (500, 1, 28, "els", 9),
        (1000, 3, 32, "els", 17),
        (5000, 1, 28, "els", 17),
        (20000, 3, 32, "local", 9),
        (20000, 3, 32, "ideal", 1),
    ):
        setting = Setting(images, channels, side)
        bank = setting.bank(images)
        native, x = Native(bank), setting.query(bank, 16)
        together, apart = Clock(), Clock()
        members: list[Callable[[], object]] = [
            partial(attend, native, setting, one[None], images, k, machine) for one in x
        ]
        for _ in range(repeats):
            together.time(partial(attend, native, setting, x, images, k, machine))
            apart.time(partial(run_all, members))
        yield {
            **asdict(setting),
            "machine": machine,
            "k": k,
            "batch": len(x),
            "seconds": together.seconds,
            "gain": apart.seconds / together.seconds,
            "gain_cpu": apart.cpu_seconds / together.cpu_seconds,
            "peak_mib": in_process(peak_mib, setting, machine, k, len(x)),
        }


def rows(repeats: int) -> Iterator[Row]:
    """Yield every measurement with the name of its part."""
    torch.manual_seed(0)
    settings = (Setting(500, 1, 28), Setting(5000, 1, 28), Setting(1000, 3, 32))
    parts: dict[str, Iterator[Row]] = {
        "batches": batches(repeats),
        "native": (row for each in settings for row in native_rates(each, repeats)),
        "low_noise": native_rates(Setting(1000, 3, 32, t=0.05), repeats),
        "peers": (
            row
            for each in (Setting(500, 1, 28), Setting(1000, 3, 32))
            for row in compare(each, repeats)
        ),
    }
    for name, measured in parts.items():
        for row in measured:
            yield {"part": name, **row}
