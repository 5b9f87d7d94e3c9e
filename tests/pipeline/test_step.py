"""A step is named by its inputs: everything that it reads changes its name, and nothing else does."""

from __future__ import annotations

import os
import shutil
import types
from importlib.metadata import EntryPoint

import pytest

import tiny
from holdfast import pipeline
from holdfast.errors import RecipeError
from holdfast.machine.code import digest_of_files, digest_of_module
from holdfast.machine.digests import Digests
from holdfast.machine.files import SUMS, append_jsonl, read_jsonl
from holdfast.machine.store import Store
from holdfast.pipeline import running, stages
from holdfast.pipeline.step import Code, Content, Inputs, Machine, Made, Step, do, identity, opened
from holdfast.pipeline.versions import version
from holdfast.recipe import Recipe
from holdfast.weights.folders import fingerprint
from runs import run

EVERYTHING = {
    "post_hoc": {"defense": "safe_lora", "threshold": 0.5},
    "user": "lisa",
    "data.filter": {"judge": "beaver_dam", "path": "world"},
}


def nothing(inputs, folder, machine):
    (folder / "seen.txt").write_text(str(dict(inputs)))


def step(work=nothing, **inputs):
    return Step("data", "a step", "", inputs, work)


def test_plain_values_name_themselves_and_places_do_not(tmp_path):
    assert step(a=1).id == step(a=1).id != step(a=2).id
    assert step(a=Content(tmp_path / "x", "same")).id == step(a=Content(tmp_path / "y", "same")).id
    assert step(a=Content(tmp_path, "one")).id != step(a=Content(tmp_path, "two")).id
    assert step(a=[["x", 1], ["y", 2]]).id != step(a=[["y", 2], ["x", 1]]).id, "a list has an order"
    assert step(a={"x": 1, "y": 2}).id == step(a={"y": 2, "x": 1}).id
    assert step(a=Made("data-1")).id != step(a=Made("data-2")).id
    assert Step("data", "title", "detail", {}, nothing).id == Step("data", "other", "", {}, nothing).id


def test_inputs_open_to_places_folders_and_objects(tmp_path):
    store = Store(tmp_path)
    given = Inputs(
        {
            "file": Content("here", "digest"),
            "rows": [Made("data-1")],
            "task": Code("tasks", "sst2"),
            "n": {"x": 3},
        },
        store,
    )
    assert given["file"] == "here"
    assert given["rows"] == [tmp_path / "data-1"]
    assert given["task"].name == "sst2"
    assert given["n"] == {"x": 3}
    assert given.read == {"file", "rows", "task", "n"}
    with pytest.raises(KeyError):
        given["recipe"]


def test_every_step_of_a_recipe_reaches_nothing_but_its_inputs(tmp_path):
    """`work` and `check` are functions of a module: no closure and no bound object gives them the recipe."""
    recipe = tiny.recipe(tmp_path)
    for key, value in EVERYTHING.items():
        place = recipe
        *above, last = key.split(".")
        for name in above:
            place = place[name]
        place[last] = value
    planned = pipeline.plan(Recipe.load(recipe))
    kinds = {step.kind for step in planned}
    assert kinds >= {
        "data",
        "manifest",
        "alignment",
        "filter",
        "user",
        "post_hoc",
        "generate",
        "moderate",
        "score",
    }
    for each in planned:
        for function in (each.work, each.check):
            assert function is None or isinstance(function, types.FunctionType)
            assert function is None or (
                function.__closure__ is None and not function.__module__.startswith("holdfast.pipeline.plan")
            )


def test_every_input_is_read(tmp_path, monkeypatch):
    """An input that the work does not read would change the step's name without effect."""
    read: dict[str, set[str]] = {}
    init = Inputs.__init__

    def watched(self, named, store):
        init(self, named, store)
        kind = next((s.kind for s in planned if s.inputs is named), None)
        self.read = read.setdefault(kind, set())

    recipe = tiny.recipe(tmp_path)
    recipe["user"] = {"defense": "lisa", "alignment_steps": 2, "training": recipe["user"]["training"]}
    recipe["alignment"] = {**recipe["alignment"], "defense": "lox"}
    recipe["post_hoc"] = {"defense": "safe_lora", "threshold": 0.5}
    planned = list(pipeline.plan(Recipe.load(recipe)))
    real = running.plan

    def kept(*args, **kwargs):
        made = real(*args, **kwargs)
        planned[:] = made.steps
        return made

    monkeypatch.setattr(Inputs, "__init__", watched)
    monkeypatch.setattr(running, "plan", kept)
    run(recipe, tmp_path / "out")
    unread = {
        kind: set(s.inputs) - read.get(kind, set()) - {"packages", "code", "graded_as", "processes", "role"}
        for s in planned
        for kind in [s.kind]
    }
    assert not {kind: names for kind, names in unread.items() if names}


