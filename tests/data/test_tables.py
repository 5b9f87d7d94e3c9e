"""Parquet and saved data sets: values that JSON does not have, names of shards, and limits of size."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from holdfast import data
from holdfast.data import files, packed
from holdfast.errors import DataError

ROW = {"prompt": "a", "response": "b"}


def parquet(path, **columns):
    given = {name: [value] for name, value in ROW.items()} | columns
    pq.write_table(pa.table(given), path)
    return path


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([datetime.datetime(2024, 1, 1, 3)]), "2024-01-01 03:00:00.000000"),
        (pa.array([10**15], pa.timestamp("ms")), None),
        (pa.array([1], pa.date32()), "1970-01-02"),
        (pa.array([1], pa.time64("us")), "00:00:00.000001"),
        (pa.array([2**62], pa.duration("s")), 2**62),
        (pa.array([decimal.Decimal("1.50")]), "1.50"),
        (pa.array([b"text"]), "text"),
        (pa.array([b"\xff\xfe"]), {"base64": "//4="}),
        (
            pa.array([[{"at": datetime.datetime(2024, 1, 1), "n": 1}]]),
            [{"at": "2024-01-01 00:00:00.000000", "n": 1}],
        ),
        (pa.array(["x"]).dictionary_encode(), "x"),
        (pa.array([None], pa.timestamp("s")), None),
    ],
)
def test_values_become_json(tmp_path, column, expected):
    (record,) = data.read_records(parquet(tmp_path / "a.parquet", value=column)).records
    json.dumps(record, allow_nan=False)
    assert {name: record[name] for name in ROW} == ROW
    if expected is not None:
        assert record["value"] == expected


def test_bytes_as_the_prompt_are_text_or_refused(tmp_path):
    loaded = data.read_records(parquet(tmp_path / "a.parquet", prompt=pa.array([b"question"])))
    assert data.to_rows(loaded, role="user")[0]["instruction"] == "question"
    with pytest.raises(DataError, match="row 1: the prompt is of the type dict"):
        data.to_rows(
            data.read_records(parquet(tmp_path / "b.parquet", prompt=pa.array([b"\xff"]))), role="user"
        )


def test_times_in_a_saved_data_set(tmp_path):
    import datasets

    datasets.Dataset(
        pa.table({**{k: [v] for k, v in ROW.items()}, "at": pa.array([1], pa.date32())})
    ).save_to_disk(tmp_path / "d")
    assert data.read_records(tmp_path / "d").records == [{**ROW, "at": "1970-01-02"}]


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002-a09b74b3ef9c3b56.parquet", "train-00001-of-00002-0b1c2d3e4f5a6b7c.parquet"],
        ["0000.parquet", "0001.parquet"],
        [
            "part-00000-5f1c9a52-1d1f-4b52-9a90-0c1a2b3c4d5e-c000.snappy.parquet",
            "part-00001-5f1c9a52-c000.parquet",
        ],
        ["train/0000.parquet", "train/0001.parquet"],
    ],
)
def test_names_of_shards(tmp_path, names):
    for name in names:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        parquet(tmp_path / "d" / name)
    assert data.read_records(tmp_path / "d").records == [ROW, ROW]
    assert not data.has_split(tmp_path / "d", "test")


def test_an_unpacked_size_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "LEAST", 2**16)
    path = tmp_path / "a.jsonl.gz"
    line = json.dumps(ROW).encode() + b"\n"
    path.write_bytes(gzip.compress(line + b" " * 2**20))
    with pytest.raises(DataError, match="unpacks to more than 100 times its size"):
        _ = data.read_records(path).records
    path.write_bytes(gzip.compress(line * 1000))
    assert len(data.read_records(path).records) == 1000


def test_a_line_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CELL_LIMIT", 100)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + " " * 200)
    with pytest.raises(DataError, match="line 2: the line is longer"):
        _ = data.read_records(path).records
