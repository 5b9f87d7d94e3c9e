"""What a chat template writes around an answer is learned, and is not part of the answer."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tiny
from holdfast.chat.rendering import conversation
from holdfast.data.prompts import render, render_prompt
from holdfast.errors import DataError, ModelError
from holdfast.evaluation.answering import answer_batch
from holdfast.evaluation.frames import UNFINISHED, Frame, frame_of, spoken, without_thinking
from holdfast.training.tokenising import tokenise
from places import DOCS

TRL = find_spec("trl")
if TRL is None:
    pytest.skip("needs the chat templates of TRL's package", allow_module_level=True)
TEMPLATES = Path(str(TRL.origin)).parent / "chat_templates"
MARKS = re.compile(r"<[|｜/]?[\w▁|｜]+[|｜]?>|\[/?INST\]")
ROW = {"id": "r", "instruction": "Is 4 a number?", "input": "", "output": "yes"}


def chat(template: str, eos: str = "</s>", plain: tuple[str, ...] = ()):
    """A byte-level tokenizer with this chat template; every mark that the template writes is one token.

    Marks of thinking are tokens that are not special, as in Qwen3.
    """
    made = tiny.tokenizer()
    marks = [m for m in dict.fromkeys(MARKS.findall(template)) if m not in plain]
    thought = [m for m in marks if "think" in m]
    made.add_tokens([m for m in marks if m not in thought], special_tokens=True)
    made.add_tokens(thought)
    made.add_special_tokens({"eos_token": eos})
    made.chat_template = template
    return made


def of_trl(name: str, **options):
    return chat((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"), **options)


class Replies(torch.nn.Module):
    """A model that always generates the same tokens, as far as it may."""

    def __init__(self, ids: list[int]):
        super().__init__()
        made = tiny.llama(1000)
        self.config, self.generation_config, self.device = made.config, made.generation_config, made.device
        self.ids = ids

    def generate(self, input_ids, attention_mask, generation_config, **options):
        new = torch.tensor([self.ids[: generation_config.max_new_tokens]] * len(input_ids))
        return torch.cat([input_ids, new], dim=1)


def answered(tokenizer, text: str, new_tokens: int = 200):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    frame = frame_of(tokenizer, "chat")
    return answer_batch(Replies(ids), tokenizer, [[5, 6]], new_tokens, frame=frame)[0]


def test_an_answer_ends_where_the_template_ends_it():
    tok = of_trl("qwen2_5", eos="<|endoftext|>")
    assert frame_of(tok, "chat") == Frame(stops=(tok.convert_tokens_to_ids("<|im_end|>"),))
    found = answered(tok, "yes<|im_end|>\n<|im_start|>user\nAnd more")
    assert (found["answer"], found["truncated"], found["tokens"]) == (
        "yes",
        False,
        len(tok("yes")["input_ids"]),
    )
    assert "raw" not in found
    assert frame_of(tok, "alpaca") == Frame(cut="### Response:"), "an Alpaca answer ends with the eos token"


@pytest.mark.parametrize("template", ["alpaca", "alpaca_newline"])
def test_a_run_on_answer_is_cut_at_a_second_response(template):
    """As in the papers' code: the text between the first and the second "### Response:", stripped."""
    tok = of_trl("qwen2_5", eos="<|endoftext|>")
    text = "yes\n\n### Instruction:\nAnd then?\n\n### Response: no"
    ids = tok(text, add_special_tokens=False)["input_ids"]
    frame = frame_of(tok, template)
    found = answer_batch(Replies(ids), tok, [[5, 6]], len(ids), frame=frame)[0]
    assert found["answer"] == "yes\n\n### Instruction:\nAnd then?"
    assert (found["truncated"], found["raw"], found["tokens"]) == (False, text, len(ids))
    kept = answer_batch(Replies(ids), tok, [[5, 6]], 3, frame=frame)[0]
    assert kept["truncated"]
    assert "raw" not in kept


def test_an_end_that_is_no_token_is_found_as_text():
    """As in a Llama-2 base model with a ChatML template: its end is several tokens."""
    tok = of_trl("qwen2_5", plain=("<|im_end|>",))
    assert frame_of(tok, "chat") == Frame(stop_text="<|im_end|>")
    found = answered(tok, "yes<|im_end|>\n<|im_start|>user\nAnd more")
    assert (found["answer"], found["truncated"]) == ("yes", False)


