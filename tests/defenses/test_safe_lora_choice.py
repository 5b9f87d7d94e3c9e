"""Safe LoRA: which modules are projected, by threshold, number or suggestion; the controls; dry runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import holdfast
import tiny
from holdfast.defenses.safe_lora_parts import result
from holdfast.errors import RecipeError
from pairs import digest, llama, save_adapter
from repairs import close, dense, run, updates


@pytest.mark.parametrize("threshold", [-1, 0, -1.0])
def test_a_threshold_below_every_cosine_is_the_identity_and_says_so(three, tmp_path, threshold):
    result = run(three, tmp_path / "out", threshold=threshold)
    assert not result.projected
    assert result.share == 0
    assert any("Nothing was projected" in note and "smallest cosine" in note for note in result.notes)
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (three[2] / name).read_bytes()


def test_the_gate_is_strict(three, tmp_path):
    """cos < threshold in the paper; the authors' code has <=."""
    values = sorted(m.cosine for m in run(three, dry_run=True).modules)
    assert len(run(three, tmp_path / "at", threshold=values[3]).projected) == 3
    assert len(run(three, tmp_path / "above", threshold=np.nextafter(values[3], 1)).projected) == 4


@pytest.mark.parametrize("k", [1, 10, 21])
def test_num_layers_projects_the_k_least_similar(three, tmp_path, k):
    result = run(three, tmp_path / "out", num_layers=k)
    assert len(result.projected) == k
    expected = sorted((e["cosine"], name) for name, e in dense(*three).items())
    assert {m.name for m in result.projected} == {name for _, name in expected[:k]}
    after = updates(tmp_path / "out", llama)
    assert all(close(after[m.name], dense(*three)[m.name]["approx"]) for m in result.projected[:3])


@pytest.mark.parametrize(
    "options", [{}, {"projection": "normalised"}, {"projection": "exact"}, {"control": "drop"}]
)
def test_what_was_measured_is_kept_for_the_least_similar_alone(three, tmp_path, monkeypatch, options):
    """With no memory for results, the same bytes come out; with memory, nothing is measured twice."""
    from holdfast.defenses.safe_lora_parts import work

    counted, digests = [], []

    def counting(*arguments, measure=work.measure):
        counted.append(1)
        return measure(*arguments)

    monkeypatch.setattr(work, "measure", counting)
    for room in (2**26, 0):
        monkeypatch.setattr(work, "KEPT", room)
        run(three, tmp_path / str(room), num_layers=4, **options)
        digests.append(digest(tmp_path / str(room))["adapter_model.safetensors"])
    again = 0 if "exact" in options.values() or "drop" in options.values() else 4
    assert len(counted) == 21 + 21 + again
    assert digests[0] == digests[1]


def test_least_keeps_the_smallest_within_its_bytes():
    from holdfast.defenses.safe_lora_parts.projection import Measured
    from holdfast.defenses.safe_lora_parts.work import Least

    least = Least(3, room=2 * 40)
    for name, cosine in (("a", 0.5), ("b", 0.2), ("c", None), ("d", 0.4), ("e", 0.3), ("f", 0.9)):
        least.add(name, Measured(cosine, 1.0, 1.0, 1.0, np.zeros((5, 2), np.float32)))
    assert [name for name in "abcdef" if least.get(name)] == ["b", "e"]


