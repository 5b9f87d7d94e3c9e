"""Weights on disk as a mapping from name to lazy tensor: safetensors files, sharded or not, without torch.

A tensor is read whole or in blocks of rows, into a buffer that the caller may give. Reads are positioned, so
threads can share a file, and no mapped page stays resident.

Headers are not trusted: lengths, offsets and shapes are checked against the file before any byte of a
tensor is read. Links out of the folder are not followed (see `weights/files.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.errors import ModelError
from holdfast.weights.files import read_config, safe_path
from holdfast.weights.floats import FLOATS, Floats, are_finite, to_float32
from holdfast.weights.folders import find_model

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000
"""The limit of the safetensors format, in bytes."""
BLOCK = 2**24
"""The largest part of a tensor that is in memory at a time, in bytes."""

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **dict.fromkeys(("F4", "F6_E2M3", "F6_E3M2"), 0),  # packed: the size is not checked
}
"""Bits per value, by the name of the dtype in a safetensors header."""


class WeightFile:
    """One open safetensors file: its tensors by name, and positioned reads that threads can share.

    Raises:
        ModelError: the file cannot be read, or its header is not valid safetensors.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise ModelError(f"{path} is not a regular file. Fetch or save the model again.")
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise ModelError(f"Cannot read {path}: {error.strerror or error}.") from None
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.tensors = {tensor.name: tensor for tensor in self._tensors()}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file. Its tensors can no longer be read."""
        self._file.close()

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` with the bytes from position `start`.

        Raises:
            ModelError: the file is too short, or it cannot be read.
        """
        done = 0
        try:
            while done < len(buffer):
                got = self._pread(buffer[done:], start + done)
                if not got:
                    raise ModelError(f"{self.path} ended while it was being read. Fetch or save it again.")
                done += got
        except OSError as error:
            raise ModelError(f"Cannot read {self.path}: {error.strerror or error}.") from None

    def sample(self) -> bytes:
        """A digest of the size, of the first MiB (which begins with the header) and of 63 blocks of 4 KiB."""
        digest = hashlib.sha256(str(self.size).encode())
        for i in range(64):
            start = i * max(self.size - 4096, 0) // 63
            block = bytearray(min(4096 if i else 2**20, self.size - start))
            self.read_into(memoryview(block), start)
            digest.update(block)
        return digest.digest()

    def _pread(self, buffer: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], start)
        with self._lock:  # the system has no positioned reads
            self._file.seek(start)
            return self._file.readinto(buffer) or 0

    def _tensors(self) -> Iterator[Tensor]:
        if self.size < 8:
            raise self._torn(f"{self.size} bytes")
        head = bytearray(8)
        self.read_into(memoryview(head), 0)
        length = int.from_bytes(head, "little")
        if length > min(HEADER_LIMIT, self.size - 8):
            raise self._torn(f"a header of {length:,} bytes in a file of {self.size:,}")
        text = bytearray(length)
        self.read_into(memoryview(text), 8)
        header = self._parse(bytes(text))
        header.pop("__metadata__", None)
        data, end, spans = 8 + length, 0, []
        for name, entry in header.items():
            tensor = self._tensor(name, entry, data)
            spans.append((tensor.offset, tensor.offset + tensor.nbytes, name))
            yield tensor
        end = data
        for first, last, name in sorted(spans):
            if first != end:
                raise self._torn(f"'{name}' overlaps another tensor or leaves a gap")
            end = last
        if end != self.size:
            raise self._torn(f"{self.size - end:,} bytes belong to no tensor")

    def _parse(self, text: bytes) -> dict[str, Any]:
        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            if len(dict(pairs)) < len(pairs):
                raise ValueError("a name appears twice")
            return dict(pairs)

        try:
            header = json.loads(text, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise self._torn(f"its header is not JSON: {str(error)[:80]}") from None
        if not isinstance(header, dict):
            raise self._torn("its header is not a table of tensors")
        return header

    def _tensor(self, name: str, entry: Any, data: int) -> Tensor:
        try:
            dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = dtype in BITS and len(shape) <= 32 and name.isprintable()
            sound = sound and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, first, last))
        except (TypeError, KeyError, ValueError):
            sound = False
        if not sound:
            raise self._torn(f"{name[:200]!r} has no valid dtype, shape and offsets")
        if not first <= last <= self.size - data:
            raise self._torn(f"'{name}' extends beyond the end of the file")
        if BITS[dtype] and math.prod(shape) * BITS[dtype] // 8 != last - first:
            raise self._torn(f"'{name}' of shape {list(shape)} and dtype {dtype} has {last - first:,} bytes")
        return Tensor(name, dtype, shape, self, data + first, last - first)

    def _torn(self, found: str) -> ModelError:
        return ModelError(
            f"{self.path} is damaged or not a safetensors file ({found[:300]}). Fetch or save it again."
        )


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor that is still on disk.

    Attributes:
        dtype: in the spelling of safetensors: "BF16", "F16", "F32", ...
        offset: position of its first byte in the file.
        nbytes: size in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: WeightFile
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes per row, that is, per index of the first dimension."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes

    def raw(self, first: int = 0, last: int | None = None, out: NDArray[np.uint8] | None = None) -> Any:
        """Return the bytes of rows `first` to `last` as stored: uint8, at the start of `out` if given."""
        last = (self.shape[0] if self.shape else 1) if last is None else last
        size = (last - first) * self.row_bytes
        buffer = np.empty(size, np.uint8) if out is None else out[:size]
        self.file.read_into(buffer.data, self.offset + first * self.row_bytes)
        return buffer

    def read(self, first: int = 0, last: int | None = None) -> Floats:
        """Return rows `first` to `last` (by default the whole tensor) as a new float32 array.

        Raises:
            ModelError: the tensor does not hold plain floating-point numbers, or the file is too short.
        """
        self.check_floats()
        rows = (self.shape[0] if last is None else last) - first if self.shape else 1
        shape = (rows, *self.shape[1:]) if self.shape else ()
        return to_float32(self.raw(first, last), self.dtype).reshape(shape)

    def check_floats(self) -> None:
        """Check that the tensor holds plain floating-point values and not quantised weights.

        Raises:
            ModelError: its dtype is not in `FLOATS`.
        """
        if self.dtype not in FLOATS:
            raise ModelError(
                f"'{self.name}' in {self.file.path} is stored as {self.dtype}, as in a quantised model. "
                "Give the folder of the unquantised model (bf16, fp16 or fp32)."
            )

    def check_finite(self) -> None:
        """Check that the tensor holds plain floating-point numbers without NaN and infinity; reads all of it.

        Raises:
            ModelError: its dtype is not in `FLOATS`, or a value is not finite.
        """
        self.check_floats()
        if not all(are_finite(self.raw(*rows), self.dtype) for rows in row_blocks(self)):
            raise ModelError(
                f"'{self.name}' in {self.file.path} holds values that are not finite (NaN or infinity). "
                "Save or fetch the weights again."
            )


