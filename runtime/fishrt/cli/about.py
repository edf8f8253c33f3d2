"""`fishrt help` and `fishrt completion`: the command line about itself."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from .streams import emit


@click.command(name="help", short_help="Show the help of a command.")
@click.argument("words", nargs=-1, metavar="[COMMAND]…")
@click.pass_context
def show_help(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Show the help of COMMAND, such as `fishrt help voice add`."""
    found = ctx.find_root()
    for word in words:
        command = found.command.get_command(found, word) if isinstance(found.command, click.Group) else None
        if command is None:
            raise click.UsageError(f"there is no command {' '.join(words)!r}", ctx.find_root())
        found = click.Context(command, parent=found, info_name=word)
    emit(found.get_help())


@click.command(short_help="Print a script that completes commands and options in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that lets SHELL complete commands and options.

    \b
    bash:  eval "$(fishrt completion bash)"       in ~/.bashrc
    zsh:   eval "$(fishrt completion zsh)"        in ~/.zshrc, after compinit
    fish:  fishrt completion fish | source        in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, shell
    emit(kind(ctx.find_root().command, {}, "fishrt", "_FISHRT_COMPLETE").source())
