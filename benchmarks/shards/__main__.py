"""Measures a bank in shards beside one process, in one run, and writes a record.

    python -m benchmarks.shards BANK [--shards 2] [--engine local] [--rounds 5] [--out FILE.json]
    python -m benchmarks.shards BANK --memory [--engine ray]
    python -m benchmarks.shards BANK --sample FILE.png [--machine els] [--label 0] [--steps 10]

Per machine: seconds of a denoise of one image over the whole bank, in one process with all cores
and in shards that have the cores between them, alternating; the median of the rounds with the
extremes of their ratios; ``coordination_ms``, the time of a call beside that of its slowest shard.
Answers that differ in a bit are not timed. Memory is PSS: of a process with the model; of one with
its bank in shards and of these; of Ray's own processes apart; and ``banks``, by which shards of the
bank exceed shards of its first images, beside the packed bank. A model of more devices follows, see
``cluster_model``. With ``--memory`` memory alone is measured; with ``--sample`` an image is drawn
over the bank instead: seconds a step, and the image.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import record
from benchmarks.shards.cluster_model import cluster_rows

MACHINES = {
    "ideal": "machine: ideal\n",
    "local": "machine: local\nwindow: 5\n",
    "els": "machine: els\nwindow: 5\n",
}
SIGMA = 0.5
_FEW_FOR_EACH = 512
"""Images of a bank of one block for each shard."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every row, then write the record; or draw a sample."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bank", type=Path, help="file of a bank of images of one size")
    parser.add_argument("--shards", type=int, default=2, help="number of shards")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="of shards")
    parser.add_argument("--rounds", type=int, default=5, help="of alternating timed runs")
    parser.add_argument("--machines", nargs="+", default=list(MACHINES), choices=list(MACHINES))
    parser.add_argument("--memory", action="store_true", help="measure memory alone")
    parser.add_argument("--sample", type=Path, metavar="FILE.png", help="draw an image instead")
    parser.add_argument("--label", type=int, default=-1, help="of the sample; -1 for none")
    parser.add_argument("--steps", type=int, default=10, help="of the sample")
    record.add_arguments(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        root = write_models(Path(folder), options)
        if options.sample:
            print(json.dumps(sampled(root, options)))
            return
        if options.memory:
            print(json.dumps(memory_row(root, options)))
            return
        recorder = record.start("shards", options)
        rows = []
        for row in measured(root, options):
            print(json.dumps(row), flush=True)
            rows.append(row)
    print(f"record: {recorder.write(rows)}")


def write_models(root: Path, options: argparse.Namespace) -> Path:
    """Write every machine twice, in one process and in shards; return the models root."""
    from els_service.denoisers.bank_parts import BankReader
    from els_service.denoisers.banks import save_bank

    (root / "_banks").mkdir()
    shutil.copy(options.bank, root / "_banks" / "bank.safetensors")
    few = _FEW_FOR_EACH * options.shards
    save_bank(BankReader(options.bank).bank(0, few), root / "_banks" / "few.safetensors")
    for machine in options.machines:
        text = f"kind: analytic\nbank: ../_banks/bank.safetensors\n{MACHINES[machine]}"
        if options.sample:
            # The window by noise level that the server has by default.
            text = text.replace("window: 5\n", "")
        shards = f"shards: {options.shards}\nengine: {options.engine}\n"
        documents = {
            machine: text,
            f"{machine}-shards": text + shards,
            f"{machine}-few": text.replace("bank.safetensors", "few.safetensors") + shards,
        }
        for name, document in documents.items():
            (root / name).mkdir()
            (root / name / "model.yaml").write_text(document)
    return root


def measured(root: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each machine, of memory, and of the model of more devices."""
    import torch

    from els_service.denoisers.base import make_query
    from els_service.denoisers.levels import from_sigma
    from els_service.repository import ModelRepository

    models = ModelRepository(root)
    coordination = 0.0
    for machine in options.machines:
        one: Any = models.load(machine)
        many: Any = models.load(f"{machine}-shards")
        shards = many.attention.prepared.parts
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, *one.info.shape, generator=generator) * SIGMA + one.bank.pixels()[:1]
        query = make_query(x, from_sigma([SIGMA]))
        row: dict[str, Any] = {
            "machine": machine,
            "images": len(one.bank),
            "shape": list(one.info.shape),
            "shards": options.shards,
            "engine": options.engine,
            "threads": torch.get_num_threads(),
        }
        want, got = one.denoise(query), many.denoise(query)
        if (want.pixels != got.pixels).any() or (want.log_evidence != got.log_evidence).any():
            yield {**row, "refused": "the answers differ"}
            continue
        # In another thread than the main one, as in a server.
        with ThreadPoolExecutor(1) as device:
            timed = device.submit(_timed, one, many, shards, query, options.rounds)
            row |= timed.result()
        coordination = max(coordination, row["coordination_ms"])
        yield row
    merge_s = _merge_s(models, options.machines[0])
    yield memory_row(root, options)
    yield from cluster_rows(coordination / 1e3, merge_s)


def _timed(one: Any, many: Any, shards: Any, query: Any, rounds: int) -> dict[str, Any]:
    """Return seconds of both, and of what a call takes beside its slowest shard."""
    alone, shared, beside = [], [], []
    for _ in range(rounds):
        began = time.perf_counter()
        one.denoise(query)
        alone.append(time.perf_counter() - began)
        began = time.perf_counter()
        many.denoise(query)
        shared.append(time.perf_counter() - began)
        beside.append(shared[-1] - shards.slowest_s)
    ratios = [first / second for first, second in zip(alone, shared, strict=True)]
    return {
        "one_s": round(median(alone), 5),
        "shards_s": round(median(shared), 5),
        "speed": round(median(ratios), 3),
        "speed_extremes": [round(min(ratios), 3), round(max(ratios), 3)],
        "coordination_ms": round(median(beside) * 1e3, 3),
    }


def _merge_s(models: Any, machine: str) -> float:
    """Return the seconds of merging one number of one row, of one thread."""
    import torch

    from els_kernels.blocks import Blocks
    from els_kernels.native.attend_call import empty_rows
    from els_kernels.native.bank import Native

    shape, blocks, count = (3, 64, 64), 64, 10
    native: Any = Native(torch.zeros(512, *shape))
    # Of three processes, which send a row for each block.
    native.blocks = Blocks(3 * blocks * 512, 512, stride=3)
    rows = empty_rows(blocks, shape)
    rows.peaks.zero_()
    rows.sums.fill_(1)
    geometry = models.load(machine)._geometry
    limits = [(0, 3 * blocks * 512)]
    arguments = torch.zeros(1, *shape), [1.0], [1.0], [1], limits, geometry
    native.merging(*arguments).run(rows.addresses())
    took = []
    for _ in range(count):
        began = time.perf_counter()
        native.merging(*arguments).run(rows.addresses())
        took.append(time.perf_counter() - began)
    return median(took) * torch.get_num_threads() / (blocks * 4 * 64 * 64)


def memory_row(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return PSS in MB with the first machine: see above."""
    from els_service.denoisers.bank_parts import BankReader

    reader, machine = BankReader(options.bank), options.machines[0]
    one, shards, few = (_pss(root, f"{machine}{end}") for end in ("", "-shards", "-few"))
    packed_mb = 4 * len(reader) * math.prod(reader.shape) / 1e6
    banks_mb = shards["shards_mb"] - few["shards_mb"]
    return {
        "memory": "PSS in MB",
        "machine": machine,
        "engine": options.engine,
        "shards": options.shards,
        "one_mb": one["pss_mb"],
        **shards,
        "banks_mb": round(banks_mb, 1),
        "packed_bank_mb": round(packed_mb, 1),
        "banks": round(banks_mb / packed_mb, 3),
    }


def _pss(root: Path, model: str) -> dict[str, float]:
    """Return the memory of a process that has answered, and of those that it started."""
    command = [sys.executable, "-m", "benchmarks.shards.memory", str(root), model]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    memory: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return memory


def sampled(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Draw one image of the last machine by DDIM; return seconds a step."""
    import numpy as np
    from PIL import Image

    from els_service.denoisers.base import Denoised, make_query
    from els_service.denoisers.levels import NoiseLevel, cosine
    from els_service.repository import ModelRepository

    model: Any = ModelRepository(root).load(f"{options.machines[-1]}-shards")
    noise = np.random.default_rng(0)
    x = noise.standard_normal((1, *model.info.shape)).astype(np.float32)
    levels = cosine(np.arange(options.steps, 0, -1) / options.steps).pairs
    began = time.perf_counter()
    answer: Denoised | None = None
    for (a, s), (next_a, next_s) in zip(levels, [*levels[1:], (1.0, 0.0)], strict=True):
        answer = model.denoise(make_query(x, NoiseLevel.of([(a, s)]), labels=options.label))
        epsilon = (x - a * answer.pixels) / s
        x = (next_a * answer.pixels + next_s * epsilon).astype(np.float32)
    assert answer is not None
    seconds = (time.perf_counter() - began) / options.steps
    pixels = ((answer.pixels[0].clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    picture.resize((280, 280), Image.Resampling.NEAREST).save(options.sample)
    return {
        "machine": options.machines[-1],
        "images": len(model.bank),
        "label": options.label,
        "shards": options.shards,
        "seconds_a_step": round(seconds, 3),
    }


if __name__ == "__main__":
    main()
