"""Human-rated snippets of film reviews and editorials, as one compact file: `snippets.tsv.xz`.

    python make_snippets.py vaderSentiment-0.5.zip            # check: rebuild in memory, compare with the file
    python make_snippets.py vaderSentiment-0.5.zip --write    # write it (to a temporary name, then renamed)

The original is the source distribution of vaderSentiment 0.5 (later ones, and all wheels, lack the ratings):
    pip download --no-binary :all: --no-deps vaderSentiment==0.5

One line a snippet: set (`movie` or `editorial`), mean rating in [-4, 4] with up to 4 decimals, text. UTF-8, LF, in the
order of the original files; white space collapsed, the ids and empty texts left out, nothing else changed.
The SHA-256 that counts is that of the unpacked text: packers may differ.
"""

import argparse
import hashlib
import io
import lzma
import os
import sys
import tarfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE / "snippets.tsv.xz"
SDIST_SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
SETS = {"movie": "movieReviewSnippets", "editorial": "nytEditorialSnippets"}


def members(path: Path) -> tarfile.TarFile:
    """Return the inner archive of the verified source distribution."""
    raw = path.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != SDIST_SHA256:
        raise SystemExit(f"{path}: SHA-256 is {found}, expected {SDIST_SHA256}")
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return tarfile.open(fileobj=io.BytesIO(archive.read(ARCHIVE)))


def rows(archive: tarfile.TarFile, name: str) -> list[str]:
    """Return `set TAB rating TAB text` for every snippet of one set."""
    raw = archive.extractfile(f"hutto_ICWSM_2014/{SETS[name]}_GroundTruth.txt").read().decode("utf-8")
    fields = (line.split("\t", 2) for line in raw.split("\n") if line.strip())
    clean = ((float(rating), " ".join(text.split())) for _, rating, text in fields)
    return [f"{name}\t{round(rating, 4):g}\t{text}" for rating, text in clean if text]


def snippets(path: Path) -> bytes:
    """Return the whole file, unpacked."""
    archive = members(path)
    return ("\n".join(line for name in SETS for line in rows(archive, name)) + "\n").encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sdist", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    data = snippets(options.sdist)
    if options.write:
        new = TARGET.with_suffix(".new")
        new.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
        os.replace(new, TARGET)
    same = TARGET.is_file() and lzma.decompress(TARGET.read_bytes()) == data
    packed = TARGET.stat().st_size if TARGET.is_file() else 0
    print(
        f"{TARGET.name}: {data.count(10)} snippets, {len(data)} bytes, packed {packed}, SHA-256 of the text "
        f"{hashlib.sha256(data).hexdigest()}, {'same' if same else 'DIFFERENT'}"
    )
    sys.exit(not same)


if __name__ == "__main__":
    main()
