"""Compressed files as streams whose unpacked size has a limit."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import IO, Any

from holdfast.errors import DataError

PACKED = {".gz": "gzip", ".xz": "xz"}
LEAST, FACTOR = 2**28, 100
"""A file may unpack to 256 MiB, or to 100 times its size if that is more. Text rarely exceeds 20 times."""


def unpacked(path: Path, file: IO[bytes]) -> io.BufferedReader:
    """Return the content of a file as a stream; a file that is not compressed is returned as it is."""
    kind = PACKED.get(path.suffix.lower())
    if kind is None:
        return file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)  # type: ignore[arg-type]
    inner = gzip.GzipFile(fileobj=file) if kind == "gzip" else lzma.LZMAFile(file)  # noqa: SIM115
    return io.BufferedReader(_Limited(path, kind, inner), 2**16)


class _Limited(io.RawIOBase):
    """Reads a compressed stream; raises DataError if it is torn or unpacks to too much."""

    def __init__(self, path: Path, kind: str, inner: Any):
        super().__init__()
        self.path, self.kind, self.inner = path, kind, inner
        self.left = max(LEAST, FACTOR * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.inner.read1(len(buffer)) if self.kind == "gzip" else self.inner.read(len(buffer))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{self.path} is not a complete {self.kind} file: {error}.") from error
        self.left -= len(data)
        if self.left < 0:
            raise DataError(
                f"{self.path} unpacks to more than {FACTOR} times its size, which is not expected of text. "
                "Unpack it yourself if that is right, and give the unpacked file."
            )
        buffer[: len(data)] = data
        return len(data)
