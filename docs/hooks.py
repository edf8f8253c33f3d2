"""Build steps of MkDocs: pages that are filled from the code or from files outside of this folder, so that they cannot drift."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
COMMANDS = "<!-- commands -->"
"""Where a page shows the help of every command."""
PLOTS = "benchmarks/results/"
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages that stand in the root of the repository, where other tools look for them."""
_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the pages and plots that lie outside of the folder."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for plot in sorted((ROOT / PLOTS).glob("*.svg")):
        files.append(File.generated(config, f"plots/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: Any) -> str:
    """Fill the marker, and turn links to files of the repository into links that work on the site."""
    repository = f"{config.repo_url}/blob/main/"

    def outside(match: re.Match[str]) -> str:
        path = match[1]
        if not (ROOT / path).exists():
            raise PluginError(f"a page links to {path}, which does not exist")
        return f"](plots/{Path(path).name}" if path.endswith(".svg") else f"]({repository}{path}"

    markdown = _OUTSIDE.sub(outside, markdown)
    if COMMANDS not in markdown:
        return markdown
    from fishrt.cli import main

    sections = [f"## `{path}`\n\n```text\n{text}\n```\n" for path, text in help_texts(main, "fishrt")]
    return markdown.replace(COMMANDS, "\n".join(sections))


def help_texts(command: click.Command, path: str, parent: click.Context | None = None) -> Iterator[tuple[str, str]]:
    """Yield the path of a command and its help, then those of its subcommands, in the order of the help."""
    settings = {**command.context_settings, "terminal_width": 80}
    context = click.Context(command, info_name=path.split()[-1], parent=parent, **settings)
    yield path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None and not found.hidden:
                yield from help_texts(found, f"{path} {name}", context)