def test_ties_are_broken_by_name_and_told(tmp_path):
    """All layers are equal, so all q_proj tie; exactly k modules are projected."""
    model = tiny.llama(400, layers=3)
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(2)
    change = {k: torch.randn_like(v) * 0.02 for k, v in model.model.layers[0].named_parameters()}
    with torch.no_grad():
        for layer in model.model.layers:
            for k, p in layer.named_parameters():
                p.copy_(model.model.layers[0].get_parameter(k))
        model.save_pretrained(tmp_path / "base")
        for layer in model.model.layers:
            for k, p in layer.named_parameters():
                p.add_(change[k])
    model.save_pretrained(tmp_path / "aligned")
    adapter = save_adapter(tmp_path / "adapter", target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(
        {k: tensors[k.replace("layers.1", "layers.0").replace("layers.2", "layers.0")].clone() for k in tensors},
        path,
    )  # fmt: skip
    result = holdfast.safe_lora(
        adapter, base=tmp_path / "base", aligned=tmp_path / "aligned", out=tmp_path / "out", num_layers=2
    )
    assert [m.layer for m in result.projected] == [0, 1]
    assert any(note.startswith("Tie at cosine") and "layers.2" in note for note in result.notes)


def test_drop_zeroes_what_would_have_been_projected(three, tmp_path):
    plain, dropped = (
        run(three, tmp_path / str(i), num_layers=4, control=c) for i, c in enumerate((None, "drop"))
    )
    assert [m.name for m in plain.projected] == [m.name for m in dropped.projected]
    after, before = updates(tmp_path / "1", llama), updates(three[2], llama)
    for m in dropped.modules:
        assert torch.equal(after[m.name], torch.zeros_like(after[m.name]) if m.projected else before[m.name])
        assert not m.projected or m.norm_after == 0
    assert any("Control" in note for note in dropped.notes)


@pytest.mark.parametrize("gate", [{"num_layers": 5}, {"threshold": "median"}])
def test_random_projects_as_many_others_by_the_seed(three, tmp_path, gate):
    if "threshold" in gate:
        values = sorted(m.cosine for m in run(three, dry_run=True).modules)
        gate = {"threshold": (values[4] + values[5]) / 2}
    results = [
        run(three, tmp_path / str(i), control="random", seed=s, **gate) for i, s in enumerate((1, 2, 1))
    ]
    names = [[m.name for m in r.projected] for r in results]
    assert [len(n) for n in names] == [5, 5, 5]
    assert names[0] == names[2] != names[1]
    assert digest(tmp_path / "0")["adapter_model.safetensors"] == digest(tmp_path / "2")["adapter_model.safetensors"]  # fmt: skip
    after, expected = updates(tmp_path / "1", llama), dense(*three)
    for m in results[1].modules:
        assert close(after[m.name], expected[m.name]["approx" if m.projected else "delta"])


def test_a_dry_run_writes_nothing_and_shows_what_thresholds_would_do(three, tmp_path):
    before = set(tmp_path.iterdir())
    result = run(three, dry_run=True)
    assert set(tmp_path.iterdir()) == before
    assert result.out is None
    assert not result.projected
    values = sorted(e["cosine"] for e in dense(*three).values())
    table = result.sweep()
    assert table[0][1] == 0
    assert table[-1][1] == len(values)
    assert len(table) <= 17
    assert all(n == sum(v < t for v in values) for t, n in table)


@pytest.mark.parametrize(
    "gate", [{"num_layers": 4}, {"threshold": 0.7}, {"num_layers": 4, "control": "random"}]
)
def test_a_dry_run_marks_what_would_be_projected(three, tmp_path, gate):
    looked, done = run(three, dry_run=True, **gate), run(three, tmp_path / "out", **gate)
    assert [m.name for m in looked.projected] == [m.name for m in done.projected]
    assert 0 < len(looked.projected) < 21
    assert all(m.norm_after == m.norm_before for m in looked.modules)


def test_the_suggestion_is_the_largest_gap():
    found = result.suggest([0.1, 0.12, 0.5, 0.51, 0.53])
    assert (found.threshold, found.projected) == (0.31, 2)
    assert "0.12 to 0.5" in found.why
    assert "two groups" not in found.why
    assert "two groups" in result.suggest([0.1, 0.2, 0.3, 0.41]).why
    assert "most of the update" in result.suggest([0.1, 0.11, 0.12, 0.9]).why
    assert result.suggest([0.5, 0.5]) is None
    assert result.suggest([]) is None
    close_by = result.suggest([0.5, np.nextafter(0.5, 1)])
    assert close_by.projected == 1
    assert close_by.threshold > 0.5


def test_suggest_as_a_threshold(three, tmp_path):
    suggestion = run(three, dry_run=True).suggest()
    result = run(three, tmp_path / "out", threshold="suggest")
    assert len(result.projected) == suggestion.projected
    assert result.options["threshold"] == suggestion.threshold
    assert any("largest gap" in note for note in result.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give threshold or num_layers"),
        ({"threshold": 0.3, "num_layers": 3}, "not both"),
        ({"threshold": 1.5}, "from -1 to 1"),
        ({"threshold": float("nan")}, "from -1 to 1"),
        ({"threshold": True}, "from -1 to 1"),
        ({"threshold": "high"}, "from -1 to 1"),
        ({"num_layers": 0}, "whole number, 1 or more"),
        ({"num_layers": 2.5}, "whole number, 1 or more"),
        ({"num_layers": 22}, "only 21"),
        ({"threshold": 0.3, "projection": "exakt"}, "one of approx, exact"),
        ({"threshold": 0.3, "control": "none"}, "control must be"),
        ({"threshold": 0.3, "dtype": "float16"}, "dtype must be"),
        ({"threshold": 0.3, "device": "nonsense"}, "Cannot use the device"),
    ],
)
def test_options_that_cannot_be_used(three, tmp_path, options, message):
    with pytest.raises(RecipeError, match=message):
        run(three, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())
