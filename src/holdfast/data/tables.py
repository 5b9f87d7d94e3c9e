"""Arrow tables (parquet, saved data sets) as records that JSON can hold.

Times, dates and decimals become text. Bytes become text if they are UTF-8, else `{"base64": ...}`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from holdfast.errors import DataError, first_line

BATCH = 1000
"""Number of rows that are in memory at the same time."""

UNPACKED = 100
"""A parquet file may hold 256 MiB, or this many times its size if that is more."""


def parquet_records(path: Path, file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file. Raises DataError: it is not complete or cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        size = sum(table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups))
        if size > max(2**28, UNPACKED * path.stat().st_size):
            raise DataError(
                f"{path} unpacks to {size // 2**20} MiB, more than {UNPACKED} times its size. Write it again "
                "without compression if that is right."
            )
        for batch in table.iter_batches(BATCH):
            yield from table_records(str(path), batch)
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise DataError(f"{path} is not a complete parquet file: {first_line(error)}") from error


def table_records(path: str, batch: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow table or batch.

    Raises:
        DataError: a column has a type that cannot be converted.
    """
    import pyarrow

    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        wanted = _readable(column.type)
        try:
            columns[name] = column if wanted == column.type else column.cast(wanted)
        except pyarrow.ArrowException as error:
            raise DataError(
                f"{path}: the column '{name}' of the type {column.type} cannot be read."
            ) from error
    for record in pyarrow.table(columns).to_pylist():
        yield {name: plain(value, path, name) for name, value in record.items()}


def plain(value: Any, path: str, name: str) -> Any:
    """Return a value as JSON has it."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return {str(key): plain(part, path, name) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part, path, name) for part in value]
    if hasattr(value, "isoformat") or type(value).__name__ in ("Decimal", "UUID", "timedelta"):
        return value.isoformat() if hasattr(value, "isoformat") else str(value)
    raise DataError(f"{path}: the column '{name}' holds a {type(value).__name__}, which cannot be written.")


def _readable(kind: Any) -> Any:
    """Return the Arrow type to read a column as: Python has no value for some times and decimals."""
    import pyarrow
    from pyarrow import types

    if types.is_duration(kind):
        return pyarrow.int64()
    if types.is_temporal(kind) and not types.is_interval(kind):
        return pyarrow.string()
    if types.is_decimal(kind):
        return pyarrow.string()
    if types.is_list(kind) or types.is_large_list(kind):
        inner = _readable(kind.value_type)
        return kind if inner == kind.value_type else pyarrow.list_(inner)
    if types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        read = [pyarrow.field(f.name, _readable(f.type)) for f in fields]
        return (
            kind if all(a.type == b.type for a, b in zip(read, fields, strict=True)) else pyarrow.struct(read)
        )
    return kind
