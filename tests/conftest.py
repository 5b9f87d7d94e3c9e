"""Every test runs offline, on one thread, and silent."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent))

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


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


@pytest.fixture(scope="session")
def real_rows() -> Path:
    """The folder of real rows beside the checkout; tests that need it skip where it is missing."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder with real rows is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """A recipe and its finished run, never cut; tests copy it."""
    import tiny
    from runs import run

    folder = tmp_path_factory.mktemp("done")
    recipe = tiny.recipe(folder / "in")
    results, seen = run(recipe, str(folder / "out"))
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
