"""Reading files: every accepted kind works, and everything else is an error with file and line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from holdfast import data
from holdfast.errors import DataError

ROWS = [
    {"prompt": 'Say é, "x"\nand\u2028go', "response": "é"},
    {"prompt": "a\tb", "response": "two\r\nlines"},
]


def fails(path: Path, *expected: str) -> str:
    with pytest.raises(DataError) as caught:
        _ = data.read_records(path).records
    for text in expected:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_jsonl_round_trip(tmp_path, suffix, end, bom):
    lines = [json.dumps(ROWS[0], ensure_ascii=False), "", json.dumps(ROWS[1])]
    loaded = data.read_records(write(tmp_path / f"a{suffix}", bom + end.join(lines) + end))
    assert loaded.records == ROWS
    assert loaded.place(1).endswith("line 3")


@pytest.mark.parametrize("whole", [ROWS, {"data": ROWS}])
def test_json_list(tmp_path, whole):
    path = write(tmp_path / "a.json", json.dumps(whole, indent=1))
    assert data.read_records(path).records == ROWS


def test_csv_quotes_and_lines(tmp_path):
    text = 'prompt,response\r\n"a ""b"",\nc",d\r\n\r\ne,"f"\r\n'
    loaded = data.read_records(write(tmp_path / "a.csv", text))
    assert loaded.records == [{"prompt": 'a "b",\nc', "response": "d"}, {"prompt": "e", "response": "f"}]
    assert [loaded.place(i)[-6:] for i in (0, 1)] == ["line 2", "line 5"]


def test_csv_cell_beyond_pythons_limit(tmp_path):
    long = "x" * 200_000
    assert data.read_records(write(tmp_path / "a.csv", f"a,b\n{long},1\n")).records[0]["a"] == long


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tsv_quotes_are_plain(tmp_path, end):
    text = end.join(["sentence\tlabel", 'he said "oh , no\t0', '"well" , he \'s in\t1', ""])
    loaded = data.read_records(write(tmp_path / "a.tsv", text))
    assert loaded.records == [
        {"sentence": 'he said "oh , no', "label": "0"},
        {"sentence": '"well" , he \'s in', "label": "1"},
    ]


def test_parquet_gz_and_hf_folders(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert data.read_records(tmp_path / "a.parquet").records == ROWS

    packed = gzip.compress("".join(json.dumps(r) + "\n" for r in ROWS).encode())
    assert data.read_records(write(tmp_path / "a.jsonl.gz", packed)).records == ROWS
    fails(write(tmp_path / "torn.jsonl.gz", packed[:-12]), "not a complete gzip file")

    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    assert data.read_records(tmp_path / "one").records == ROWS
    assert not data.has_split(tmp_path / "one", "test")
    datasets.DatasetDict(train=whole, test=whole.select([1])).save_to_disk(tmp_path / "two")
    assert data.read_records(tmp_path / "two").records == ROWS
    assert data.read_records(tmp_path / "two", split="test").records == ROWS[1:]
    next((tmp_path / "two" / "train").glob("*.arrow")).write_bytes(b"torn")
    fails(tmp_path / "two", "two/train")


def test_folder_with_a_file_for_each_split(jsonl, tmp_path):
    jsonl("d/data/train-00000-of-00002.jsonl", ROWS[:1])
    jsonl("d/data/train-00001-of-00002.jsonl", ROWS[1:])
    jsonl("d/data/validation.jsonl", ROWS[1:])
    (tmp_path / "d" / "README.md").write_text("# card")
    loaded = data.read_records(tmp_path / "d")
    assert loaded.records == ROWS
    assert "train-00001" in loaded.place(1)
    assert data.has_split(tmp_path / "d", "test")
    jsonl("only/test.jsonl", ROWS)
    assert not data.has_split(tmp_path / "only", "test"), "the same rows would train and test"
    assert data.read_records(tmp_path / "only").records == ROWS
    jsonl("only/validation.jsonl", ROWS)
    assert data.has_split(tmp_path / "only", "test")
    assert data.read_records(tmp_path / "d", split="test").records == ROWS[1:]
    jsonl("b/30k_train.jsonl", ROWS)
    jsonl("b/30k_test.jsonl", ROWS[:1])
    assert data.read_records(tmp_path / "b", split="test").records == ROWS[:1]
    jsonl("c/one.jsonl", ROWS)
    jsonl("c/two.jsonl", ROWS)
    fails(tmp_path / "c", "one, two", "Give the path of a file")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b', ["a.jsonl, line 2", "not complete JSON"]),
        ("a.jsonl", '{"a": 1}\n[1]\n', ["line 2", "expected a JSON object, found a list"]),
        ("a.jsonl", "[\n" + json.dumps(ROWS[0]) + "\n]", ["line 1", "name it .json"]),
        ("a.jsonl", "3\n", ["line 1", "found a number"]),
        ("a.jsonl", "", ["is empty"]),
        ("a.jsonl", "\n \n", ["has no rows"]),
        ("a.jsonl", b"\x89PNG\r\n\x1a\n\0\0\0", ["line 3", "binary data"]),
        ("a.csv", bytes(range(1, 32)) * 20 + b"\xff\xfd", ["binary data"]),
        ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', ["line 2", "not UTF-8", "0xe9", "Windows-1252"]),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), ["UTF-16", "Save it as UTF-8"]),
        ("a.jsonl", "[" * 100_000, ["line 1", "nested too deeply"]),
        ("a.jsonl", '{"a": ' + "1" * 5000 + "}", ["line 1"]),
        ("a.json", '[{"a": 1},\n{"a"', ["line 2", "not complete JSON"]),
        ("a.json", "{\n}", ["expected a list of objects", "found an object"]),
        ("a.json", '[{"a": 1}, null]', ["item 2", "found null"]),
        ("a.csv", "a,b\n1,2\n3\n", ["line 3", "1 cells, but the header has 2 (a, b)"]),
        ("a.csv", 'a,b\n1,2\n3,"4\n5', ["line 3", "quote"]),
        ("a.csv", 'a,b\n1,"2"x\n', ["line 2", "quote"]),
        ("a.csv", "a,a\n1,2\n", ["'a' twice"]),
        ("a.csv", "a,\n1,2\n", ["without a name"]),
        ("a.csv", "a,b\n", ["has no rows"]),
        ("a.tsv", "a\tb\n1\t2\t3\n", ["line 2", "3 cells"]),
        ("a.parquet", b"PAR1 no more", ["not a complete parquet file"]),
        ("a.parquet", "", ["is empty"]),
        ("a.txt", "hello", ["not a known kind", ".parquet"]),
        ("a", "hello", ["not a known kind"]),
    ],
)
def test_bad_files(tmp_path, name, content, expected):
    fails(write(tmp_path / name, content), name, *expected)


def test_missing_and_unreadable(tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", json.dumps(ROWS[0]))
    fails(tmp_path / "trian.jsonl", "does not exist", f"Did you mean '{tmp_path / 'train.jsonl'}'?")
    fails(tmp_path / "zzz.csv", "does not exist", "Expected a file")
    fails(tmp_path / "no" / "a.csv", "there is no folder")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "a folder without data files")
    os.mkfifo(tmp_path / "pipe.jsonl")
    fails(tmp_path / "pipe.jsonl", "not a regular file")

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    fails(tmp_path / "train.jsonl", "cannot be read: Permission denied")
    with pytest.raises(DataError, match="cannot be read"):
        data.fingerprint(tmp_path / "train.jsonl")


@pytest.mark.parametrize("source", ["", "x" * 5000, "a\0b", "nothing.jsonl", "deep/er/path", "own"])
def test_names_of_nothing(source):
    with pytest.raises(DataError):
        data.read_records(source)
    with pytest.raises(DataError):
        data.fingerprint(source)


def test_fingerprint_is_of_the_content(tmp_path, jsonl):
    one, two = jsonl("one/a.jsonl", ROWS), jsonl("two/b.ndjson", ROWS)
    assert data.fingerprint(one) == data.fingerprint(str(two))
    assert data.fingerprint(one) != data.fingerprint(jsonl("c.jsonl", ROWS[:1]))
    # The same bytes read as another kind of file are other rows.
    assert data.fingerprint(write(tmp_path / "a.csv", "a\n1\n")) != data.fingerprint(
        write(tmp_path / "a.tsv", "a\n1\n")
    )
    for place in ("x", "y"):
        jsonl(f"{place}/train.jsonl", ROWS)
        jsonl(f"{place}/test.jsonl", ROWS[:1])
    assert data.fingerprint(tmp_path / "x") == data.fingerprint(tmp_path / "y")
    assert data.fingerprint(tmp_path / "x", split="train") == data.fingerprint(one)
    jsonl("y/test.jsonl", ROWS[1:])
    assert data.fingerprint(tmp_path / "x") != data.fingerprint(tmp_path / "y")


class TestHub:
    def test_id_and_task_names_reach_the_hub(self, monkeypatch):
        import datasets

        asked = []

        def load_dataset(*args, **options):
            asked.append((*args, options["split"], options["revision"]))
            return datasets.Dataset.from_list(ROWS)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert data.read_records("me/mine:plain@v1.0").records == ROWS
        assert data.read_records("sst2", split="test").licence
        loaded = data.read_records("beavertails", role="harmful")
        assert (loaded.licence, loaded.name) == ("CC-BY-NC-4.0", "PKU-Alignment/BeaverTails")
        assert "harmful" in loaded.warning
        data.read_records("gsm8k")
        data.read_records("agnews", split="test")
        assert asked == [
            ("me/mine", "plain", "train", "v1.0"),
            ("stanfordnlp/sst2", None, "validation", None),
            ("PKU-Alignment/BeaverTails", None, "30k_train", None),
            ("openai/gsm8k", "main", "train", None),
            ("fancyzhx/ag_news", None, "test", None),
        ]

    def test_pinned_revision_needs_no_network(self):
        assert data.fingerprint("me/mine@" + "a" * 40, split="train") == f"hub:me/mine@{'a' * 40}:train"

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (ConnectionError("offline"), "cannot be reached"),
            (FileNotFoundError("Dataset 'x' is a gated dataset on the Hub."), "accept its terms"),
            (type("DatasetNotFoundError", (FileNotFoundError,), {})("no"), "no such data set"),
            (ValueError('Unknown split "train".\nmore'), 'Unknown split "train".'),
        ],
    )
    def test_what_to_do(self, monkeypatch, error, expected):
        import datasets

        def load_dataset(*args, **options):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(DataError, match="'me/mine'") as caught:
            data.read_records("me/mine")
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