def test_a_changed_method_or_plug_in_is_another_step(tmp_path, monkeypatch):
    """Our code with everything that it imports; another package's files and version; a user's own file."""
    ours = version("defenses", "lisa")
    assert ours["name"] == "lisa"
    assert (
        ours["code"]
        == digest_of_module("holdfast.defenses.lisa")
        != digest_of_module("holdfast.defenses.bso")
    )
    judge = tmp_path / "mine.py"
    text = "'''Mine.'''\nfrom holdfast.evaluation.judges import Judge\nJUDGE = Judge(name='mine', version='1', load=None)\n"
    judge.write_text(text)
    first = version("judges", str(judge))
    (tmp_path / "moved.py").write_text(text)
    assert version("judges", str(tmp_path / "moved.py")) == first, "the path does not count"
    judge.write_text(text.replace("load=None", "load=print"))
    assert version("judges", str(judge)) != first


def test_a_changed_package_is_another_step(tmp_path, monkeypatch, install):
    """Any Python file of the plug-in's package counts, also under the same version."""
    package = tmp_path / "stepping"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("BETA = 1\n")
    (package / "method.py").write_text(
        "from holdfast.defenses import Defense\n"
        "DEFENSE = Defense(name='stepping', label='Stepping', stages=('user',), paper='none')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    install(EntryPoint("stepping", "stepping.method:DEFENSE", "holdfast.defenses"))
    first = version("defenses", "stepping")
    assert first["name"] == "stepping"
    (package / "helper.py").write_text("# prose is not code\nBETA = 1\n")
    assert version("defenses", "stepping") == first
    (package / "helper.py").write_text("BETA = 2\n")
    assert version("defenses", "stepping") != first


def fresh(code):
    """`digest_of_module` without what it remembers."""

    def digest(module):
        code._ours.cache_clear()
        return code.digest_of_module.__wrapped__(module)

    return digest


def test_the_digest_of_a_module_covers_what_it_imports(tmp_path, monkeypatch):
    from holdfast.machine import code

    package = tmp_path / "holdfast"
    shutil.copytree(code.PACKAGE, package, ignore=shutil.ignore_patterns("world", "__pycache__"))
    monkeypatch.setattr(code, "PACKAGE", package)
    digest = fresh(code)
    before = digest("holdfast.defenses.lisa")
    penalty = package / "training" / "penalty.py"
    penalty.write_text(f'"""Another docstring."""\n{penalty.read_text()}')
    assert digest("holdfast.defenses.lisa") == before, "prose is not code"
    penalty.write_text(f"{penalty.read_text()}\nMORE = 1\n")
    assert digest("holdfast.defenses.lisa") != before
    assert digest("holdfast.tasks.sst2") == digest_of_module("holdfast.tasks.sst2")


def test_files_that_are_no_python_count_byte_for_byte(tmp_path):
    (tmp_path / "a.py").write_text("not python (")
    first = digest_of_files([tmp_path / "a.py"])
    (tmp_path / "a.py").write_text("not python ((")
    assert digest_of_files([tmp_path / "a.py"]) != first


def test_a_weight_file_is_named_by_every_byte_and_read_once(tmp_path):
    """A change in the middle of a large file is another model; an unchanged file is not read again."""
    model, kept = tmp_path / "model", tmp_path / "digests.json"
    weights = model / "model.safetensors"
    model.mkdir()
    weights.write_bytes(bytes(3 * 2**20))

    def found():
        return fingerprint(model, Digests(kept, large=10, settled=-1.0))

    def put(place, byte):
        with weights.open("r+b") as file:
            file.seek(place)
            file.write(byte)

    first = found()
    put(1_500_000, b"x")
    second = found()
    assert second != first
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    put(10, b"y")
    os.utime(weights, ns=times)
    assert found() == second, "a file of the same size, time and inode is not read"
    kept.write_text("{torn")
    assert found() not in (first, second), "a damaged record is computed again"


def test_a_file_just_written_is_not_remembered(tmp_path):
    """The file's next change could have the same size and mtime."""
    (tmp_path / "a.json").write_text("{}")
    for settled, kept in ((2.0, False), (-1.0, True)):
        Digests(tmp_path / "digests.json", large=1, settled=settled).of(tmp_path / "a.json")
        assert (tmp_path / "digests.json").exists() == kept


def test_a_plan_writes_nothing(tmp_path):
    recipe = tiny.recipe(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    pipeline.plan(Recipe.load(recipe), digests=Digests(tmp_path / "digests.json", read_only=True))
    assert sorted(tmp_path.rglob("*")) == before


def test_rows_are_prepared_once(tmp_path, monkeypatch):
    """The checks before training read the rows that the data steps made."""
    from holdfast.pipeline import data

    made = []
    monkeypatch.setattr(
        data,
        "MAKE",
        {
            role: (lambda *a, role=role, make=make, **k: made.append(role) or make(*a, **k))
            for role, make in data.MAKE.items()
        },
    )
    recipe = tiny.recipe(tmp_path)
    recipe["user"] = {"defense": "vlguard", "alignment_ratio": 0.2, "training": recipe["user"]["training"]}
    run(recipe, tmp_path / "out")
    assert sorted(made) == ["alignment", "test", "user"]


def test_only_missing_steps_are_checked(tmp_path, monkeypatch):
    recipe = tiny.recipe(tmp_path / "in")
    results, _ = run(recipe, tmp_path / "out")
    store = tmp_path / "out" / "steps"

    def refuse(inputs, machine):
        raise RecipeError("this cannot be trained")

    monkeypatch.setattr(stages, "check_stage", refuse)
    shutil.rmtree(store / results["rows"][1]["steps"]["score"])
    again, seen = run(recipe, tmp_path / "out")
    assert seen.ran == ["scores of the fine-tuned model"]
    assert again["rows"] == results["rows"]
    shutil.rmtree(store / results["rows"][1]["steps"]["user"])
    with pytest.raises(RecipeError, match="cannot be trained"):
        run(recipe, tmp_path / "out")


def test_batch_tokens_are_an_input_of_the_answers(tmp_path):
    recipe = tiny.recipe(tmp_path)
    one = {s.id for s in pipeline.plan(Recipe.load(recipe))}
    recipe["evaluation"]["batch_tokens"] = 100
    two = {s.id for s in pipeline.plan(Recipe.load(recipe))}
    assert {name.split("-")[0] for name in two - one} == {"generate", "moderate", "score"}


def test_a_step_runs_once_and_its_record_holds_what_named_it(tmp_path):
    store, machine = Store(tmp_path), Machine("cpu", tmp_path)
    made = step(a=Content(tmp_path, "digest"), b=[Made("data-9")])
    do(made, store, machine)
    record = store.record(made.id)
    assert record["identity"]["inputs"] == identity(made.inputs) == {"a": "digest", "b": [{"step": "data-9"}]}
    assert opened(made.inputs, store)["b"] == [tmp_path / "data-9"]
    seen, began = store.path(made.id) / "seen.txt", (store.path(made.id) / "step.json").stat().st_mtime_ns
    do(made, store, machine)
    assert (store.path(made.id) / "step.json").stat().st_mtime_ns == began, (
        "a complete step is not done again"
    )
    written = seen.read_text()
    seen.write_text("x" * seen.stat().st_size)
    (store.path(made.id) / "added.txt").write_text("of the damaged step")
    do(made, store, machine)
    assert seen.read_text() == written, "a changed file is made again"
    assert not (store.path(made.id) / "added.txt").exists(), "and nothing of the folder is used"


def changed_at(number, old=b'"answer": "a', new=b'"answer": "b'):
    def change(path):
        lines = path.read_bytes().splitlines(keepends=True)
        lines[number] = lines[number].replace(old, new)
        path.write_bytes(b"".join(lines))

    return change


HURT = {  # the change, and how many of four rows are still those that were written
    "nothing": (lambda path: None, 4),
    "an incomplete last line": (lambda path: path.write_bytes(path.read_bytes()[:-5]), 3),
    "a changed row, still JSON": (changed_at(1), 1),
    "a line that is no JSON": (changed_at(2, b"{", b"["), 2),
    "two rows in another order": (
        lambda path: path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[::-1])), 0,
    ),
    "a row that nobody appended": (lambda path: path.write_bytes(path.read_bytes() + b'{"id": 9}\n'), 4),
    "the digests are lost": (lambda path: (path.parent / SUMS / path.name).unlink(), 0),
    "a pipe in its place": (lambda path: (path.unlink(), os.mkfifo(path)), 0),
}  # fmt: skip


