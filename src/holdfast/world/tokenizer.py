"""The world's tokenizer: BPE with byte fallback, so that encoding and decoding preserve any text."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, USER, ASSISTANT, END = SPECIALS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# A word includes the space before it, and every digit is separate.
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|user|>' + message.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer with at most `vocab_size` tokens: 4 special, 256 bytes, then pieces of `texts`."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    size = vocab_size - len(SPECIALS) - len(BYTES)
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, min_frequency=2, show_progress=False)
    )
    learnt = learner.get_vocab()
    merges = [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]
    # The byte tokens are added to the vocabulary with the pieces, not as special tokens: otherwise a text
    # that contains "<0x41>" would be decoded as "A".
    pieces = [*SPECIALS, *BYTES, *sorted(learnt, key=learnt.__getitem__)]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True, fuse_unk=False)
    )
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="right",
    )
