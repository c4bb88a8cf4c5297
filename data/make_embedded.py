"""Rebuild the embedded data from the originals and compare it, bit by bit, with the committed files.

    python data/make_embedded.py            # check: rebuild in memory, compare, exit 1 on any difference
    python data/make_embedded.py --write    # write the files (to a temporary name, then renamed)

Originals: Debian's package `dataset-fashion-mnist` (the four idx files) and the module
`pydoc_data.topics` of the Python version named below. Each original is checked against its own SHA-256 first.
"""

import argparse
import gzip
import hashlib
import io
import os
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
FASHION = Path("/usr/share/datasets/fashion-mnist")
# Of the unpacked files: Debian and Zalando pack the same bytes with different gzip headers.
IDX_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
TOPICS_PYTHON = "3.11.7"
TOPICS_SHA256 = "853505944682f68394b4bac08996a977b0d71f01cb49ef646ad8f8150e5779d6"
SEEDS = {"train": 20240, "test": 20241}
CODE_LIKE = re.compile(r"::=|>>>|\.\. |(^|[ (])(def|self|print|import)[ (.]|\w\(\w+\) ?[:=]| = ")
ASCII = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\u00a0": " "})


def read_idx(name: str, header: int) -> np.ndarray:
    """Return the payload of one verified idx file as uint8."""
    raw = gzip.decompress((FASHION / f"{name}.gz").read_bytes())
    found = hashlib.sha256(raw).hexdigest()
    if found != IDX_SHA256[name]:
        raise SystemExit(f"{name}: SHA-256 of the original is {found}, expected {IDX_SHA256[name]}")
    return np.frombuffer(raw, np.uint8, offset=header)


def pick(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Return `per_class` indices of every class, drawn without replacement, then shuffled once."""
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(10)]
    return rng.permutation(np.concatenate(chosen)).astype(np.int32)


def fashion_mnist_10k() -> bytes:
    """Return the npz of 1,000 train and 200 test images a class."""
    arrays = {}
    for part, prefix, per_class in (("train", "train", 1000), ("test", "t10k", 200)):
        images = read_idx(f"{prefix}-images-idx3-ubyte", 16).reshape(-1, 28, 28)
        labels = read_idx(f"{prefix}-labels-idx1-ubyte", 8)
        ids = pick(labels, per_class, SEEDS[part])
        arrays |= {f"x_{part}": images[ids], f"y_{part}": labels[ids], f"id_{part}": ids}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def is_prose(paragraph: str) -> bool:
    """Tell running English from headings, grammar, code and lists of names."""
    words = re.findall(r"[A-Za-z]{2,}", paragraph)
    return (
        paragraph[0].isalpha()
        and paragraph[-1] == "."
        and len(words) >= 8
        and not CODE_LIKE.search(paragraph)
        and sum(map(len, words)) > 0.7 * len(paragraph)
    )


def python_topics() -> bytes:
    """Return the ASCII prose of all topics, one paragraph a line, each paragraph once."""
    from pydoc_data.topics import topics

    source = "\0".join(f"{key}\0{topics[key]}" for key in sorted(topics))
    found = hashlib.sha256(source.encode()).hexdigest()
    if found != TOPICS_SHA256:
        raise SystemExit(
            f"pydoc_data.topics of Python {sys.version.split()[0]} has SHA-256 {found}; the committed text was taken "
            f"from Python {TOPICS_PYTHON} ({TOPICS_SHA256}). Run this script with that version."
        )
    paragraphs: dict[str, None] = {}
    for key in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[key]):
            text = " ".join(block.split()).translate(ASCII).removeprefix("* ")
            if text and text.isascii() and is_prose(text):
                paragraphs.setdefault(text)
    return ("\n".join(paragraphs) + "\n").encode("ascii")


BUILDERS = {"fashion-mnist-10k.npz": fashion_mnist_10k, "python-topics.txt": python_topics}


def same_arrays(a: bytes, b: bytes) -> bool:
    """Tell whether two npz files hold equal arrays, however they were compressed."""
    with np.load(io.BytesIO(a), allow_pickle=False) as old, np.load(io.BytesIO(b), allow_pickle=False) as new:
        return old.files == new.files and all(
            old[k].dtype == new[k].dtype and np.array_equal(old[k], new[k]) for k in old.files
        )


def check(name: str, built: bytes) -> bool:
    """Compare one rebuilt file with the committed one, print what was found."""
    path = HERE / name
    old = path.read_bytes() if path.exists() else b""
    if built == old:
        verdict = "identical"
    elif old and name.endswith(".npz") and same_arrays(old, built):
        verdict = "equal arrays (another zlib packed them)"
    else:
        print(f"{name}: DIFFERENT, committed {hashlib.sha256(old).hexdigest()}")
        return False
    print(f"{name}: {verdict}, {len(old):,} bytes, SHA-256 {hashlib.sha256(old).hexdigest()}")
    return True


def main() -> int:
    """Check or write every embedded file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the files instead of only comparing")
    write = parser.parse_args().write
    ok = True
    for name, build in BUILDERS.items():
        built = build()
        if write:
            temporary = HERE / f".{name}.part"
            temporary.write_bytes(built)
            os.replace(temporary, HERE / name)
        ok &= check(name, built)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
