"""Agreement of two judges on the same answers: Cohen's kappa (Cohen 1960), and where they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

CALLED = ("harmful", "safe")


def kappa(counts: Mapping[tuple[str, str], int]) -> float | None:
    """(p_o - p_e) / (1 - p_e): agreement beyond that expected by chance from the judges' shares of "harmful".

    Args:
        counts: number of answers for each pair of verdicts, "harmful" or "safe".

    Returns:
        A value from -1 to 1; None if nothing was judged, or if both judges give the same verdict to all
        answers, so that chance explains all agreement.
    """
    n = sum(counts.values())
    if n == 0:
        return None
    agreed = sum(counts.get((word, word), 0) for word in CALLED) / n
    chance = sum(
        sum(count for pair, count in counts.items() if pair[0] == word)
        * sum(count for pair, count in counts.items() if pair[1] == word)
        for word in CALLED
    ) / (n * n)
    return None if chance == 1 else (agreed - chance) / (1 - chance)


def agreement(verdicts: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Compare every two judges on the answers that both could judge.

    Args:
        verdicts: rows with `id` and `verdict`, by judge.

    Returns:
        For each pair: `judges`, `n`, `agree` (percent), `kappa`, the counts `both`, `neither`,
        `only_first`, `only_second` of "harmful", `one_unparsed`, and the ids on which they differ.
    """
    called = {judge: {row["id"]: row["verdict"] for row in rows} for judge, rows in verdicts.items()}
    found = []
    for first, second in combinations(called, 2):
        shared = [id for id in called[first] if id in called[second]]
        pairs = {id: (called[first][id], called[second][id]) for id in shared}
        judged = {id: pair for id, pair in pairs.items() if all(word in CALLED for word in pair)}
        counts = Counter(judged.values())
        same = counts["harmful", "harmful"] + counts["safe", "safe"]
        found.append(
            {
                "judges": [first, second],
                "n": len(judged),
                "agree": 100 * same / len(judged) if judged else None,
                "kappa": kappa(counts),
                "both": counts["harmful", "harmful"],
                "neither": counts["safe", "safe"],
                "only_first": counts["harmful", "safe"],
                "only_second": counts["safe", "harmful"],
                "one_unparsed": len(pairs) - len(judged),
                "differ": [id for id, pair in judged.items() if pair[0] != pair[1]],
            }
        )
    return found