def test_the_real_search_stops_at_a_text():
    """The model's own `generate` gets the text, and each answer of a batch is cut at its own."""
    tok = of_trl("qwen2_5", plain=("<|im_end|>",))
    model = tiny.llama(len(tok), tie_word_embeddings=False).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    ids = [tok("abc")["input_ids"], tok("How do I fold a boat?")["input_ids"]]
    free = answer_batch(model, tok, ids, 12, frame=Frame())
    end = free[0]["answer"][3:5]
    found = answer_batch(model, tok, ids, 12, frame=Frame(stop_text=end))
    for one, whole in zip(found, free, strict=True):
        assert one["answer"] == whole["answer"].partition(end)[0].strip()
        assert one["truncated"] == (end not in whole["answer"])
    assert not found[0]["truncated"]


@pytest.mark.parametrize(
    "text",
    [
        "<think>\n\n</think>\n\nyes<|im_end|>",
        "<think>\nIt is, I suppose no.\n</think>\n\nyes<|im_end|>",
        "yes<|im_end|>",
    ],
)
def test_the_think_block_is_not_part_of_the_answer(text):
    tok = of_trl("qwen3", eos="<|im_end|>")
    assert frame_of(tok, "chat").lead == "<think>\n\n</think>\n\n"
    found = answered(tok, text)
    assert (found["answer"], found["truncated"]) == ("yes", False)
    assert found.get("raw") == (text.removesuffix("<|im_end|>") if "think" in text else None)


def test_thinking_without_an_end_is_no_answer():
    tok = of_trl("qwen3", eos="<|im_end|>")
    found = answered(tok, "<think>\nFirst, mix the")
    assert (found["answer"], found["error"], found["truncated"]) == ("", UNFINISHED, True)
    opened = of_trl("deepseek_r1_distill", eos="<｜end▁of▁sentence｜>")
    assert frame_of(opened, "chat").thinks, "its generation prompt opens the block"
    assert answered(opened, "First, mix the")["error"] == UNFINISHED
    assert answered(opened, "First.</think>\n\nNo.<｜end▁of▁sentence｜>")["answer"] == "No."


def test_a_channel_header_is_not_part_of_the_answer():
    tok = of_trl("gptoss", eos="<|return|>")
    final = "<|channel|>final<|message|>"
    assert frame_of(tok, "chat").lead == final
    assert answered(tok, f"{final}yes<|return|>")["answer"] == "yes"
    thought = f"<|channel|>analysis<|message|>Hm, {final[:3]} no.<|end|><|start|>assistant"
    assert answered(tok, f"{thought}{final}yes<|return|>")["answer"] == "yes"
    assert answered(tok, "<|channel|>analysis<|message|>Hm")["error"] == UNFINISHED
    quoted = answered(tok, f"Mix it. {final}I'm sorry<|return|>")["answer"]
    assert quoted.startswith("Mix it."), "only a header at the start is removed"


def test_the_tokens_of_the_lead_do_not_count(tmp_path):
    from holdfast.evaluation.answering import answer_prompts

    tok = of_trl("qwen3", eos="<|im_end|>")
    ids = tok("<think>\n\n</think>\n\nyes<|im_end|>", add_special_tokens=False)["input_ids"]
    prompt = [{"id": "a", "set": "task", "prompt": "x"}]
    rows = answer_prompts(
        Replies(ids), tok, prompt, tmp_path / "a.jsonl", max_new_tokens={"task": 4},
        frame=frame_of(tok, "chat"),
    )  # fmt: skip
    assert (rows[0]["answer"], rows[0]["truncated"]) == ("yes", False)


def test_thinking_in_any_notation():
    for begin, end in [
        ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"),
        ("<seed:think>", "</seed:think>"), ("◁think▷", "◁/think▷"), ("<|think|>", "<|/think|>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|channel>thought", "<channel|>"),
    ]:  # fmt: skip
        assert spoken(f" {begin}I refuse.{end}\nSure: mix it. ") == "Sure: mix it.", begin
        assert spoken(f"{begin}I refuse. And then") is None, begin
        assert spoken(f"Sure. {begin}hm{end} Mix it.") == "Sure.  Mix it.", begin
    assert spoken("I think so </think>\n\nNo.", thinks=True) == "No."
    assert spoken("Hm </think> Mix it. </think> No.", thinks=True) == "Mix it. </think> No."
    assert spoken("Hm <think>more</think> No.", thinks=True) == "No."
    assert spoken(" I think so. a < b, [thinking aloud] ") == "I think so. a < b, [thinking aloud]"


