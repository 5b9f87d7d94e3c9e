"""numpy's BLAS uses one thread while our threads share the modules, and as many as before afterwards."""

from __future__ import annotations

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import holdfast
from pairs import TWO, save_adapter, save_pair


def threads():
    """The threads of every BLAS in this process."""
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.fixture
def sources(tmp_path):
    base, aligned = save_pair(tmp_path)
    adapter = save_adapter(tmp_path / "adapter", target_modules=TWO)
    return {"adapter": adapter, "base": base, "aligned": aligned, "out": None, "dry_run": True}


@pytest.mark.parametrize(("options", "inside"), [({}, {1}), ({"projection": "exact"}, {2})])
def test_threads_of_blas(sources, options, inside):
    """An eigen-decomposition uses several threads."""
    seen = []
    with threadpool_limits(2, user_api="blas"):
        assert threads() == {2}, "this test needs a BLAS whose threads can be set"
        holdfast.safe_lora(**sources, **options, progress=lambda done, total: seen.append(threads()))
        assert threads() == {2}
    assert seen
    assert all(one == inside for one in seen)


def test_an_interrupted_repair_gives_the_threads_back(sources):
    def interrupted(done, total):
        assert threads() == {1}
        raise KeyboardInterrupt

    with threadpool_limits(2, user_api="blas"):
        with pytest.raises(KeyboardInterrupt):
            holdfast.safe_lora(**sources, progress=interrupted)
        assert threads() == {2}
