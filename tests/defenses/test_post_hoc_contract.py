"""What every method that changes weights must keep, over whatever the registry lists.

Methods of other packages are listed too: `pytest tests/defenses/test_post_hoc_contract.py -k NAME`. Nothing
here knows a method by name: `strong` of its declaration changes the weights, `identity` does not, and `repairs`
says what the user stage may have trained.
"""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny
from holdfast import registry
from holdfast.defenses import Tuned
from pairs import SEVEN, digest, llama, save_adapter, save_pair, weights_of

NAMES = [name for name, face in registry.faces("defenses").items() if "apply" in face.code]
CASES = [
    (name, trains)
    for name in NAMES
    for trains in registry.faces("defenses")[name].facts.get("repairs", ("new", "continue", "full"))
]
WEIGHTS = re.compile(r"\.(safetensors|bin)$|^adapter_config\.json$|^config\.json$")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """By what the user stage trained: its folder, the model before alignment, and the aligned one."""
    folder = tmp_path_factory.mktemp("sources")
    base, aligned = save_pair(folder)
    user = save_adapter(folder / "user", r=2, target_modules=SEVEN)
    guide = save_adapter(folder / "guide", std=0.3, r=4, lora_alpha=3, target_modules=SEVEN)
    save_adapter(folder / "refusal", std=0.2, r=3, lora_alpha=3, target_modules=SEVEN)
    model = llama()
    torch.manual_seed(9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(folder / "tuned", max_shard_size="60KB")
    return {
        "new": (user, base, guide),
        "continue": (user, base, guide),
        "full": (folder / "tuned", base, aligned),
    }


def rows():
    return {
        "train_dataset": lambda: tiny.user_rows(8),
        "alignment_dataset": lambda: tiny.safe_rows(8),
        "harmful_dataset": lambda: tiny.harmful_rows(8),
    }


def apply(name, trains, sources, out, parameters):
    """The method with its defaults and `parameters`; it gets what it declares, and nothing else."""
    method, face = registry.get_defense(name), registry.faces("defenses")[name]
    source, base, aligned = sources[trains]
    wanted = {*method.needs, *method.optional}
    given = Tuned(
        source=source,
        out=out,
        trains=trains,
        base=base if "base" in wanted else None,
        aligned=aligned if "aligned" in wanted else None,
        refusal=source.parent / "refusal" if "refusal_adapter" in wanted else None,
        load_rows={key: load for key, load in rows().items() if key in wanted},
        load_tokenizer=tiny.tokenizer if "tokenizer" in wanted else None,
    )
    defaults = {key: parameter.default for key, parameter in face.parameters.items()}
    return method.apply(given, **{**defaults, **parameters})


def kept(folder):
    """The digests of weights and configurations."""
    return {name: value for name, value in digest(folder).items() if WEIGHTS.search(name)}


@pytest.mark.parametrize("name", NAMES)
def test_the_face_tells_what_the_config_has(name):
    method, face = registry.get_defense(name), registry.faces("defenses")[name]
    own = {f.name: f.default for f in dataclasses.fields(method.config)} if method.config else {}
    assert {key: parameter.default for key, parameter in face.parameters.items()} == own
    assert all(parameter.help for parameter in face.parameters.values())
    assert face.summary
    for given in (method.strong, method.identity or {}):
        assert set(given) <= set(own)
    assert set(re.findall(r"\{(\w+)\}", method.headline)) <= set(method.facts)
    assert set(method.controls) | set(method.one_of) <= set(own)


@pytest.mark.parametrize(("name", "trains"), CASES)
def test_the_identity_changes_nothing_and_says_so(name, trains, sources, tmp_path):
    method = registry.get_defense(name)
    if method.identity is None:
        pytest.skip("declares no parameters with which nothing changes")
    facts = apply(name, trains, sources, tmp_path / "out", method.identity)
    assert kept(tmp_path / "out") == kept(sources[trains][0])
    changed = re.search(r"\{(\w+)\}", method.headline)
    if changed:
        assert facts[changed[1]] == 0


@pytest.mark.parametrize(("name", "trains"), CASES)
def test_it_writes_what_it_declares_and_leaves_its_sources(name, trains, sources, tmp_path):
    """The same bytes each time; plain folders that PEFT and transformers load; no source is touched."""
    method = registry.get_defense(name)
    before = [digest(folder) for folder in sources[trains]]
    facts = apply(name, trains, sources, tmp_path / "first", method.strong)
    assert set(facts) == set(method.facts)
    changed = re.search(r"\{(\w+)\}", method.headline)
    if changed:
        assert facts[changed[1]] > 0
    assert kept(tmp_path / "first") != kept(sources[trains][0])
    apply(name, trains, sources, tmp_path / "second", method.strong)
    assert kept(tmp_path / "first") == kept(tmp_path / "second")
    assert [digest(folder) for folder in sources[trains]] == before
    assert not [path for path in tmp_path.iterdir() if path.name not in ("first", "second")]
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "first").values())
    if trains == "full":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
        assert weights_of(tmp_path / "first").keys() == weights_of(sources["full"][0]).keys()
    else:
        model = PeftModel.from_pretrained(llama(), tmp_path / "first")
    assert model(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()


@pytest.mark.parametrize(("name", "trains"), CASES)
def test_another_result_is_not_overwritten(name, trains, sources, tmp_path):
    """A folder that holds something else stays as it is."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(Exception, match="not empty"):
        apply(name, trains, sources, tmp_path / "out", registry.get_defense(name).strong)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
