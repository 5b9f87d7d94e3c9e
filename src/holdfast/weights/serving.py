"""The LoRA rules of vLLM, SGLang and TGI, and what an adapter needs there.

Read in vLLM 0.33 (`config/lora.py`, `lora/peft_helper.py`), SGLang 0.5.23 (`srt/lora/`) and TGI
(`adapters/lora.py`). SGLang and TGI do not read `rank_pattern` and `alpha_pattern`, and SGLang does not read
`use_rslora`; TGI leaves out copies of whole modules, and a kind of module that some layers lack, without an
error. What `combine` writes has neither patterns nor rsLoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from holdfast.errors import ModelError
from holdfast.weights.adapter import kind_of, layer_of

SERVERS = ("vllm", "sglang", "tgi")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `--max-lora-rank`."""
KINDS = {
    "use_dora": "DoRA is not supported",
    "lora_bias": "biases of LoRA are not supported",
    "alora_invocation_tokens": "activated LoRA is not supported",
    "layer_replication": "copied layers are not supported",
}
"""Settings that none of the servers uses, and why."""
NOT_READ = {
    "vllm": (),
    "sglang": ("rank_pattern", "alpha_pattern", "use_rslora"),
    "tgi": ("rank_pattern", "alpha_pattern"),
}
"""Settings that a server does not read, so that it would scale the update differently."""


def how_to_serve(config: Mapping[str, Any], modules: Iterable[str], server: str) -> str:
    """Return the options that a server needs for an adapter.

    Args:
        config: the adapter's settings.
        modules: the names of its modules with LoRA.
        server: a name of `SERVERS`.

    Raises:
        ModelError: the server cannot serve the adapter, or would serve other weights than PEFT.
    """
    wrong = list(_problems(config, list(modules), server))
    if wrong:
        raise ModelError(
            f"{server} cannot serve this adapter: {'; '.join(wrong)}. Merge it into the model and serve "
            "that: holdfast merge BASE ADAPTER... --out MODEL."
        )
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if server == "vllm":
        room = next(allowed for allowed in VLLM_RANKS if allowed >= rank)
        return f"--enable-lora --max-lora-rank {room} --lora-modules NAME=FOLDER"
    if server == "sglang":
        return f"--enable-lora --max-lora-rank {rank} --lora-paths NAME=FOLDER"
    return "--lora-adapters NAME=FOLDER"


def _problems(config: Mapping[str, Any], modules: list[str], server: str) -> Iterable[str]:
    for key, why in KINDS.items():
        if config.get(key):
            yield why
    if config.get("bias", "none") != "none":
        yield "trained biases are not supported"
    saved = config.get("modules_to_save") or []
    saved = [saved] if isinstance(saved, str) else list(saved)
    if saved:
        yield f"it has copies of whole modules (modules_to_save: {', '.join(saved)})"
    for key in NOT_READ[server]:
        if config.get(key):
            yield f"{key} is set, which {server} does not read (holdfast combine writes it out)"
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if server == "vllm" and rank > VLLM_RANKS[-1]:
        yield f"its rank is {rank}, and the largest --max-lora-rank is {VLLM_RANKS[-1]}"
    if server == "tgi":
        yield from _gaps(modules)


def _gaps(modules: list[str]) -> Iterable[str]:
    """Yield the kinds of modules that some of the adapted layers lack."""
    layers: dict[str, set[int]] = {}
    for name in modules:
        layer = layer_of(name)
        if layer is not None:
            layers.setdefault(kind_of(name), set()).add(layer)
    every = set(range(1 + max(set().union(*layers.values()), default=-1)))
    for kind, found in sorted(layers.items()):
        if found != every:
            yield f"{kind} is adapted in {len(found)} of at least {len(every)} layers: TGI would leave it out"
