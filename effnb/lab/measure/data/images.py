"""Image sets: digits, Fashion-MNIST (embedded subset and full), the CIFAR-10 subset, two photographs."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import files
from .kinds import Dataset

FASHION_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def scaled(pixels: np.ndarray, top: float = 255.0) -> Tensor:
    """Return uint8 images ``(N, H, W)`` or ``(N, H, W, C)`` as float32 ``(N, C, H, W)`` in [0, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(pixels))
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
    return x.to(torch.float32).div_(top).contiguous()


def labels(values: np.ndarray) -> Tensor:
    """Return class numbers as int64 ``(N,)``."""
    return torch.from_numpy(values.astype(np.int64))


def npz_images(relative: str, name: str) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Return train and test tensors of a verified npz file, and the file's other arrays."""
    with np.load(BytesIO(files.read(relative, name)), allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    tensors = {f"x_{part}": scaled(arrays.pop(f"x_{part}")) for part in ("train", "test")}
    return tensors | {f"y_{part}": labels(arrays.pop(f"y_{part}")) for part in ("train", "test")}, arrays


def digits() -> Dataset:
    """Return scikit-learn's 8x8 digits, 1,437 train and 360 test, always the same ones."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels, y = bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)
    key = "scikit-learn/digits"
    files.verify(key, pixels.tobytes() + y.tobytes(), files.SHA256[key], files.remedy("digits"))
    # Every fifth of the list sorted by class: stratified, and independent of any random generator.
    test = np.sort(np.argsort(y, kind="stable")[::5])
    train = np.setdiff1d(np.arange(len(y)), test)
    return Dataset(
        "digits", "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits)", files.SHA256[key],
        "CC BY 4.0", scaled(pixels[train], 16), labels(y[train]), scaled(pixels[test], 16), labels(y[test]),
        tuple("0123456789"),
    )  # fmt: skip


def fashion_mnist_10k() -> Dataset:
    """Return the embedded class-balanced subset of Fashion-MNIST, 10,000 train and 2,000 test."""
    relative = "fashion-mnist-10k.npz"
    tensors, _ = npz_images(relative, "fashion-mnist-10k")
    return Dataset(
        "fashion-mnist-10k", f"embedded: data/{relative}", files.SHA256[relative], "MIT", **tensors,
        classes=FASHION_CLASSES,
    )  # fmt: skip


def idx(relative: str) -> np.ndarray:
    """Return the array of a verified idx file: uint8, with the shape that its header states."""
    raw = files.read(relative, "fashion-mnist")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()


def fashion_mnist() -> Dataset:
    """Return the full Fashion-MNIST, 60,000 train and 10,000 test."""
    x_train, y_train, x_test, y_test = (idx(relative) for relative in files.FASHION)
    where = files.find(files.FASHION[0]).parent
    return Dataset(
        "fashion-mnist", f"Zalando Research, from {where}", files.joint_digest(files.FASHION), "MIT",
        scaled(x_train), labels(y_train), scaled(x_test), labels(y_test), FASHION_CLASSES,
    )  # fmt: skip


def cifar10() -> Dataset:
    """Return a class-balanced subset of CIFAR-10, 10,000 train and 2,000 test (re-encoded through JPEG)."""
    relative = "cifar10/cifar10_subset.npz"
    tensors, others = npz_images(relative, "cifar10")
    return Dataset(
        "cifar10", "class-balanced subset of CIFAR-10 (Krizhevsky 2009), from EFFNB_DATA", files.SHA256[relative],
        "research use", **tensors, classes=tuple(others["classes"].tolist()),
    )  # fmt: skip


def photo(name: str) -> Tensor:
    """Return one of scikit-learn's photographs in grey (ITU-R 601 weights), float32 ``(427, 640)`` in [0, 1]."""
    import sklearn.datasets
    from PIL import Image

    key = f"scikit-learn/{name}.jpg"
    path = Path(sklearn.datasets.__file__).parent / "images" / f"{name}.jpg"
    if not path.is_file():
        raise files.DataError(f"{path} (SHA-256 {files.SHA256[key]}) not found. {files.remedy('photos')}")
    raw = files.verify(path, path.read_bytes(), files.SHA256[key], files.remedy("photos"))
    rgb = np.asarray(Image.open(BytesIO(raw)).convert("RGB"), dtype=np.float64)
    return torch.from_numpy((rgb @ [0.299, 0.587, 0.114] / 255).astype(np.float32))


def photos() -> Dataset:
    """Return scikit-learn's two photographs in grey: `china` as ``x_train``, `flower` as ``x_test``."""
    keys = ("scikit-learn/china.jpg", "scikit-learn/flower.jpg")
    return Dataset(
        "photos", "scikit-learn load_sample_images: china (danielbuechele), flower (vultilion)",
        files.joint_digest(keys), "CC BY 2.0", photo("china"), None, photo("flower"), None,
    )  # fmt: skip
