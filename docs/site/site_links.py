"""The links of a page, changed for the site.

The pages in docs/ link to each other and to files of the checkout, as one reads them in an editor. In the
site, a link to a file outside docs/ leads to its page, or becomes text if it has none.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABOUT = {
    "SECURITY.md": "about/security.md",
    "CHANGELOG.md": "about/changelog.md",
    "CONTRIBUTING.md": "about/contributing.md",
    "benchmarks/LOG.md": "about/log.md",
}
"""Files outside docs/ that are pages of the site."""
README = {"README.md": "index.md", "README.zh.md": "index.zh.md"}
LINK = re.compile(r"(?P<text>(?<!!)\[[^\]]*\])\((?P<target>[^)#\s:]+)(?P<anchor>#[^)]*)?\)")


def for_site(markdown: str, page: str) -> str:
    """Return the text of a page with links that work in the site.

    Args:
        page: the page's path in the site, with slashes.
    """
    outside = {target: name for name, target in ABOUT.items()}
    folder = (ROOT / outside[page] if page in outside else ROOT / "docs" / page).parent
    up = "../" * page.count("/")

    def link(match: re.Match[str]) -> str:
        path = (folder / match["target"]).resolve()
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
        if name.startswith("docs/") and path.suffix:
            target = name.removeprefix("docs/")
        elif name in ABOUT:
            target = ABOUT[name]
        elif name in README:
            target = README[name]
        else:
            return match[0] if not path.exists() else match["text"][1:-1]
        return f"{match['text']}({up}{target}{match['anchor'] or ''})"

    return LINK.sub(link, markdown)
