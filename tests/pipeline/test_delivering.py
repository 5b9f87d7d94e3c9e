"""`--push`: what a run delivers, and that it goes to a fake Hub only if asked, private, and checked before training."""

from __future__ import annotations

import json

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner

import tiny
from fake_hub import hub
from holdfast.cli.app import app
from holdfast.errors import OutputError, RecipeError
from holdfast.pipeline import delivering
from holdfast.recipe import Recipe
from holdfast.weights import pushing
from runs import run


@pytest.fixture
def server(monkeypatch):
    """A Hub to which a user is logged in."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with hub() as made:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.address)
        yield made


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a complete run, with its recipe beside it."""
    folder = tmp_path_factory.mktemp("run")
    made = tiny.recipe(folder / "in")
    (folder / "recipe.json").write_text(json.dumps(made))
    run(made, folder / "out")
    return folder


def test_a_run_is_uploaded_with_card_and_results(done, server):
    again = ("run", done / "recipe.json", "--out", done / "out", "--device", "cpu")
    assert invoke(*again).exit_code == 0
    assert server.calls == [], "nothing is sent unless it is asked for"
    found = invoke(*again, "--push", "me/tiny")
    assert found.exit_code == 0, found.output
    assert f"Uploaded: {server.address}/me/tiny (private)" in found.output
    repo = server.repos["me/tiny"]
    assert repo["private"] is True
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "results.json"} <= set(
        repo["files"]
    )
    card = repo["files"]["README.md"].decode()
    row = json.loads((done / "out" / "results.json").read_text())["rows"][-1]
    assert f"| {row['name']} | {row['harmful_score']:.1f} ± {row['harmful_score_stderr']:.1f} |" in card
    assert "SFT → Lisa, made with Holdfast" in card
    assert "Not measured: benign compliance" in card
    assert json.loads(repo["files"]["adapter_config.json"])["r"] == 4, "both adapters in one"
    every = b"".join(repo["files"].values())
    assert str(done).encode() not in every, "no path of this machine"
    assert not [name for name in repo["files"] if name.endswith((".jsonl", ".html"))], "no answers"


def test_single_lora_and_a_repair(tmp_path):
    made = {adapter: tiny.recipe(tmp_path / "in") for adapter in ("new", "continue")}
    for name in ("a", "b", "c"):
        (tmp_path / name / "adapter").mkdir(parents=True)
    found = {}
    for adapter, raw in made.items():
        raw["user"] |= {"adapter": adapter}
        for repair in (None, "c"):
            row = {"steps": {"alignment": "a", "user": "b", "post_hoc": repair}}
            folders = delivering.adapters(Recipe.model_validate(raw), row, tmp_path)
            found[adapter, repair] = "".join(folder.parent.name for folder in folders)
    assert found == {
        ("new", None): "ab", ("new", "c"): "ac", ("continue", None): "b", ("continue", "c"): "c",
    }  # fmt: skip
    rows = [{"name": n, "role": role, "steps": steps} for n, role, steps in (
        ("aligned", "reference", {}), ("repaired", "defended", {}), ("dropped", "control", {}),
        ("attacked", "undefended", {"tamper": "x"}),
    )]  # fmt: skip
    assert delivering.last(rows)["name"] == "repaired"


def test_what_cannot_be_delivered_is_refused_before_training(tmp_path, server):
    made = tiny.recipe(tmp_path / "in", alignment={"defense": "sft", "lora": "none"})
    with pytest.raises(OutputError, match="trains all weights"):
        delivering.check(Recipe.model_validate(made))
    with pytest.raises(OutputError, match="trains nothing"):
        delivering.check(Recipe.model_validate(tiny.recipe(tmp_path / "in", alignment="none", user="none")))
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(tiny.recipe(tmp_path / "in")))
    server.refuses = True
    for arguments, kind, text in (
        (["--push", "me/x"], OutputError, "Log in with: hf auth login"),
        (["--push", "me/x/y"], OutputError, "expected a repository such as"),
        (["--public"], RecipeError, "--public needs --push"),
    ):
        found = invoke("run", path, "--out", tmp_path / "out", *arguments)
        assert isinstance(found.exception, kind)
        assert text in str(found.exception)
    assert not (tmp_path / "out").exists()


def test_a_public_repository_is_not_used_without_public(tmp_path, server):
    (tmp_path / "a.txt").write_text("x")
    server.repos["me/open"] = {"private": False, "files": {}}
    with pytest.raises(OutputError, match="exists and is public"):
        pushing.push(tmp_path, "me/open")
    pushing.push(tmp_path, "me/open", public=True)
    assert server.repos["me/open"]["files"] == {"a.txt": b"x"}
    pushing.push(tmp_path, "me/new", public=True)
    assert server.repos["me/new"]["private"] is False


def test_combine_uploads_its_folder(done, tmp_path, server):
    adapters = sorted((done / "out" / "steps").glob("*/adapter"))
    assert [path.parent.name.partition("-")[0] for path in adapters] == ["alignment", "user"]
    found = invoke("combine", *adapters, "--out", tmp_path / "one", "--push", "me/one")
    assert found.exit_code == 0, found.output
    assert "adapter_model.safetensors" in server.repos["me/one"]["files"]
