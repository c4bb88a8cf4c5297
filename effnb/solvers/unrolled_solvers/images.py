"""Patches, a fixed dictionary and the score for compressive sensing of images."""

from __future__ import annotations

import torch
from torch import Tensor

from effnb.solvers.unrolled_solvers._check import check_count, check_matrix
from effnb.solvers.unrolled_solvers.problem import normalize_columns


def overcomplete_dct(patch: int, atoms: int) -> Tensor:
    """Return an overcomplete two-dimensional cosine dictionary with columns of length one.

    Args:
        patch: side of a patch.
        atoms: frequencies a side, at least ``patch``.

    Returns:
        ``(patch^2, atoms^2)``.

    Raises:
        ValueError: if ``atoms`` is below ``patch``.

    Reference: liu2019alista

    >>> overcomplete_dct(4, 6).shape
    torch.Size([16, 36])
    """
    check_count(patch, "patch")
    check_count(atoms, "atoms", patch)
    place, frequency = torch.arange(patch, dtype=torch.float64), torch.arange(atoms, dtype=torch.float64)
    line = torch.cos(torch.outer(place + 0.5, frequency) * torch.pi / atoms)
    line[:, 1:] -= line[:, 1:].mean(0)
    return normalize_columns(torch.kron(line, line))[0].float()


def image_patches(image: Tensor, patch: int) -> Tensor:
    """Cut an image into patches that do not overlap; what is left over at the right and the bottom is dropped.

    Args:
        image: ``(height, width)``.
        patch: side of a patch.

    Returns:
        ``(number, patch^2)``, row by row.

    Raises:
        ValueError: if the image is smaller than a patch.

    Reference: liu2019alista

    >>> image_patches(torch.arange(16.0).reshape(4, 4), 2)[1].tolist()
    [2.0, 3.0, 6.0, 7.0]
    """
    check_matrix(image, "image")
    check_count(patch, "patch", 1, min(image.shape))
    pieces = image.unfold(0, patch, patch).unfold(1, patch, patch)
    return pieces.reshape(-1, patch * patch)


def merge_patches(patches: Tensor, height: int, width: int) -> Tensor:
    """Undo ``image_patches`` for an image whose sides are multiples of the patch.

    Args:
        patches: ``(number, patch^2)``.
        height: of the image.
        width: of the image.

    Returns:
        ``(height, width)``.

    Raises:
        ValueError: if the patches do not fill the image.

    Reference: liu2019alista

    >>> image = torch.arange(16.0).reshape(4, 4)
    >>> bool((merge_patches(image_patches(image, 2), 4, 4) == image).all())
    True
    """
    check_matrix(patches, "patches")
    side = round(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1] or patches.numel() != height * width or height % side or width % side:
        raise ValueError(f"patches must fill an image of {height} x {width}, got {tuple(patches.shape)}")
    pieces = patches.reshape(height // side, width // side, side, side)
    return pieces.transpose(1, 2).reshape(height, width)


def psnr_db(image: Tensor, reference: Tensor, peak: float = 1.0) -> float:
    """Return the peak signal-to-noise ratio in decibels.

    Args:
        image: any shape.
        reference: the same shape.
        peak: largest possible value.

    Raises:
        ValueError: if the shapes differ.

    Reference: liu2019alista

    >>> round(psnr_db(torch.full((2, 2), 0.1), torch.zeros(2, 2)))
    20
    """
    if image.shape != reference.shape:
        raise ValueError(f"image must have the shape of reference {tuple(reference.shape)}, got {tuple(image.shape)}")
    return float(10 * torch.log10(peak**2 / (image - reference).square().mean()))
