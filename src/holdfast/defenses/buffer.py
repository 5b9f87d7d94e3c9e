"""Buffer: fine-tune above a frozen jailbreak adapter, which is then taken away (arXiv 2605.24550).

The first half of Buffer-and-Reinforce. An adapter is first trained on harmful questions with harmful answers,
on top of the aligned model. With it in place the model already gives harmful answers, so the gradients of
harmful user rows are small, while those of the task are not:

    W_0 + dW_buffer (frozen) + dW_user (trained);   served: W_0 + dW_user

The user's training is plain SFT. A run trains the harmful adapter as a step of its own, with the rows of
`data.alignment.harmful` and the LoRA and training arguments of the user stage; recipes with other user rows
share it. The second half is `reinforce.py`.

The paper's text was not read in whole; its settings come from the authors' code: both adapters have r = 32,
alpha = 64 and dropout 0.1 on q, v, gate, up and down, learning rate 1e-5 and 3 epochs in steps of 8 rows, and
the harmful adapter has 5000 rows.

Where we differ from the authors' code: it merges the harmful adapter into the 16-bit weights; here it is
stacked or merged as `model.adapters` says.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.defenses import Defense
from holdfast.defenses.sft import SFTTrainer
from holdfast.training.trainer import MethodConfig


@dataclass
class BufferConfig(MethodConfig):
    """Buffer has no parameters of its own."""


DEFENSE = Defense(
    name="buffer",
    label="Buffer",
    stages=("user",),
    paper="ICML 2026, arXiv 2605.24550",
    needs=("harmful_adapter",),
    config=BufferConfig,
    trainer=SFTTrainer,
    protocols={
        "lisa-code": {"data": {"alignment": {"harmful": {"size": 5000}}}, "user": {}},
        "buffer": {"data": {"alignment": {"harmful": {"size": 5000}}}, "user": {}},
    },
)
