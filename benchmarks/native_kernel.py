"""Speed of the native kernel against the torch path and against SDPA on unfolded patches.

    python -m benchmarks.native_kernel --out native.json        # about 3 minutes on two idle cores

All contenders run in one process, in turns. Work is pairs (query pixel, source); ``gpairs`` is 1e9
pairs a second of wall time, ``gpairs_cpu`` a second of processor time with all threads busy: on a
machine with other jobs the second still tells what the code does. Both are of the fastest run, as
other jobs only ever slow one down. Slow contenders get a smaller bank. Nothing wrong is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad, scaled_dot_product_attention, unfold

from els_kernels import GEOMETRIES, Posterior, count_pairs
from els_kernels.attention import Implementation
from els_kernels.native import Native
from els_kernels.tiled import Tiled

Row = dict[str, Any]

WINDOWS = (3, 5, 7, 9, 11, 13, 17, 21, 25)
PEER_WINDOWS = (3, 5, 9, 11, 17, 25)
PEER_WORK = 4e8
"""Pairs of a contender's run at k = 1; fewer as k²C grows, for about a second a run."""


@dataclass(frozen=True)
class Setting:
    """One shape of images and bank at one noise level."""

    images: int
    channels: int
    side: int
    t: float = 0.5

    def bank(self, images: int) -> Tensor:
        """Return images in [-1, 1] whose neighbouring pixels resemble each other."""
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
        """Run once more."""
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        self.seconds = min(self.seconds, time.perf_counter() - wall)
        self.cpu_seconds = min(self.cpu_seconds, time.process_time() - cpu)

    def rates(self, pairs: int) -> Row:
        """Return what a run of so many pairs achieved."""
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
    """Return an implementation's answer to a batch at one level and window."""
    a, s = setting.level()
    batch = len(x)
    geometry = GEOMETRIES[machine, padding]
    ranges = [(0, images)] * batch
    return implementation(x, [a] * batch, [s] * batch, [k] * batch, ranges, geometry)


def sdpa(setting: Setting, x: Tensor, bank: Tensor, k: int) -> Callable[[], Tensor]:
    """Return attention over unfolded patches on the torus, the keys' norms as one more column.

    Values are padded to the keys' depth: without that torch leaves its flash kernel for one that
    writes all the logits to memory, and takes up to four times as long.
    """
    (a, s), r = setting.level(), k // 2

    def patches(images: Tensor) -> Tensor:
        return unfold(pad(images, (r, r, r, r), mode="circular"), k).transpose(1, 2).flatten(0, 1)

    keys, queries = patches(bank), patches(x) * (a / s / s)
    norms = keys.square().sum(1, keepdim=True) * (-a * a / s / s / 2)
    keys = torch.cat([keys, norms], 1)[None, None]
    queries = torch.cat([queries, torch.ones(len(queries), 1)], 1)[None, None]
    values = torch.zeros_like(keys)
    values[0, 0, :, : setting.channels] = bank.flatten(2).transpose(1, 2).flatten(0, 1)

    def attend_once() -> Tensor:
        answer = scaled_dot_product_attention(queries, keys, values, scale=1.0)
        return answer[0, 0, :, : setting.channels].T.reshape(x.shape)

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
    """Yield the rates of the three contenders on the torus, the native kernel's beside each."""
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
            "torch": lambda: attend(tiled, setting, x, len(few), k, "els", "circular").mean,  # noqa: B023
            "sdpa": sdpa(setting, x, few, k),
        }
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


def batches(repeats: int) -> Iterator[Row]:
    """Yield a batch of 16 against its members one by one, and the memory the batch takes."""
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
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        members = [partial(attend, native, setting, one[None], images, k, machine) for one in x]
        for _ in range(repeats):
            together.time(partial(attend, native, setting, x, images, k, machine))
            apart.time(lambda: [member() for member in members])  # noqa: B023
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        yield {
            **asdict(setting),
            "machine": machine,
            "k": k,
            "batch": len(x),
            "seconds": together.seconds,
            "gain": apart.seconds / together.seconds,
            "gain_cpu": apart.cpu_seconds / together.cpu_seconds,
            "peak_mib": peak / 1024,
        }


def main() -> None:
    """Run everything, print lines as they come, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the JSON record goes")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bank = Setting(16, 1, 8).bank(16)
    record: dict[str, object] = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "instruction_set": Native(bank).instruction_set,
    }
    settings = (Setting(500, 1, 28), Setting(5000, 1, 28), Setting(1000, 3, 32))
    parts: dict[str, Iterator[Row]] = {
        "batches": batches(arguments.repeats),
        "native": (row for each in settings for row in native_rates(each, arguments.repeats)),
        "low_noise": native_rates(Setting(1000, 3, 32, t=0.05), arguments.repeats),
        "peers": (
            row
            for each in (Setting(500, 1, 28), Setting(1000, 3, 32))
            for row in compare(each, arguments.repeats)
        ),
    }
    for name, rows in parts.items():
        kept = record[name] = []
        for row in rows:
            print(name, json.dumps(row), flush=True)
            kept.append(row)
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
