"""The models of the tasks, small enough for CPUs.

Shapes: N samples, T tokens, D width of a token, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def digits_mlp() -> nn.Sequential:
    """64-256-256-10 with ReLU; takes (N, 64), gives logits (N, 10)."""
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


class _FirstConvolution(nn.Conv2d):
    """Hands its output on with channels last in memory, which the layers behind it keep: they are faster so on CPUs.

    The images themselves are left as they are: with one channel the gradient would get strides that DDP warns of.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous(memory_format=torch.channels_last)


def fashion_cnn() -> nn.Sequential:
    """Convolutions of 16, 32, 64 and 64 channels with BatchNorm, then 3136-256-10: 0.866 M parameters.

    Takes (N, 1, 28, 28), gives logits (N, 10).
    """

    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        kind = _FirstConvolution if channels_in == 1 else nn.Conv2d
        convolution = kind(channels_in, channels_out, 3, padding=1, bias=False)  # BatchNorm has the bias
        return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16),
        nn.MaxPool2d(2),
        *block(16, 32),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 64),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class _EncoderBlock(nn.Module):
    """A pre-norm transformer block; (N, T, D) to (N, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class VisionTransformer(nn.Module):
    """A ViT for square grey images, tokens averaged before the head: (N, 1, size, size) to logits (N, 10)."""

    def __init__(self, size: int = 28, patch: int = 4, width: int = 96, depth: int = 4, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(_EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits


class _CausalBlock(nn.Module):
    """A pre-norm transformer block in which a token sees only those before it; (N, T, D) to (N, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.query_key_value(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (N, heads, T, D / heads)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class GPT(nn.Module):
    """A byte-level language model, its head untied from the embedding; bytes (N, T) to logits (N, T, V)."""

    def __init__(
        self, vocabulary: int = 256, context: int = 128, width: int = 128, depth: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_CausalBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.position(places)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


@torch.no_grad()
def orthogonal_init(model: nn.Module) -> None:
    """Makes every parameter of two or more dimensions orthogonal, seen as (first dimension, rest), in place.

    Vectors (biases, norms) stay as they are. The paper starts its runs so (arXiv 2405.01067, section 4).
    """
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.orthogonal_(parameter)
