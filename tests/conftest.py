"""Every test runs offline, on the CPU, on one thread, silent, and without what no test reads."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

# rich takes COLUMNS at the first import and keeps it; a test that sets COLUMNS must not be that first import.
os.environ.pop("COLUMNS", None)
import holdfast.cli.console  # noqa: F401


def pytest_configure(config):
    """Hide the GPUs, before torch is imported: a process that has used one cannot be forked.

    Only a run that asks for the marker `gpu` alone sees one, the first.
    """
    if config.option.markexpr == "gpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


FIRST = (
    "processes/test_trainers", "defenses/test_contract", "processes/test_run", "defenses/test_trl",
    "processes/test_launchers", "cli/test_cli", "defenses/test_third_party", "pipeline/", "recipe/", "attacks/",
    "defenses/test_t", "training/", "evaluation/", "benchmarks/", "test_docs", "reporting/test_page",
)  # fmt: skip
"""Where the long files are: two workers that begin with them end at the same time."""


def pytest_collection_modifyitems(items):
    def place(item):
        path = item.path.as_posix()
        return next((i for i, start in enumerate(FIRST) if f"/tests/{start}" in path), len(FIRST))

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def in_less_time():
    """Answers to a user's own task end after 12 tokens instead of 128, and no write waits for the disk.

    No tiny model ends an answer itself, and no test turns the machine off.
    """
    from holdfast.tasks import own

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "TASK", replace(own.TASK, max_new_tokens=12))
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def what_is_imported_stays():
    """Each training collects garbage; without this it looks at all imported modules every time (0.2 to 0.5 s)."""
    from light import lighten

    lighten()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)  # a twentieth of the time of the suite


@pytest.fixture
def install(monkeypatch):
    """Pretend that other packages are installed: `install(*entries)` gives their entry points."""
    from holdfast import plugins, registry

    def clear():
        for cached in (plugins.plugins, registry.faces):
            cached.cache_clear()

    def given(*entries):
        monkeypatch.setattr(
            plugins, "entry_points", lambda group: [entry for entry in entries if entry.group == group]
        )
        clear()

    yield given
    clear()


@pytest.fixture
def blocks_of(monkeypatch):
    """`blocks_of(size)`: tensors are read and written in blocks of at most `size` bytes."""
    from holdfast.weights import reader

    return lambda size: monkeypatch.setattr(reader, "BLOCK", size)


@pytest.fixture
def no_model(monkeypatch):
    """After `no_model()`, loading a model is an error."""
    return lambda: monkeypatch.setattr("holdfast.models.loading.load_model", None)


@pytest.fixture
def one_try(monkeypatch):
    """After `one_try()`, no call to a server is repeated."""
    return lambda: monkeypatch.setattr("holdfast.evaluation.client.RETRIES", 0)


@pytest.fixture(scope="session")
def real_rows() -> Path:
    """The folder of real rows beside the checkout; tests that need it skip where it is missing."""
    from places import SHARED

    if not SHARED.is_dir():
        pytest.skip("the folder with real rows is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """A recipe and its finished run with a report, never cut; tests copy it."""
    import tiny
    from runs import run

    folder = tmp_path_factory.mktemp("done")
    recipe = tiny.recipe(folder / "in")
    results, seen = run(recipe, str(folder / "out"), page=True)
    return recipe, folder / "out", results, seen


@pytest.fixture
def copy(done, tmp_path):
    """The finished run, to change."""
    recipe, out, _, _ = done
    shutil.copytree(out, tmp_path / "out")
    return json.loads(json.dumps(recipe)), tmp_path / "out"


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    """base, aligned, adapter with seven targets in three layers."""
    from pairs import SEVEN, save_adapter, save_pair

    folder = tmp_path_factory.mktemp("three")
    return *save_pair(folder), save_adapter(folder / "adapter", target_modules=SEVEN)
