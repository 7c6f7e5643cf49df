"""Augments and standardizes batches of images."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_SHIFT = 1  # pixel; larger shifts only slow learning in the few epochs of the small tasks


def flip_and_shift(images: Tensor, generator: torch.Generator, most: int = _MAX_SHIFT) -> Tensor:
    """Mirrors each image (N, C, H, W) with probability 1/2, and shifts it by up to `most` pixels with zero padding."""
    count, _, height, width = images.shape
    device = images.device
    mirrored = (torch.rand(count, generator=generator) < 0.5).to(device)
    shift = torch.randint(0, 2 * most + 1, (2, count, 1, 1), generator=generator).to(device)
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    padded = F.pad(images, (most,) * 4)
    rows = torch.arange(height, device=device).view(1, -1, 1) + shift[0]
    columns = torch.arange(width, device=device).view(1, 1, -1) + shift[1]
    samples = torch.arange(count, device=device).view(-1, 1, 1)
    return padded[samples, :, rows, columns].permute(0, 3, 1, 2)


def shift_by_four(images: Tensor, generator: torch.Generator) -> Tensor:
    """Applies the usual augmentation for CIFAR: random mirroring, padding by 4 pixels, and random cropping."""
    return flip_and_shift(images, generator, most=4)


def _standardize(mean: tuple[float, ...], deviation: tuple[float, ...], pixels: Tensor) -> Tensor:
    """Converts pixels (N, 3, H, W) in 0..255 to float32 with approximately zero mean and unit variance per channel."""
    x = pixels.to(torch.float32, memory_format=torch.channels_last) / 255
    shape = (1, -1, 1, 1)
    return (x - x.new_tensor(mean).view(shape)) / x.new_tensor(deviation).view(shape)


standardize_imagenet = functools.partial(_standardize, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
standardize_cifar10 = functools.partial(_standardize, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
standardize_cifar100 = functools.partial(_standardize, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def standardize_fashion(images: Tensor) -> Tensor:
    """Converts Fashion-MNIST's pixels (N, 1, 28, 28) in 0..255 to float32 with zero mean and unit variance."""
    # With channels last in memory, gradients would have strides that DDP warns about.
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    return (pixels / 255 - 0.286) / 0.353  # mean and standard deviation of the training pixels
