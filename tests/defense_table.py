"""The table of defenses in docs/methods.md, made from the declarations: `python tests/defense_table.py` writes it."""

from __future__ import annotations

from pathlib import Path

from holdfast import registry

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
BEGIN, END = "<!-- defenses: made by tests/defense_table.py -->", "<!-- end of defenses -->"
STAGES = {"alignment": "alignment", "user": "user", "post_hoc": "post-hoc"}


def table() -> str:
    """A row for each defense of ours: by stage, the baseline first, then by label."""
    faces = [face for face in registry.faces("defenses").values() if not face.package]

    def place(face: registry.Face) -> tuple[int, bool, str]:
        first = list(STAGES).index(face.facts["stages"][0])
        return first, not face.facts.get("baseline", False), face.facts["label"].lower()

    lines = ["| stage | method | page |", "|---|---|---|"]
    for face in sorted(faces, key=place):
        stages = ", ".join(STAGES[stage] for stage in face.facts["stages"])
        what = face.summary.partition(": ")[2].rstrip(".") or face.summary
        page = f"[{face.name}](defenses/{face.name}.md)"
        lines.append(f"| {stages} | {face.facts['label']}: {what} | {page} |")
    return "\n".join(lines)


def parts(text: str) -> tuple[str, str, str]:
    """Return the page's text before the table, the table, and the text after it."""
    before, _, rest = text.partition(BEGIN)
    inside, _, after = rest.partition(END)
    return before, inside.strip(), after


if __name__ == "__main__":
    before, _, after = parts(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
