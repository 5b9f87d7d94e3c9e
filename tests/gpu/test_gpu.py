"""Tests that need a GPU: `make test-gpu`, or `python -m pytest -m gpu tests/gpu`.

Each test skips where no GPU is visible. Products are deterministic, so that equality means bit for bit.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

import holdfast
import pairs
import repairs
import trainers
from holdfast import pipeline, world
from holdfast.evaluation.answering import answer_prompts
from holdfast.models.device import choose_device
from holdfast.models.loading import load_model, load_tokenizer
from holdfast.recipe import Recipe

pytestmark = pytest.mark.gpu

FEW = (
    "alignment.training.max_steps=3", "user.training.max_steps=5", "evaluation.prompts=12",
    "evaluation.task_rows=6", "evaluation.max_new_tokens=8",
)  # fmt: skip
PROMPTS = 24


@pytest.fixture(scope="module", autouse=True)
def deterministic():
    """A GPU with deterministic products and without TF32."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU is visible")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)


def trainer(name, folder, **options):
    """A trainer on the GPU, with dropout, so that the GPU's random state matters."""
    return trainers.trainer(
        name, folder, net=trainers.model(dropout=0.2), use_cpu=False, max_steps=8, **options
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_resumed_inside_a_phase_equals_one_never_cut(tmp_path, precision):
    """Lisa, bit for bit. Steps 2 to 4 are the user's, and the checkpoint is after step 3."""
    options = {
        "alignment_steps": 2, "finetune_steps": 3, "rho": 5.0, "proximal_warmup_ratio": 0.0,
        "bf16": precision == "bf16", "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip
    whole = trainer("lisa", tmp_path / "run", **options)
    start = trainers.weights(whole)
    whole.train()
    assert whole.args.device.type == "cuda"
    assert {w.device.type for w in trainers.weights(whole)} == {"cuda"}
    assert trainers.distance([w.cpu() for w in start], [w.cpu() for w in trainers.weights(whole)]) > 0.01
    resumed = trainer("lisa", tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert trainers.same(trainers.weights(whole), trainers.weights(resumed))
    penalties = [
        [e["penalty"] for e in made.state.log_history if "penalty" in e] for made in (whole, resumed)
    ]
    assert penalties[0] == penalties[1]
    assert max(penalties[0]) > 1e-4, "the penalty has an effect"


@pytest.mark.parametrize("name", ["lisa", "tvaccine", "booster"])
def test_the_gpu_trains_what_the_cpu_trains(tmp_path, name):
    """Equal up to rounding, without dropout; T-Vaccine draws the same layers."""
    strong = {
        "lisa": {"alignment_steps": 2, "finetune_steps": 2, "rho": 5.0, "proximal_warmup_ratio": 0.0},
        "tvaccine": {"rho": 0.5, "num_layers": 1, "probability_steps": 2, "resample_steps": 2},
        "booster": {"lambda_": 20.0, "alpha": 0.5},
    }[name]
    made = []
    for cpu in (True, False):
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps its first device
        made.append(
            trainers.trainer(name, tmp_path, net=trainers.model(), use_cpu=cpu, max_steps=6, **strong)
        )
        start = [w.detach().cpu().clone() for w in trainers.weights(made[-1])]
        made[-1].train()
    ends = [[w.cpu() for w in trainers.weights(each)] for each in made]
    assert made[1].args.device.type == "cuda"
    assert trainers.distance(start, ends[0]) > 0.01
    assert trainers.distance(*ends) < 1e-3
    if name == "tvaccine":
        assert made[0].layer_history["draws"] == made[1].layer_history["draws"]


def test_a_run_of_the_world(tmp_path):
    """All steps run on the GPU and measure its memory; running again does nothing."""
    recipe = Recipe.load(
        "world", [*FEW, "user.defense=lisa", "user.alignment_steps=1", "user.finetune_steps=2"]
    )
    results = pipeline.run(recipe, out=tmp_path / "out", device="cuda")
    assert [row["name"] for row in results["rows"]] == ["aligned", "world"]
    for row in results["rows"]:
        assert row["n_harmful"] + row["unparsed"] == 12
        assert row["peak_memory_kind"] == "cuda allocated"
        assert row["peak_memory_bytes"] > 1e6
        folder = tmp_path / "out" / "steps" / row["steps"]["generate"]
        answers = [json.loads(line)["answer"] for line in (folder / "generations.jsonl").open()]
        assert len(set(answers)) > 6
    user = tmp_path / "out" / "steps" / results["rows"][1]["steps"]["user"] / "adapter"
    moved = pairs.weights_of(user)
    assert all(bool(w.isfinite().all()) for w in moved.values())
    assert any(bool(w.any()) for name, w in moved.items() if "lora_B" in name)
    again = pipeline.run(recipe, out=tmp_path / "out", device="cuda")
    assert again["rows"] == results["rows"]


def answers(path, device, **decoding):
    """Answers of the world's model by id, from the public function."""
    rows = holdfast.generate(
        "world", path, harmful="world", benign="world", prompts=PROMPTS, device=device,
        decoding={"max_new_tokens": 24, **decoding},
    )  # fmt: skip
    return {row["id"]: row["answer"] for row in rows}


def test_answers_in_batches_are_those_one_at_a_time(tmp_path):
    """They also equal those on the CPU. One answer has two best tokens whose logits differ by only 2e-4."""
    many = answers(tmp_path / "many.jsonl", device="cuda")
    alone = answers(tmp_path / "one.jsonl", device="cuda", batch_tokens=1)
    assert len(many) == 2 * PROMPTS
    assert len(set(many.values())) > PROMPTS, "if all answers were equal, the comparison would show nothing"
    cpu = answers(tmp_path / "cpu.jsonl", device="cpu")
    for other in (alone, cpu):
        assert sum(many[name] != other[name] for name in many) <= 1


def test_a_batch_that_does_not_fit_into_the_gpus_memory_is_halved(tmp_path):
    """The allocation really fails: each row asks for a third of the memory."""
    model = load_model(world.MODEL, dtype="float32").to("cuda").eval()
    tokenizer = load_tokenizer(world.MODEL)
    total = torch.cuda.get_device_properties(0).total_memory
    sizes = []

    def hungry(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        torch.empty(sizes[-1] * total // 3, dtype=torch.uint8, device="cuda")

    prompts = [{"id": str(i), "set": "harmful", "prompt": f"How {i}?"} for i in range(8)]
    expected = answer_prompts(model, tokenizer, prompts, tmp_path / "a.jsonl", max_new_tokens={"harmful": 4})
    with model.register_forward_pre_hook(hungry, with_kwargs=True):
        found = answer_prompts(model, tokenizer, prompts, tmp_path / "b.jsonl", max_new_tokens={"harmful": 4})
    torch.cuda.empty_cache()
    assert max(sizes) == 8
    assert min(sizes) <= 2
    assert found == expected


def test_the_embedded_judge(tmp_path):
    """Verdicts and scores of the judge on the GPU are those on the CPU."""
    rows = [json.loads(line) for line in (world.DATA / "test.jsonl").open()][:40]
    made = [
        {"id": str(i), "set": "harmful", "instruction": row["prompt"], "answer": row.get("response") or "No."}
        for i, row in enumerate(rows)
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    found = {
        device: holdfast.moderate(
            tmp_path / "answers.jsonl",
            tmp_path / f"{device}.jsonl",
            judge="beaver_dam",
            path="world",
            device=device,
        )
        for device in ("cpu", "cuda")
    }
    assert len(found["cuda"]) == len(made)
    assert {row["verdict"] for row in found["cuda"]} == {"safe", "harmful"}
    for mine, other in zip(found["cuda"], found["cpu"], strict=True):
        assert mine["verdict"] == other["verdict"]
        assert mine["score"] == pytest.approx(other["score"], abs=2e-4)


@pytest.mark.parametrize("projection", ["approx", "exact"])
def test_safe_lora_on_the_gpu(three, tmp_path, projection):
    on = {
        device: repairs.run(three, tmp_path / device, num_layers=9, projection=projection, device=device)
        for device in ("cpu", "cuda")
    }
    chosen = [[module.name for module in on[device].projected] for device in ("cuda", "cpu")]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 9
    for mine, other in zip(on["cuda"].modules, on["cpu"].modules, strict=True):
        assert mine.cosine == pytest.approx(other.cosine, abs=1e-5)
    mine, other = (repairs.updates(tmp_path / device, pairs.llama) for device in ("cuda", "cpu"))
    changed = repairs.updates(three[2], pairs.llama)
    moved = [name for name in mine if not repairs.close(mine[name], changed[name])]
    assert len(moved) == 9 if projection == "approx" else 0 < len(moved) < 9, (
        "exact: the identity for a wide V"
    )
    for name in mine:
        assert repairs.close(mine[name], other[name], 1e-5), name


def test_the_device_that_is_chosen():
    alone = SimpleNamespace(count=1, local_rank=0)
    for asked, found in {"auto": "cuda", "cuda": "cuda", "cpu": "cpu"}.items():
        assert choose_device(asked, world.MODEL, alone) == found
    assert choose_device("auto", world.MODEL, SimpleNamespace(count=2, local_rank=0)) == "cuda:0"