def row_blocks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Yield row ranges of a tensor in blocks of at most `BLOCK` bytes (or one row)."""
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, BLOCK // max(1, tensor.row_bytes))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


class Weights(Mapping[str, Tensor]):
    """All tensors of a model by name. It is a context manager that closes the files on exit.

    Attributes:
        config: the settings of a model that is not in a folder; None if `folder` has a `config.json`.
    """

    def __init__(
        self,
        folder: Path,
        files: list[WeightFile],
        tensors: dict[str, Tensor],
        config: Mapping[str, Any] | None = None,
    ):
        self.folder = folder
        self.files = files
        self.config = config
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.close()


def open_weights(model: str | Path, revision: str | None = None) -> Weights:
    """Open the weights of a model folder or Hub id. Only headers are read.

    Raises:
        ModelError: there is no such model; one of its files is missing, damaged, unreadable or a link out of
            the folder; or the index does not match the files.
    """
    folder = find_model(str(model), revision)
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() or single.is_symlink():  # the same order as in transformers
        return open_files(folder, [SINGLE])
    if index.exists() or index.is_symlink():
        return _open_sharded(folder, index)
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(found) == 1:
        return open_files(folder, found)
    raise ModelError(
        f"{folder} holds {len(found)} safetensors files but no {INDEX} that maps tensors to files. "
        "Fetch or save the model again."
    )


def same_content(ours: Sequence[WeightFile], theirs: Sequence[WeightFile]) -> bool:
    """Whether two lists of weight files hold the same bytes under the same names; stops at a difference."""
    if [(file.path.name, file.size) for file in ours] != [(file.path.name, file.size) for file in theirs]:
        return False
    return all(_same_bytes(one, other) for one, other in zip(ours, theirs, strict=True))


def _same_bytes(one: WeightFile, other: WeightFile, block: int = 2**24) -> bool:
    for start in range(0, one.size, block):
        here, there = (bytearray(min(block, one.size - start)) for _ in range(2))
        one.read_into(memoryview(here), start)
        other.read_into(memoryview(there), start)
        if here != there:
            return False
    return True


def open_files(folder: Path, names: list[str]) -> Weights:
    """Open the safetensors files `names` in `folder`, which must not share a tensor name.

    Raises:
        ModelError: as in `open_weights`.
    """
    files: list[WeightFile] = []
    tensors: dict[str, Tensor] = {}
    try:
        for name in names:
            files.append(WeightFile(safe_path(folder, name)))
            twice = tensors.keys() & files[-1].tensors.keys()
            if twice:
                raise ModelError(f"'{min(twice)}' is in two weight files of {folder}. Save it again.")
            tensors |= files[-1].tensors
    except BaseException:
        for file in files:
            file.close()
        raise
    return Weights(folder, files, tensors)


def _open_sharded(folder: Path, index: Path) -> Weights:
    table = read_config(safe_path(folder, index.name))
    places = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise ModelError(f"{index} has no weight_map from tensors to files. Fetch the model again.")
    weights = open_files(folder, sorted(set(places.values())))
    for name, file in places.items():
        if name not in weights or weights[name].file.path.name != Path(file).name:
            weights.__exit__()
            raise ModelError(f"{index} says that '{name}' is in {file}, but it is not. Fetch it again.")
    return weights
