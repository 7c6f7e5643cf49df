"""Builds the models of the tasks: small ones for CPUs, and those of the paper from torchvision.

Letters in shapes: N samples, T tokens, D values per token, V entries in the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtrain.errors import ConfigurationError

_HEAD_DROPOUT = 0.1
GPT2_VOCABULARY = 50_257


def digits_mlp() -> nn.Sequential:
    """Builds a fully connected 64-256-256-10 network with ReLU: inputs (N, 64) to logits (N, 10)."""
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


class _FirstConvolution(nn.Conv2d):
    """A convolution with channels-last output, which makes the following layers faster on CPUs.

    The input is not converted, because channels-last gradients of one channel have strides that DDP warns about.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous(memory_format=torch.channels_last)


def without_own_layers(model: nn.Module) -> nn.Module:
    """Replaces abtrain's own convolutions by PyTorch's, which compute the same, in place. Returns the model."""
    own = [module for module in model.modules() if type(module) is _FirstConvolution]
    for module in own:
        module.__class__ = nn.Conv2d  # type: ignore[assignment]  # the base class
    # Weights with channels last have the same effect.
    return model.to(memory_format=torch.channels_last) if own else model


def fashion_cnn() -> nn.Sequential:
    """Builds a network of four convolutions with BatchNorm and a 3136-256-10 head, with 0.866 M parameters.

    The convolutions have 16, 32, 64 and 64 channels. The network maps images (N, 1, 28, 28) to logits (N, 10).
    """

    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        kind = _FirstConvolution if channels_in == 1 else nn.Conv2d
        convolution = kind(channels_in, channels_out, 3, padding=1, bias=False)  # BatchNorm has a bias
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
    """A pre-norm transformer block: tokens (N, T, D) to tokens (N, T, D)."""

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
    """A ViT for square grey images, with mean pooling of tokens: images (N, 1, size, size) to logits (N, 10)."""

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
    """A pre-norm transformer block with causal attention: tokens (N, T, D) to tokens (N, T, D)."""

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
    """A byte-level language model with separate weights for embedding and head: bytes (N, T) to logits (N, T, V)."""

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


def gpt2(width: int = 768, depth: int = 12, heads: int = 12) -> GPT:
    """Builds GPT-2, by default the smallest, with 124.4 M parameters: at most 1,024 tokens (N, T) to logits (N, T, V).

    Embedding and head are one weight (Radford et al., 2019, Language Models are Unsupervised Multitask Learners).
    """
    model = GPT(vocabulary=GPT2_VOCABULARY, context=1024, width=width, depth=depth, heads=heads)
    model.head.weight = model.embedding.weight
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    return model


@torch.no_grad()
def orthogonal_init(model: nn.Module) -> None:
    """Makes every parameter of two or more dimensions an orthogonal matrix (first dimension, product of the others).

    Vectors (biases and norms) stay unchanged. The paper uses these initial weights (arXiv 2405.01067, section 4).
    """
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.orthogonal_(parameter)


def _torchvision() -> Any:
    try:
        import torchvision.models
    except ImportError as error:
        raise ConfigurationError(
            "torchvision, which has the model of this task, is not installed: pip install 'abtrain[vision]'"
        ) from error
    return torchvision.models


def resnet50() -> nn.Module:
    """Builds ResNet-50 with dropout of 0.1 before its head: images (N, 3, 224, 224) to logits (N, 1000)."""
    model: nn.Module = _torchvision().resnet50()
    head = model.get_submodule("fc")
    model.fc = nn.Sequential(nn.Dropout(_HEAD_DROPOUT), head)
    return model


def vit_b_16() -> nn.Module:
    """Builds ViT-B/16: images (N, 3, 224, 224) to logits (N, 1000).

    The authors used a drop path rate of 0.1, which torchvision's model does not support.
    """
    model: nn.Module = _torchvision().vit_b_16()
    return model


def vgg16() -> nn.Module:
    """Builds VGG16 for CIFAR-10, with two layers of width 4,096 in its head: images (N, 3, 32, 32) to logits (N, 10).

    These two layers have 89 % of its 134.3 M parameters, which explains the paper's compression of 44 : 1.
    """
    model: nn.Module = _torchvision().vgg16(num_classes=10)
    return model


def mini_vit() -> nn.Module:
    """Builds the ViT for the paper's hyperparameter search on CIFAR-100 (Section IV.C): 6 layers of width 768.

    It maps images (N, 3, 32, 32) to logits (N, 100). Patches have 8 x 8 pixels, and each layer has 6 heads.
    """
    model: nn.Module = _torchvision().VisionTransformer(
        image_size=32, patch_size=8, num_layers=6, num_heads=6, hidden_dim=768, mlp_dim=3072, num_classes=100
    )
    return model
