"""The store: identities, atomic writes, locks, completion."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from holdfast.errors import OutputError
from holdfast.machine import digests as digests_module
from holdfast.machine import store as module
from holdfast.machine.digests import sealed
from holdfast.machine.files import replace_folder, write_json, write_text
from holdfast.machine.store import DIGESTS, Store, claim_folder, identity_hash


def test_identity_does_not_depend_on_order():
    assert identity_hash({"a": 1, "b": [1, 2]}) == identity_hash({"b": [1, 2], "a": 1})
    assert identity_hash({"a": 1}) != identity_hash({"a": 2})
    with pytest.raises(ValueError, match="JSON"):
        identity_hash({"a": float("nan")})


def test_half_surrogates_have_an_identity():
    assert identity_hash(["\ud800"]) != identity_hash(["\ud801"])


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_step_is_complete_only_with_its_files(tmp_path):
    store = Store(tmp_path)
    folder = store.path("train-1")
    folder.mkdir()
    (folder / "weights").write_text("12345")
    assert store.record("train-1") is None
    assert store.begun("train-1")
    store.complete("train-1", {"seconds": 1})
    digest = "5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5"
    assert store.record("train-1")["files"] == {"weights": {"bytes": 5, "sha256": digest}}
    assert not store.begun("train-1")
    assert store.damage("train-1") is None
    for text in ("1", "12346"):
        (folder / "weights").write_text(text)
        assert store.record("train-1") is None, "neither size nor content may change"
        assert store.damage("train-1") == "changed or missing: weights"
    (folder / "weights").write_text("12345")
    assert store.record("train-1") is not None
    (folder / "weights").unlink()
    assert store.record("train-1") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:20],
        lambda text: text.replace("12.5", "11.5"),
        lambda text: "[]",
        lambda text: "\udcff",
        lambda text: json.dumps(json.loads(text) | {"files": []}),
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "record_sha256"}),
        lambda text: json.dumps(sealed(json.loads(text) | {"files": []})),
        lambda text: json.dumps(sealed(json.loads(text) | {"files": {"weights": 5}})),
        lambda text: json.dumps(sealed({"files": {"\x00": {"bytes": 1, "sha256": ""}}})),
    ],
)
def test_a_changed_record_is_damage(change, tmp_path):
    store, path = Store(tmp_path), tmp_path / "train-1" / "step.json"
    path.parent.mkdir()
    (path.parent / "weights").write_text("12345")
    written = store.complete("train-1", {"seconds": 12.5, "pairs": (1, 2), "by": {3: "x"}})
    assert store.record("train-1") == json.loads(json.dumps(written))
    path.write_bytes(change(path.read_text()).encode(errors="surrogateescape"))
    assert store.record("train-1") is None
    assert store.damage("train-1")
    assert store.begun("train-1")


def test_a_step_that_never_ended_is_not_damaged(tmp_path):
    (tmp_path / "train-1").mkdir()
    assert Store(tmp_path).damage("train-1") is None
    assert Store(tmp_path).damage("train-2") is None


def test_a_large_file_is_read_once(tmp_path, monkeypatch):
    store, file = Store(tmp_path, read_only=False), tmp_path / "train-1" / "weights"
    store.digests = digests_module.Digests(tmp_path / DIGESTS, large=3, settled=-1.0)
    file.parent.mkdir()
    file.write_text("12345")
    store.complete("train-1", {})
    reads = []
    whole = digests_module.hashlib.file_digest
    monkeypatch.setattr(digests_module.hashlib, "file_digest", lambda *a: reads.append(1) or whole(*a))
    assert Store(tmp_path).record("train-1") is not None
    assert not reads
    file.write_text("12346")
    os.utime(file, (1, 1))
    assert Store(tmp_path).record("train-1") is None
    assert reads


def test_claim_takes_new_and_empty_folders_and_its_own(tmp_path):
    for folder in (tmp_path / "new" / "deep", tmp_path):
        claim_folder(folder, "run") if folder != tmp_path else None
    claim_folder(tmp_path / "new" / "deep", "run")
    assert json.loads((tmp_path / "new" / "deep" / "holdfast.json").read_text())["kind"] == "run"


@pytest.mark.parametrize("kind", ["file", "full", "other", "damaged", "no text"])
def test_claim_refuses_what_is_not_ours(tmp_path, kind):
    place = tmp_path / "out"
    if kind == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        text = {"full": None, "other": '{"kind": "demo"}', "damaged": "{", "no text": "\xff"}[kind]
        (place / ("holdfast.json" if text else "thesis.txt")).write_text(
            text or "years of work", encoding="latin-1"
        )
    before = sorted((p.name, p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="--out"):
        claim_folder(place, "run")
    assert sorted((p.name, p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*")) == before


def hold(root, started, seconds):
    with Store(root).lock("s"):
        started.set()
        time.sleep(seconds)


def test_a_lock_is_waited_for_and_freed_by_a_kill(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    other = context.Process(target=hold, args=(tmp_path, started, 60))
    other.start()
    assert started.wait(10)
    waited = []

    def waiting():
        waited.append(True)
        os.kill(other.pid, 9)

    with Store(tmp_path).lock("s", waiting):
        assert waited
    other.join()


def test_a_folder_comes_back_where_its_replacement_fails(tmp_path, monkeypatch):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    whole, renamed = Path.rename, []

    def fails(self, target):
        renamed.append(self.name)
        if self.name == "new":
            raise OSError(13, "Permission denied")
        return whole(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="Permission"):
            replace_folder(tmp_path / "new", tmp_path / "old")
    assert renamed == ["old", "new", "old"]
    assert (tmp_path / "old" / "file").read_text() == "old"
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
