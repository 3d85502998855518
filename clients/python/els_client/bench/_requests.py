"""Requests of a load, prepared in advance: random images at random noise levels."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from els_client import _codec as codec
from els_client.bench.plan import Kind, Plan
from els_proto.denoise.v1 import denoise_pb2 as pb

_DISTINCT = 16  # Enough that no call repeats its neighbours, and quick to prepare.


@dataclass(frozen=True)
class Requests:
    """Serialised messages of each kind, in turn; determined by the seed.

    A field is added to a message by appending it, as concatenation merges protobuf messages.
    """

    bodies: dict[Kind, list[bytes]]
    random: random.Random
    mix: dict[Kind, float]

    def kind(self) -> Kind:
        """Return the kind of the next call."""
        if len(self.mix) == 1:
            return next(iter(self.mix))
        (kind,) = self.random.choices(list(self.mix), list(self.mix.values()))
        return kind

    def body(self, kind: Kind, timeout_s: float | None = None) -> bytes:
        """Return a message of a kind; all kinds but samples can have a deadline."""
        body = self.random.choice(self.bodies[kind])
        if timeout_s is None or kind == "sample":
            return body
        # The field has the same number in both requests.
        return body + pb.DenoiseRequest(timeout_s=timeout_s).SerializeToString()


def prepare(plan: Plan, shape: tuple[int, int, int], index: int) -> Requests:
    """Return the messages of process ``index`` for a model with images of ``shape`` (C, H, W)."""
    pixels = np.random.default_rng((plan.seed, index))
    mix: dict[Kind, float] = {kind: weight for kind, weight in plan.mix.items() if weight > 0}
    bodies = {
        kind: [_message(kind, plan, shape, pixels).SerializeToString() for _ in range(_DISTINCT)]
        for kind in mix
    }
    return Requests(bodies, random.Random(f"{plan.seed} {index}"), mix)


def _message(
    kind: Kind, plan: Plan, shape: tuple[int, int, int], pixels: np.random.Generator
) -> pb.DenoiseRequest | pb.ScoreRequest | pb.SampleRequest:
    if kind == "sample":
        return pb.SampleRequest(
            model=plan.model,
            count=plan.images,
            seed=int(pixels.integers(2**63)),
            steps=plan.steps,
            labels=[] if plan.label is None else [plan.label],
            windows=[] if plan.window is None else [plan.window],
            priority=plan.priority or 0,
            version=plan.version or "",
        )
    low, high = map(math.log, plan.sigma)
    sigma = np.clip(np.exp(pixels.uniform(low, high, plan.images)), *plan.sigma)
    noise = pixels.standard_normal((plan.images, *shape), np.float32)
    image = pixels.uniform(-1, 1, (plan.images, *shape)).astype(np.float32)
    x = (image + sigma[:, None, None, None] * noise).astype(np.float32)
    return (pb.DenoiseRequest if kind == "denoise" else pb.ScoreRequest)(
        model=plan.model,
        x=codec.encode_tensor(x),
        level=pb.NoiseLevel(sigma=sigma.tolist()),
        labels=[] if plan.label is None else [plan.label],
        windows=[] if plan.window is None else [plan.window],
        priority=plan.priority or 0,
        version=plan.version or "",
    )
