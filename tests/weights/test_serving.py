"""What vLLM, SGLang and TGI refuse or leave out, and the options that they need."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from holdfast.cli.app import app
from holdfast.errors import ModelError
from holdfast.weights.serving import SERVERS, how_to_serve
from pairs import TWO, save_adapter

MODULES = [f"model.layers.{i}.self_attn.{kind}" for i in range(3) for kind in TWO]
PLAIN = {"r": 12, "lora_alpha": 12, "bias": "none"}


def test_the_options_of_each_server():
    options = {server: how_to_serve(PLAIN, MODULES, server) for server in SERVERS}
    assert options["vllm"] == "--enable-lora --max-lora-rank 16 --lora-modules NAME=FOLDER"
    assert options["sglang"] == "--enable-lora --max-lora-rank 12 --lora-paths NAME=FOLDER"
    assert options["tgi"] == "--lora-adapters NAME=FOLDER"


@pytest.mark.parametrize(
    ("settings", "text", "servers"),
    [
        ({"use_dora": True}, "DoRA", SERVERS),
        ({"lora_bias": True}, "biases of LoRA", SERVERS),
        ({"bias": "all"}, "trained biases", SERVERS),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head", SERVERS),
        ({"layer_replication": [[0, 1]]}, "copied layers", SERVERS),
        ({"r": 513}, "largest --max-lora-rank is 512", ("vllm",)),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is set", ("sglang", "tgi")),
        ({"use_rslora": True}, "use_rslora is set", ("sglang",)),
    ],
)
def test_what_a_server_cannot_serve(settings, text, servers):
    for server in SERVERS:
        if server in servers:
            with pytest.raises(ModelError, match=text):
                how_to_serve(PLAIN | settings, MODULES, server)
        else:
            assert how_to_serve(PLAIN | settings, MODULES, server)


def test_tgi_leaves_out_a_kind_that_a_layer_lacks():
    with pytest.raises(ModelError, match=r"v_proj is adapted in 2 of at least 3 layers"):
        how_to_serve(PLAIN, MODULES[:-1], "tgi")
    assert how_to_serve(PLAIN, MODULES[:-1], "vllm")


def test_combine_for_a_server(tmp_path):
    one = save_adapter(tmp_path / "one", target_modules=TWO, r=8, use_rslora=True)
    two = save_adapter(tmp_path / "two", target_modules=[*TWO, "k_proj"], r=4)
    saved = save_adapter(tmp_path / "saved", target_modules=TWO, modules_to_save=["lm_head"])
    run = CliRunner().invoke
    done = run(app, ["combine", str(one), str(two), "--out", str(tmp_path / "out"), "--for", "vllm"])
    assert done.exit_code == 0
    assert f"--max-lora-rank 16 --lora-modules NAME={tmp_path / 'out'}" in done.stdout
    refused = run(app, ["combine", str(one), str(saved), "--out", str(tmp_path / "none"), "--for", "sglang"])
    assert "modules_to_save: lm_head" in str(refused.exception)
    assert not (tmp_path / "none").exists()
