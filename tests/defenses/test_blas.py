"""numpy's BLAS has one thread while modules are shared out to ours, and as many as before afterwards."""

from __future__ import annotations

import pytest

import holdfast
from holdfast.defenses.safe_lora_parts import blas, work
from pairs import TWO, save_adapter, save_pair


@pytest.mark.parametrize(("options", "inside"), [({}, {1}), ({"projection": "exact"}, {2})])
def test_threads_of_blas(tmp_path, monkeypatch, options, inside):
    """An eigen-decomposition is worth several."""
    get, put = blas._functions()
    before, seen = get(), set()
    base, aligned = save_pair(tmp_path)
    adapter = save_adapter(tmp_path / "adapter", target_modules=TWO)

    def looking(*arguments, measure=work.measure):
        seen.add(get())
        return measure(*arguments)

    monkeypatch.setattr(work, "measure", looking)
    try:
        put(2)
        holdfast.safe_lora(adapter, base=base, aligned=aligned, out=None, dry_run=True, **options)
        assert (seen, get()) == (inside, 2)
        with pytest.raises(KeyboardInterrupt), blas.one_blas_thread():
            raise KeyboardInterrupt
        assert get() == 2
    finally:
        put(before)


def test_another_blas_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(blas.np, "__file__", str(tmp_path / "numpy" / "__init__.py"))
    assert blas._functions() is None
    with blas.one_blas_thread():
        pass