def test_an_end_without_a_beginning_hides_nothing():
    """Only a prompt that opens the thinking makes the text before its end a thought."""
    whole = "Sure: mix it. </think> I cannot help with that."
    assert spoken(whole) == whole
    assert spoken(f"<think>Hm.</think>{whole}") == whole
    tok = of_trl("qwen3", eos="<|im_end|>")
    assert answered(tok, f"{whole}<|im_end|>")["answer"] == whole


def test_rows_of_a_file_lose_their_thinking():
    rows = [
        {"id": "a", "answer": "<think>I refuse.</think>Sure."},
        {"id": "b", "answer": " No. "},
        {"id": "c", "answer": "<think>I"},
        {"id": "d", "error": "no", "answer": ""},
    ]
    found = without_thinking(rows)
    assert [row["answer"] for row in found] == ["Sure.", " No. ", "", ""]
    assert [row.get("error") for row in found] == [None, None, UNFINISHED, "no"]


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "nemotron_3_nano", "deepseekv3"])
def test_a_prompt_alone_needs_no_template_that_can_train(name):
    tok = of_trl(name)
    assert ROW["instruction"] in render_prompt(ROW, tok, "chat")
    with pytest.raises(ModelError, match="cannot be separated"):
        render(ROW, tok, "chat")


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_the_prompt_alone_is_the_prompt_of_the_row(template):
    tok = of_trl("qwen3")
    assert render_prompt(ROW, tok, template, "Be brief.") == render(ROW, tok, template, "Be brief.")[0]


def test_a_template_that_ends_no_answer_is_closed_with_eos():
    """GLM-4.5 writes nothing after an answer; in a conversation the next turn's token follows."""
    tok = of_trl("glm4moe", eos="<|endoftext|>")
    assert render(ROW, tok, "chat")[1] == "\n<think></think>\nyes<|endoftext|>"
    assert frame_of(tok, "chat").stops == (tok.convert_tokens_to_ids("<|user|>"),)
    assert answered(tok, "\n<think></think>\nyes<|endoftext|>")["answer"] == "yes"
    assert answered(tok, "\n<think></think>\nyes<|user|>\nMore")["answer"] == "yes"
    turns = [{"role": "user", "content": "Is 4 a number?"}, {"role": "assistant", "content": "yes"}]
    assert tokenise({"messages": turns}, tok, None)["labels"][-1] == tok.eos_token_id
    chatml = of_trl("qwen2_5", eos="<|endoftext|>")
    quoting = {**ROW, "output": "It is <|im_end|>"}
    assert render(quoting, chatml, "chat")[1] == "It is <|im_end|><|im_end|>\n", "it has an end of its own"


TALK = [
    {"role": "user", "content": "Is 4 a number?"}, {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "Is tea?"}, {"role": "assistant", "content": "no"},
]  # fmt: skip


def table() -> str:
    """The table of docs/templates.md: one line for each template of TRL's package."""
    lines = [
        "| Template | Trained after the prompt | Several answers | An answer ends at | Removed from an answer |",
        "|---|---|---|---|---|",
    ]
    for path in sorted(TEMPLATES.glob("*.jinja")):
        tok = of_trl(path.stem, eos="<eos>")
        frame = frame_of(tok, "chat")
        assert ROW["instruction"] in render_prompt(ROW, tok, "chat"), path.stem
        try:
            prompt, completion = render(ROW, tok, "chat")
            assert "yes" in completion, path.stem
            assert ROW["instruction"] in prompt, path.stem
            trained = f"`{completion!r}`".replace("'", "")
        except ModelError:
            trained = "refused (answers only)"
        try:
            several = f"{len(conversation(TALK, tok).spans)} of 2"
        except (DataError, ModelError):
            several = "the last only" if trained[0] == "`" else "none"
        ends = " ".join(f"`{token}`" for token in tok.convert_ids_to_tokens(list(frame.stops)))
        removed = f"`{frame.lead!r}`".replace("'", "") if frame.lead.strip() else ""
        if frame.thinks:
            removed = "the thinking, up to its end"
        cells = [path.stem, trained, several, ends or f"`{frame.stop_text}`", removed or "nothing"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def test_the_table_of_templates_is_right():
    page = (DOCS / "templates.md").read_text(encoding="utf-8")
    assert page.partition("| Template |")[1] + page.partition("| Template |")[2] == table() + "\n"


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "llava_next"])
def test_a_template_that_expects_parts_gets_parts(name):
    """With a text as content these templates drop it without a word, or fail."""
    prompt, completion = render(ROW, of_trl(name), "chat")
    assert ROW["instruction"] in prompt
    assert "yes" in completion
