"""The documentation site: its navigation, its links, and the pages made from the code."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml

import holdfast
from holdfast.cli.app import app
from holdfast.recipe import Recipe
from places import DOCS, ROOT

MODULES = ("command_reference", "python_reference", "recipe_reference", "site_links")


@pytest.fixture(scope="module")
def site():
    """The modules of docs/site."""
    import importlib
    import sys

    sys.path.insert(0, str(DOCS / "site"))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(DOCS / "site"))


def pages(node) -> set[str]:
    """The pages of a navigation."""
    if isinstance(node, str):
        return {node}
    children = node.values() if isinstance(node, dict) else node
    return set().union(*map(pages, children))


def test_every_page_is_in_the_navigation(site):
    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    written = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md") if p.parent.name != "defenses"}
    made = {p for p in listed if p.startswith(("about/", "reference/"))}
    assert listed - made == written
    assert {p for p in made if p.startswith("about/")} == set(site["site_links"].ABOUT.values())


def test_every_link_of_the_site_leads_to_a_page_of_it(site):
    links = site["site_links"]
    sources = {p.relative_to(DOCS).as_posix(): p for p in DOCS.rglob("*.md")}
    sources |= {page: ROOT / name for name, page in links.ABOUT.items()}
    for page, source in sources.items():
        for match in links.LINK.finditer(links.for_site(source.read_text(), page)):
            target = (DOCS / page).parent / match["target"]
            name = target.resolve().relative_to(DOCS).as_posix()
            assert name in sources or target.is_file() or name.startswith("reference/"), f"{page}: {match[0]}"


def test_links_to_the_checkout_become_pages_or_text(site):
    for_site = site["site_links"].for_site
    assert for_site("[a](../SECURITY.md#what)", "trust.md") == "[a](about/security.md#what)"
    assert for_site("[a](../../README.md)", "guides/lisa.md") == "[a](../index.md)"
    assert for_site("[a](docs/trust.md)", "about/security.md") == "[a](../trust.md)"
    assert for_site("[a](../benchmarks/results/faults.json)", "trust.md") == "a"
    assert (
        for_site("[a](https://x.org/y) ![b](report.png)", "report.md")
        == "[a](https://x.org/y) ![b](report.png)"
    )


def test_the_command_reference_has_every_command_with_its_options(site):
    page = site["command_reference"].page()
    for command in app.registered_commands:
        name = command.name or command.callback.__name__.replace("_", "-")
        assert f"\n## holdfast {name}\n" in page
    section = page.split("## holdfast safe-lora\n")[1].split("\n## ")[0]
    assert re.search(r"\| `--projection` \| `approx` \| .* \|", section)
    assert "```bash\nholdfast safe-lora my-adapter" in section
    assert "| `--check`, `--no-check` | `--check` |" in page


def test_the_recipe_reference_has_every_key_and_parameter(site):
    page = site["recipe_reference"].page()
    for key in Recipe.model_fields:
        assert f"| `{key}` |" in page
    assert "| `data.poison_ratio` | number, ≥ 0, ≤ 1 | `0.0` |" in page
    assert "| `evaluation.judges.threshold` | number or none, ≥ 0, ≤ 1 | none |" in page
    assert "| `rho` | `float` | `1.0` | Strength of the proximal term. |" in page
    assert "typing" not in page


def test_the_python_reference_has_every_public_name(site):
    page = site["python_reference"].page()
    for name in holdfast.__all__:
        assert name == "__version__" or re.search(rf"^::: holdfast[\w.]*\.{name}$", page, re.M)


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["version"] == holdfast.__version__
    assert cited["license"] == project["license"]
