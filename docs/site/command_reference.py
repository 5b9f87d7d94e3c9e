"""The command reference, made from the command itself."""

from __future__ import annotations

from typing import Any

import typer

from holdfast.cli.app import app

HEAD = """# Commands

This page is made from the command's own help. `holdfast COMMAND --help` shows the same in a terminal. Exit
codes: 0 done, 1 something failed, 2 an input cannot be used; [`holdfast gate`](../gate.md) also ends with 3
(failed) or 4 (undecided).
"""


def page() -> str:
    """Return the page in Markdown: one section for each command."""
    group = typer.main.get_command(app)
    return "\n\n".join([HEAD, *_sections(group, "holdfast")]) + "\n"


def _sections(group: Any, prefix: str) -> list[str]:
    """Return the sections of a group's commands, and those of its groups."""
    found: list[str] = []
    for name, command in group.commands.items():
        if command.hidden:
            continue
        found.append(section(command, f"{prefix} {name}"))
        if hasattr(command, "commands"):
            found += _sections(command, f"{prefix} {name}")
    return found


def section(command: Any, name: str) -> str:
    """Return one command: its help, its arguments and options, and its example."""
    lines = [f"## {name}", _text(command.help)]
    if command.epilog:
        lines += [f"```bash\n{_text(command.epilog).removeprefix('Example: ')}\n```"]
    rows = [row for parameter in command.params if (row := _row(parameter))]
    if rows:
        lines += ["| argument or option | default | meaning |\n|---|---|---|\n" + "\n".join(rows)]
    return "\n\n".join(lines)


def _row(parameter: Any) -> str:
    if getattr(parameter, "hidden", False) or parameter.name == "help":
        return ""
    if parameter.param_type_name == "option":
        names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    else:
        names = f"`{parameter.metavar or parameter.name.upper()}`"
    default = "required" if parameter.required else _default(parameter)
    meaning = _text(getattr(parameter, "help", "")).replace("|", "\\|")
    return f"| {names} | {default} | {meaning} |"


def _default(parameter: Any) -> str:
    value = parameter.default
    if isinstance(value, bool):
        names = parameter.opts if value else parameter.secondary_opts
        return f"`{names[0]}`" if parameter.secondary_opts else ""
    return "" if value in (None, (), [], "") or callable(value) else f"`{value}`"


def _text(help_text: str | None) -> str:
    """Return a help text in one line for each paragraph."""
    paragraphs = (help_text or "").replace("\b", "").strip().split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
