"""Straightforward eager implementation of the paper's networks, with the same weights.

Independent of ``els_service``, so that it also verifies the results of the service's networks.
Default layout, float32, the whole batch at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import (
    conv2d,
    conv_transpose2d,
    group_norm,
    linear,
    max_pool2d,
    normalize,
    relu,
    scaled_dot_product_attention,
)

Weights = Mapping[str, Tensor]
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x [B, C, H, W], t [B], labels [B] → ε [B, C, H, W]."""


def resnet(weights: Weights, blocks: int) -> Network:
    """Return the ResNet: 3×3 conv up, residual blocks, 3×3 conv down."""

    def network(x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        embedding = _embed(weights, time, labels)
        hidden = _conv(weights, "body.up", x)
        for i in range(blocks):
            added = _condition(weights, f"body.conditions.{i}", embedding)
            hidden = hidden + relu(_conv(weights, f"body.convs.{i}", hidden + added))
        return _conv(weights, "body.down", hidden)

    return network


def unet(weights: Weights, levels: int, *, attends: bool = False) -> Network:
    """Return the UNet; ``attends``: with self-attention below the full resolution."""

    def attention(side: str, level: int, x: Tensor) -> Tensor:
        name = f"body.{side}_attention.{level}"
        return _attention(weights, name, x) if attends and level else x

    def network(x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        embedding = _embed(weights, time, labels)
        skips: list[Tensor] = []
        for level in range(levels):
            x = max_pool2d(x, 2) if level else x
            x = _two_convs(weights, f"body.encoder.{level}", x, embedding)
            x = attention("encoder", level, x)
            skips.append(x)
        for level in reversed(range(levels - 1)):
            up = f"body.ups.{level}"
            x = conv_transpose2d(x, weights[f"{up}.weight"], weights[f"{up}.bias"], stride=2)
            x = torch.cat([skips[level], x], dim=1)
            x = _two_convs(weights, f"body.decoder.{level}", x, embedding)
            x = attention("decoder", level, x)
        return _conv(weights, "body.down", x)

    return network


def _embed(weights: Weights, time: Tensor, labels: Tensor) -> Tensor:
    table = weights["label.weight"]
    half = table.shape[1] // 2
    rates = torch.exp(torch.arange(half, device=time.device) * (-math.log(10_000) / half))
    angle = 1000 * time[:, None] * rates
    return torch.cat([angle.sin(), angle.cos()], dim=1) + table[labels]


def _conv(weights: Weights, name: str, x: Tensor, padding: int = 1) -> Tensor:
    return conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)


def _condition(weights: Weights, name: str, embedding: Tensor) -> Tensor:
    hidden = linear(embedding, weights[f"{name}.linear.weight"], weights[f"{name}.linear.bias"])
    width = hidden.shape[1]
    groups = math.gcd(8, width // 2)
    scale, shift = weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"]
    return relu(group_norm(hidden, groups, scale, shift))[:, :, None, None]


def _two_convs(weights: Weights, name: str, x: Tensor, embedding: Tensor) -> Tensor:
    hidden = relu(_conv(weights, f"{name}.first", x))
    hidden = hidden + _condition(weights, f"{name}.condition", embedding)
    return relu(_conv(weights, f"{name}.second", hidden))


def _attention(weights: Weights, name: str, x: Tensor) -> Tensor:
    batch, width, height, breadth = x.shape
    heads = math.gcd(4, width)
    split = _conv(weights, f"{name}.inputs", x, padding=0).reshape(
        batch, 3, heads, -1, height * breadth
    )
    query, key, value = split.transpose(-1, -2).unbind(1)
    mixed = scaled_dot_product_attention(
        normalize(query, dim=-1), normalize(key, dim=-1), value, scale=10.0
    )
    mixed = mixed.transpose(-1, -2).reshape(batch, width, height, breadth)
    return x + _conv(weights, f"{name}.output", mixed, padding=0)
