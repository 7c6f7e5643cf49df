"""The paper's models, from torchvision, which is imported when one is built."""

from __future__ import annotations

from typing import Any

from torch import nn

from abtrain.errors import ConfigurationError

_HEAD_DROPOUT = 0.1


def _torchvision() -> Any:
    try:
        import torchvision.models
    except ImportError as error:
        raise ConfigurationError(
            "this task's model comes with torchvision, which is not installed: pip install 'abtrain[vision]'"
        ) from error
    return torchvision.models


def resnet50() -> nn.Module:
    """ResNet-50 with dropout of 0.1 before its head: images (N, 3, 224, 224) to logits (N, 1000)."""
    model: nn.Module = _torchvision().resnet50()
    head = model.get_submodule("fc")
    model.fc = nn.Sequential(nn.Dropout(_HEAD_DROPOUT), head)
    return model


def vit_b_16() -> nn.Module:
    """ViT-B/16: images (N, 3, 224, 224) to logits (N, 1000). torchvision's has no drop path, the authors' had 0.1."""
    model: nn.Module = _torchvision().vit_b_16()
    return model


def vgg16() -> nn.Module:
    """VGG16 with its head of two layers 4,096 wide, for CIFAR-10: images (N, 3, 32, 32) to logits (N, 10).

    134.3 M parameters, 89 % of them in those two layers: that is what the paper's 44 : 1 is about.
    """
    model: nn.Module = _torchvision().vgg16(num_classes=10)
    return model


def mini_vit() -> nn.Module:
    """The ViT of the paper's search (Section IV.C): patch 8, depth 6, 6 heads, 768 wide, for CIFAR-100."""
    model: nn.Module = _torchvision().VisionTransformer(
        image_size=32, patch_size=8, num_layers=6, num_heads=6, hidden_dim=768, mlp_dim=3072, num_classes=100
    )
    return model
