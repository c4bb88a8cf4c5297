"""A folder for results that may lie on this machine or behind any address that fsspec knows."""

from pathlib import Path

from effnb.common import write_atomically


class Store:
    """Files below one folder, read and written whole; a reader never sees half of one.

    Args:
        out: a folder, or an address such as ``"s3://bucket/sweep"`` or ``"memory://sweep"``.

    Raises:
        ImportError: if the address needs a package that is not installed, naming it.
        ValueError: if fsspec does not know the protocol.

    >>> store = Store("memory://demo"); store.write("a/b.txt", b"x"); store.read("a/b.txt"), store.read("none")
    (b'x', None)
    """

    def __init__(self, out: str | Path) -> None:
        self.out = str(out).rstrip("/")
        self.files = None
        if "://" in self.out:
            import fsspec

            self.files, self.base = fsspec.core.url_to_fs(self.out)

    def path(self, name: str) -> str:
        """Return the full path or address of a file."""
        return f"{self.out}/{name}"

    def read(self, name: str) -> bytes | None:
        """Return a file's content, or None where there is none."""
        try:
            return self.files.cat_file(f"{self.base}/{name}") if self.files else Path(self.path(name)).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, raw: bytes) -> None:
        """Write a file at once: renamed into place here, sent in one piece elsewhere."""
        if self.files is None:
            write_atomically(Path(self.path(name)), raw)
        else:
            self.files.makedirs(f"{self.base}/{name}".rpartition("/")[0], exist_ok=True)
            self.files.pipe_file(f"{self.base}/{name}", raw)
