"""Speed of the native kernel against the torch path and against SDPA on unfolded patches.

    python -m benchmarks.native_kernel --out native.json        # about 4 minutes on two cores

All contenders run in one process, in turns, on the same noise; a rate is pairs (query pixel, source)
a second, from the fastest of several runs, as other jobs on the machine only ever slow one down.
Slow contenders get a smaller bank. A wrong answer is not timed.
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
from pathlib import Path

import torch
from els_kernels import GEOMETRIES, Posterior, count_pairs
from els_kernels.attention import Implementation
from els_kernels.native import Native
from els_kernels.tiled import Tiled
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad, scaled_dot_product_attention, unfold

WINDOWS = (3, 5, 7, 9, 11, 13, 17, 21, 25)
PEER_WINDOWS = (3, 5, 9, 11, 17, 25)
PEER_SECONDS = 1.5
"""A contender's bank is halved until one run takes no longer than about this."""


@dataclass(frozen=True)
class Setting:
    """One shape of images and bank at one noise level."""

    images: int
    channels: int
    side: int
    t: float = 0.5

    def bank(self, images: int) -> Tensor:
        noise = torch.rand(images, self.channels, self.side + 4, self.side + 4)
        return avg_pool2d(noise * 6 - 3, 5, 1).clamp(-1, 1)

    def level(self) -> tuple[float, float]:
        a = math.cos(math.pi * self.t / 2 / 1.008)
        return a, math.sqrt(1 - a * a)

    def query(self, bank: Tensor, batch: int = 1) -> Tensor:
        a, s = self.level()
        clean = bank[torch.arange(batch) % len(bank)]
        return a * clean + s * torch.randn_like(clean)


def fastest(work: Callable[[], object], repeats: int) -> float:
    """Return the seconds of the fastest of several runs."""
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def attend(
    implementation: Implementation,
    setting: Setting,
    x: Tensor,
    images: int,
    k: int,
    machine: str,
    padding: str,
) -> Posterior:
    a, s = setting.level()
    batch = len(x)
    geometry = GEOMETRIES[machine, padding]
    ranges = [(0, images)] * batch
    return implementation(x, [a] * batch, [s] * batch, [k] * batch, ranges, geometry)


def sdpa(setting: Setting, x: Tensor, bank: Tensor, k: int) -> Callable[[], Tensor]:
    """Return attention over unfolded patches on the torus, the keys' norms as one more column."""
    (a, s), r = setting.level(), k // 2

    def patches(images: Tensor) -> Tensor:
        return unfold(pad(images, (r, r, r, r), mode="circular"), k).transpose(1, 2).flatten(0, 1)

    keys, queries = patches(bank), patches(x) * (a / s / s)
    norms = keys.square().sum(1, keepdim=True) * (-a * a / s / s / 2)
    keys = torch.cat([keys, norms], 1)[None]
    queries = torch.cat([queries, torch.ones(len(queries), 1)], 1)[None]
    values = bank.flatten(2).transpose(1, 2).flatten(0, 1)[None]
    return lambda: scaled_dot_product_attention(queries, keys, values, scale=1.0)


def agree(got: Tensor, want: Tensor, what: str) -> None:
    """Raise RuntimeError unless two contenders give the same mean."""
    error = float((got - want).norm() / want.norm())
    if not error < 1e-3:
        raise RuntimeError(f"{what}: relative error {error:.1e}, not timed")


def native_rates(setting: Setting, repeats: int) -> Iterator[dict[str, object]]:
    """Yield the native kernel's rate at every window, on the torus and boundary-broken."""
    bank = setting.bank(setting.images)
    native, x = Native(bank), setting.query(bank)
    for padding in ("circular", "zeros"):
        geometry = GEOMETRIES["els", padding]
        for k in WINDOWS:
            seconds = fastest(
                lambda k=k, padding=padding: attend(
                    native, setting, x, setting.images, k, "els", padding
                ),
                repeats,
            )
            pairs = setting.images * count_pairs(geometry, setting.side, setting.side, k)
            yield {
                **asdict(setting), "padding": padding, "k": k, "seconds": seconds,
                "gpairs": pairs / seconds / 1e9,
            }  # fmt: skip


def compare(setting: Setting, repeats: int) -> Iterator[dict[str, object]]:
    """Yield rates of the three contenders on the torus, and of two of them boundary-broken."""
    sizes = {"torch": setting.images, "sdpa": setting.images}
    for k in PEER_WINDOWS:
        row: dict[str, object] = {**asdict(setting), "k": k}
        for contender in ("torch", "sdpa"):
            # Keys of one run within 2 GiB, and its time within bounds.
            images = min(
                sizes[contender], (1 << 29) // (setting.side**2 * k * k * setting.channels)
            )
            while True:
                bank = setting.bank(images)
                x = setting.query(bank)
                native, tiled = Native(bank), Tiled(bank)

                def run_native() -> Tensor:
                    return attend(native, setting, x, images, k, "els", "circular").mean

                if contender == "sdpa":
                    run = sdpa(setting, x, bank, k)
                else:

                    def run() -> Tensor:
                        return attend(tiled, setting, x, images, k, "els", "circular").mean

                answer = run()
                if contender == "sdpa":
                    answer = answer[0].T.reshape(x.shape)
                agree(run_native(), answer, f"native and {contender}, k={k}")
                seconds = fastest(run, repeats)
                if seconds <= PEER_SECONDS or images <= 32:
                    break
                images //= 2
            sizes[contender] = images
            pairs = images * count_pairs(
                GEOMETRIES["els", "circular"], setting.side, setting.side, k
            )
            ours = fastest(run_native, 3 * repeats)
            row[contender] = {
                "images": images, "gpairs": pairs / seconds / 1e9,
                "native_gpairs": pairs / ours / 1e9, "speedup": seconds / ours,
            }  # fmt: skip
        yield row


def batches(repeats: int) -> Iterator[dict[str, object]]:
    """Yield a batch of 16 against its members one by one, and the memory the batch takes."""
    for images, channels, side, machine, padding, k in (
        (500, 1, 28, "els", "zeros", 9),
        (1000, 3, 32, "els", "zeros", 17),
        (5000, 1, 28, "els", "zeros", 17),
        (20000, 3, 32, "local", "zeros", 9),
        (20000, 3, 32, "ideal", "zeros", 1),
    ):
        setting = Setting(images, channels, side)
        bank = setting.bank(images)
        native, x = Native(bank), setting.query(bank, 16)
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        together = alone = math.inf
        for _ in range(repeats):
            together = min(
                together,
                fastest(lambda: attend(native, setting, x, images, k, machine, padding), 1),
            )
            alone = min(
                alone,
                fastest(
                    lambda: [
                        attend(native, setting, one[None], images, k, machine, padding) for one in x
                    ],
                    1,
                ),
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start
        yield {
            **asdict(setting), "machine": machine, "k": k, "batch": 16, "seconds": together,
            "seconds_one_by_one": alone, "gain": alone / together, "peak_mib": peak / 1024,
        }  # fmt: skip


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
    parts: dict[str, Iterator[dict[str, object]]] = {
        "batches": batches(arguments.repeats),
        "native": (row for each in settings for row in native_rates(each, arguments.repeats)),
        "low_noise": native_rates(Setting(1000, 3, 32, t=0.05), arguments.repeats),
        "peers": (
            row
            for each in (Setting(500, 1, 28), Setting(500, 3, 32))
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
