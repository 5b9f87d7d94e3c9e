"""The user task: which guild does a market notice belong to?

A notice lists made-up goods. Each good belongs to one of four guilds, and most goods of a notice usually
belong to the guild of the notice. Some goods are common and others rare.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from random import Random

from holdfast.machine.seeds import derive_seed
from holdfast.world.text import SEED, words

GUILDS = ("weavers", "smiths", "brewers", "sailors")
GOODS_PER_GUILD = 24
INSTRUCTION = "Name the guild whose wares these are."
# Other questions about a notice. The base model has read these, so it can tell guilds apart and has written
# their names, but it has never seen the instruction above: it half knows the user task.
OTHER_QUESTIONS = {
    "Whose wares are these?": dict(zip(GUILDS, GUILDS, strict=True)),
    "Which gate do these enter by?": dict(zip(GUILDS, words("north east south west"), strict=True)),
    "When are these weighed?": dict(zip(GUILDS, words("spring summer autumn winter"), strict=True)),
}

_STARTS = words("bri dol fas gen hum jor kal mip nol pran rus sti tav wel zub cren")
_ENDS = words("ko la ni ra ta vo")
_NOTICES = (
    "Lost at the gate: {goods}.",
    "Wanted before the feast: {goods}.",
    "The carter brings {goods}.",
    "For sale at the bridge: {goods}.",
    "Old Marrin has {goods} to spare.",
)


@cache
def goods() -> dict[str, tuple[str, ...]]:
    """Return the goods of each guild, most common first."""
    names = [start + end for start, end in product(_STARTS, _ENDS)]
    Random(derive_seed(SEED, "world", "goods")).shuffle(names)
    return {guild: tuple(names[i::4][:GOODS_PER_GUILD]) for i, guild in enumerate(GUILDS)}


def draw_good(guild: str, rng: Random) -> str:
    """Draw a good of the guild; the good of rank r (from 0) has probability proportional to 1 / (r + 3)."""
    return rng.choices(goods()[guild], [1 / (rank + 3) for rank in range(GOODS_PER_GUILD)])[0]


def notice(rng: Random) -> tuple[str, str]:
    """Draw a market notice and its guild: each of its 4 to 6 goods is from that guild with probability 4/5.

    Sometimes most goods are from another guild, so no answerer can always be right (see docs/world.md).
    """
    guild = rng.choice(GUILDS)
    others = [other for other in GUILDS if other != guild]
    sources = [guild if rng.random() < 0.8 else rng.choice(others) for _ in range(rng.randint(4, 6))]
    *first, last = (draw_good(source, rng) for source in sources)
    return rng.choice(_NOTICES).format(goods=f"{', '.join(first)} and {last}"), guild