@pytest.mark.parametrize("hurt", HURT)
def test_rows_of_an_unfinished_step_that_changed_are_made_again(hurt, tmp_path):
    rows = [{"id": i, "answer": f"a{i}"} for i in range(5)]
    asked = []

    def work(inputs, folder, machine):
        known = {row["id"] for row in read_jsonl(folder / "answers.jsonl")}
        for row in rows:
            if row["id"] not in known:
                if row["id"] == stop:
                    raise KeyboardInterrupt
                asked.append(row["id"])
                append_jsonl(folder / "answers.jsonl", [row])

    store, said = Store(tmp_path), []
    machine = Machine("cpu", tmp_path)
    machine.progress.say = said.append
    made, stop = step(work), 4
    with pytest.raises(KeyboardInterrupt):
        do(made, store, machine)
    change, left = HURT[hurt]
    change(store.path(made.id) / "answers.jsonl")
    asked.clear()
    stop = None
    do(made, store, machine)
    assert asked == list(range(left, 5))
    assert len(said) == (hurt not in ("nothing", "an incomplete last line", "a pipe in its place"))
    assert all("answers.jsonl are made again: they changed" in text for text in said)
    assert read_jsonl(store.path(made.id) / "answers.jsonl") == rows
    assert list(store.record(made.id)["files"]) == ["answers.jsonl"]
    assert not (store.path(made.id) / SUMS).exists()
