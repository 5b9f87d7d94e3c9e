"""One seed in the recipe; each consumer derives its own seed from it and the consumer's name."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *names: object) -> int:
    """A 31-bit seed for the consumer `names`; adding a consumer does not change the seeds of the others."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "big") >> 1
