"""Hooks of mkdocs: the generated pages, the files outside docs/, and their links."""

from __future__ import annotations

from typing import Any

import command_reference  # mkdocs puts this folder on the path while it loads the hooks
import python_reference
import recipe_reference
import site_links
from mkdocs.structure.files import File, Files


def on_config(config: Any) -> Any:
    """Put the pages of all methods into the navigation."""
    [methods] = [part["Methods"] for part in config.nav if "Methods" in part]
    pages = sorted((site_links.ROOT / "docs" / "defenses").glob("*.md"))
    methods += [f"defenses/{page.name}" for page in pages]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and the files outside docs/."""
    pages = {
        "reference/commands.md": command_reference.page(),
        "reference/recipe-keys.md": recipe_reference.page(),
        "reference/python.md": python_reference.page(),
    }
    for name, target in site_links.ABOUT.items():
        pages[target] = (site_links.ROOT / name).read_text(encoding="utf-8")
    for target, text in pages.items():
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Change the links of a page for the site."""
    return site_links.for_site(markdown, page.file.src_uri)
