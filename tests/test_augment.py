"""Random crops and mirror images against a loop over the images, and the randomness that belongs to the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparta_kernels import data, reference


def _images(count=12, shape=(3, 6, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (count, *shape), dtype=torch.uint8, generator=generator)


def _slowly(images, indices, seed, epoch, crop, flip):
    """One image at a time: pad, cut out, mirror."""
    out = []
    for image, index in zip(images.numpy(), indices.tolist(), strict=True):
        drawn = reference.uniform(seed, torch.tensor([index]), 3, reference.PURPOSE_AUGMENT, epoch)[0].tolist()
        top, left = (int(u * (2 * crop + 1)) for u in drawn[:2])
        padded = np.pad(image, ((0, 0), (crop, crop), (crop, crop)))
        window = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
        out.append(window[:, :, ::-1] if flip and drawn[2] >= 0.5 else window)
    return torch.from_numpy(np.stack(out))


@pytest.mark.parametrize(("crop", "flip"), [(2, True), (2, False), (0, True), (4, True), (1, False)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_against_a_loop(crop, flip, layout):
    images = _images().contiguous(memory_format=layout)
    indices = torch.tensor([0, 5, 7, 2**40 + 3, 2**33, 11, 1, 2, 3, 4, 50_000, 9])
    before = images.clone()
    for seed, epoch in ((0, 0), (2**63 + 5, 17)):
        made = data.augment(images, indices, seed=seed, epoch=epoch, crop=crop, flip=flip)
        assert made.dtype == torch.uint8
        assert torch.equal(made, _slowly(images, indices, seed, epoch, crop, flip))
    assert torch.equal(images, before)


def test_the_batch_does_not_matter():
    images, indices = _images(), torch.arange(100, 112)
    how = {"seed": 3, "epoch": 2, "crop": 2, "flip": True}
    whole = data.augment(images, indices, **how)
    parts = [data.augment(images[rows], indices[rows], **how) for rows in (slice(0, 5), slice(5, 12))]
    assert torch.equal(whole, torch.cat(parts))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(whole[order], data.augment(images[order], indices[order].int(), **how))
    for change in ({"seed": 4}, {"epoch": 3}):
        assert not torch.equal(whole, data.augment(images, indices, **{**how, **change}))


def test_nothing_to_do_is_the_identity():
    images, indices = _images(), torch.arange(12)
    assert data.augment(images, indices, seed=0, epoch=0, crop=0, flip=False) is images
    assert data.augment(images[:0], indices[:0], seed=0, epoch=0, crop=2, flip=True).shape == (0, 3, 6, 5)


def test_every_place_is_as_likely():
    """An image whose pixels say where they are: its window tells the offset and whether it was mirrored."""
    count, crop = 18_000, 1
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    made = data.augment(image.expand(count, -1, -1, -1), torch.arange(count), seed=1, epoch=0, crop=crop, flip=True)
    mirrored = made[:, 0, 2, 1] > made[:, 0, 2, 3]
    centre = made[:, 0, 2, 2].long() - 13  # 5 * dy + dx, mirrored or not
    cases = torch.stack([centre, mirrored.long()], dim=1)
    kinds, counts = cases.unique(dim=0, return_counts=True)
    assert len(kinds) == 18
    # 1000 expected of each of 18: chi-square with 17 degrees of freedom is above 41 once in 1000.
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 41


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"images": None}, TypeError, "images must be a tensor, got NoneType"),
        ({"images": torch.zeros(2, 3, 4, 4)}, ValueError, "images must be uint8 of shape"),
        ({"images": torch.zeros(2, 4, 4, dtype=torch.uint8)}, ValueError, "images must be uint8 of shape"),
        ({"indices": torch.arange(3)}, ValueError, "indices must be 2 integers"),
        ({"indices": torch.rand(2)}, ValueError, "indices must be 2 integers"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"seed": 1.0}, TypeError, "seed must be an integer"),
        ({"epoch": 2**24}, ValueError, "epoch must be in"),
        ({"crop": 4}, ValueError, r"crop must be in \[0, 4\), got 4"),
        ({"crop": True}, TypeError, "crop must be an integer"),
        ({"flip": 1}, TypeError, "flip must be True or False"),
    ],
)
def test_wrong_arguments(change, error, words):
    arguments = {"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "indices": torch.arange(2)}
    arguments |= {"seed": 0, "epoch": 0, "crop": 1, "flip": True, **change}
    with pytest.raises(error, match=f"^augment: {words}"):
        data.augment(arguments.pop("images"), arguments.pop("indices"), **arguments)


@pytest.mark.gpu
def test_the_device_does_not_matter():
    images, indices = _images(), torch.arange(12)
    how = {"seed": 3, "epoch": 2, "crop": 2, "flip": True}
    made = data.augment(images.cuda(), indices, **how)
    assert made.is_cuda
    assert torch.equal(made.cpu(), data.augment(images, indices, **how))
