"""Random crops and mirroring on the images' own device, without worker processes."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference


def augment(images: Tensor, indices: Tensor, *, seed: int, epoch: int, crop: int, flip: bool) -> Tensor:
    """Crop and mirror training images at random, as He et al. (2016) do for CIFAR-10.

    Each image is padded with `crop` zero pixels on every side, and a window of its own size is cut out at a uniformly
    random place. With probability 1/2 the window is mirrored left to right. The random numbers are Philox4x32-10's, as
    in `reference.uniform`, keyed by the seed and counted by index and epoch. So they are the same on every device, in
    every batch and order, and in every process.

    Args:
        images: uint8 (N, C, H, W).
        indices: (N,) integers, the images' indices in their data set, on any device; preferably on the CPU.
        seed: in [0, 2**64).
        epoch: in [0, 2**24).
        crop: in [0, min(H, W)).
        flip: whether to mirror.

    Returns:
        uint8 (N, C, H, W) on the device of the images; the images themselves where crop is 0 and flip False.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    _check(images, indices, seed, epoch, crop, flip)
    if not (crop or flip) or len(images) == 0:
        return images
    height, width = images.shape[2:]
    # Drawn where the indices are: on a GPU these few numbers would be hundreds of tiny kernels.
    drawn = reference.uniform(seed, indices, 3, reference.PURPOSE_AUGMENT, epoch).to(images.device)
    # 24 random bits times a small number are exact in float64: the same integers everywhere.
    offsets = (drawn[:, :2].double() * (2 * crop + 1)).long() - crop
    rows = torch.arange(height, device=images.device) + offsets[:, :1]
    columns = torch.arange(width, device=images.device).expand(len(images), width)
    if flip:
        columns = torch.where(drawn[:, 2:] < 0.5, columns, columns.flip(1))
    columns = columns + offsets[:, 1:]

    inside = _inside(rows, height)[:, :, None] & _inside(columns, width)[:, None, :]
    places = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    pixels = images.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, images.shape[1], -1))
    return pixels.view(images.shape) * inside[:, None]


def _inside(places: Tensor, extent: int) -> Tensor:
    return (places >= 0) & (places < extent)


def _check(images: Tensor, indices: Tensor, seed: int, epoch: int, crop: int, flip: bool) -> None:
    where = "augment"
    for name, tensor in (("images", images), ("indices", indices)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}")
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(
            f"{where}: images must be uint8 of shape (N, C, H, W), got {images.dtype} of shape {tuple(images.shape)}"
        )
    kind = indices.dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool or indices.shape != images.shape[:1]:
        raise ValueError(
            f"{where}: indices must be {len(images)} integers, one an image, got {kind} of shape {tuple(indices.shape)}"
        )
    smaller = min(images.shape[2:])
    for name, value, limit in (("seed", seed, 2**64), ("epoch", epoch, 2**24), ("crop", crop, max(smaller, 1))):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{where}: {name} must be an integer, got {value!r}")
        if not 0 <= value < limit:
            raise ValueError(f"{where}: {name} must be in [0, {limit}), got {value}")
    if not isinstance(flip, bool):
        raise TypeError(f"{where}: flip must be True or False, got {flip!r}")
