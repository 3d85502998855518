"""The networks of Kamb & Ganguli (ICML 2025): ResNet, UNet, UNet with self-attention.

None normalises over an image, so an output pixel depends only on its receptive field. The exception
is self-attention, included to show where locality fails.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from els_service.denoisers.networks.config import NetworkConfig

_HEADS = 4


class Network(nn.Module):
    """F(x, t, label): x [B, C, H, W], t [B] in (0, 1], labels int64 [B] → [B, C, H, W].

    The null label of a network is row ``label_count`` of its embedding.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = torch.contiguous_format
        width = config.widths[0]
        rows = config.label_count + config.null_label
        self.label = nn.Embedding(rows, width) if rows else None
        self.body = ResNet(config) if config.architecture == "resnet" else UNet(config)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Return the prediction, in the dtype of x."""
        embedding = sinusoids(time, self.config.widths[0]).to(x.dtype)
        if self.label is not None:
            embedding = embedding + self.label(labels)
        # A clone: with one channel both layouts are equal, and later layers would mix them.
        output: Tensor = self.body(x.clone(memory_format=self.layout), embedding)
        return output

    def set_layout(self, layout: torch.memory_format) -> None:
        """Compute in this layout; the weights of convolutions are converted in place."""
        self.layout = layout
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=layout)


def build_network(config: NetworkConfig, device: torch.device | str = "cpu") -> Network:
    """Return a network with random weights from torch's global generator."""
    with torch.device(device):
        return Network(config)


def sinusoids(time: Tensor, width: int) -> Tensor:
    """Return sin and cos of 1000·t at ``width/2`` wavelengths, [B, width] float32 (DDPM)."""
    half = width // 2
    rate = -math.log(10_000) / half
    frequency = torch.exp(rate * torch.arange(half, dtype=torch.float32, device=time.device))
    angle = 1000 * time.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Condition(nn.Module):
    """Time and label as one bias per channel: Linear, GroupNorm, ReLU; [B, E] → [B, W, 1, 1]."""

    def __init__(self, embedding: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding, width)
        self.norm = nn.GroupNorm(math.gcd(8, width // 2), width)

    def forward(self, embedding: Tensor) -> Tensor:
        """Return the bias that is added to every pixel."""
        return functional.relu(self.norm(self.linear(embedding)))[:, :, None, None]


class _Conv(nn.Conv2d):
    """A 3×3 convolution whose circular padding keeps the memory layout, unlike torch's."""

    def __init__(self, inputs: int, outputs: int, padding: str) -> None:
        super().__init__(inputs, outputs, 3, padding=int(padding == "zeros"))
        self.wraps = padding == "circular"

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of the padded image."""
        if self.wraps:
            x = torch.cat([x[..., -1:], x, x[..., :1]], dim=-1)
            x = torch.cat([x[..., -1:, :], x, x[..., :1, :]], dim=-2)
        return super().forward(x)


class ResNet(nn.Module):
    """3×3 conv up, residual blocks of one 3×3 conv each, 3×3 conv down."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        channels, (width,), padding = config.shape[0], config.widths, config.padding
        self.up = _Conv(channels, width, padding)
        self.convs = nn.ModuleList(_Conv(width, width, padding) for _ in range(config.blocks))
        self.conditions = nn.ModuleList(Condition(width, width) for _ in range(config.blocks))
        self.down = _Conv(width, channels, padding)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return the prediction."""
        hidden: Tensor = self.up(x)
        for conv, condition in zip(self.convs, self.conditions, strict=True):
            hidden = hidden + functional.relu(conv(hidden + condition(embedding)))
        output: Tensor = self.down(hidden)
        return output


class _TwoConvs(nn.Module):
    """Two 3×3 convs with ReLU, the condition between them."""

    def __init__(self, inputs: int, outputs: int, embedding: int, padding: str) -> None:
        super().__init__()
        self.first = _Conv(inputs, outputs, padding)
        self.second = _Conv(outputs, outputs, padding)
        self.condition = Condition(embedding, outputs)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = functional.relu(self.first(x)) + self.condition(embedding)
        return functional.relu(self.second(hidden))


class _SelfAttention(nn.Module):
    """Residual self-attention between all pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = math.gcd(_HEADS, width)
        self.inputs = nn.Conv2d(width, 3 * width, 1)
        self.output = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, breadth = x.shape
        split = self.inputs(x).reshape(batch, 3, self.heads, width // self.heads, height * breadth)
        query, key, value = split.transpose(-1, -2).contiguous().unbind(1)
        # Unit-length queries and keys bound the logits without normalising over the image.
        mixed = functional.scaled_dot_product_attention(
            functional.normalize(query, dim=-1),
            functional.normalize(key, dim=-1),
            value,
            scale=_TEMPERATURE,
        )
        result: Tensor = x + self.output(mixed.transpose(-1, -2).reshape(x.shape))
        return result


_TEMPERATURE = 10.0


class UNet(nn.Module):
    """Two convs a block, max-pooling down, transposed convolutions up, skips joined by channels.

    With attention, every block below the full resolution is followed by self-attention.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        channels, widths, padding = config.shape[0], config.widths, config.padding
        attends = config.architecture == "unet-attention"
        embedding = widths[0]
        inputs = (channels, *widths[:-1])
        self.encoder = nn.ModuleList(
            _TwoConvs(i, o, embedding, padding) for i, o in zip(inputs, widths, strict=True)
        )
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(below, above, 2, stride=2)
            for above, below in itertools.pairwise(widths)
        )
        self.decoder = nn.ModuleList(
            _TwoConvs(2 * width, width, embedding, padding) for width in widths[:-1]
        )
        self.encoder_attention = _attention_below(widths, attends)
        self.decoder_attention = _attention_below(widths[:-1], attends)
        self.down = _Conv(widths[0], channels, padding)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return the prediction."""
        skips: list[Tensor] = []
        hidden = x
        for block, attention in zip(self.encoder, self.encoder_attention, strict=True):
            hidden = attention(
                block(functional.max_pool2d(hidden, 2) if skips else hidden, embedding)
            )
            skips.append(hidden)
        skips.pop()
        levels = zip(self.ups, self.decoder, self.decoder_attention, strict=True)
        for up, block, attention in reversed(list(levels)):
            hidden = attention(block(torch.cat([skips.pop(), up(hidden)], dim=1), embedding))
        output: Tensor = self.down(hidden)
        return output


def _attention_below(widths: tuple[int, ...], attends: bool) -> nn.ModuleList:
    return nn.ModuleList(
        _SelfAttention(width) if attends and level else nn.Identity()
        for level, width in enumerate(widths)
    )
