"""`fishrt fetch`: a checkpoint or a bundle from the Hugging Face Hub."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from ...bundle.fetched import choose_bundle
from ...bundle.folder import Bundle
from ...bundle.manifest import MANIFEST
from ...hub.download import download
from ...hub.repository import Repository
from ...progress import size
from ..base.commands import finish, warn
from ..base.options import new_reporter, output_options


@click.command(short_help="Download a checkpoint or a bundle.")
@click.argument("repository", metavar="OWNER/NAME")
@click.argument("folder", required=False, type=click.Path(path_type=Path), metavar="[DIR]")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit.  [default: main]")
@output_options
def fetch(repository: str, folder: Path | None, revision: str | None) -> None:
    """Download the checkpoint or bundle OWNER/NAME of the Hugging Face Hub, and print where it is.

    It goes into DIR, or into the hub's cache. Only the files that an export needs, or that a bundle consists of, are downloaded.
    The next call resumes a download that breaks off. For a gated repository, accept its terms on its page, then log in with
    `hf auth login`, or set HF_TOKEN. HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE work as in other tools of Hugging Face.

    \b
    fishrt fetch fishaudio/openaudio-s1-mini s1-mini
    fishrt export s1-mini s1-mini-bundle
    """
    wanted = Repository.parse(repository, revision)
    reporter, chosen = new_reporter(), list[str]()

    def choose(names: Sequence[str], read: Callable[[str], Path]) -> Sequence[str]:
        from fishrt_export.checkpoint.diffusion.files import choose_files
        from fishrt_export.checkpoint.names import left_out

        if MANIFEST in names:
            chosen[:] = choose_bundle(names, read)
        else:
            chosen[:] = choose_files(names, read)
            if others := left_out(names):
                warn(f"{wanted} has several sets of weights; left out: {', '.join(others)}")
        return chosen

    try:
        found = download(wanted, choose, folder, reporter.show)
    finally:
        reporter.clear()
    is_bundle = MANIFEST in chosen
    if is_bundle:
        Bundle.load(found).verify()
    files = {name: found.joinpath(name).stat().st_size for name in dict.fromkeys(chosen)}
    place, kind = shlex.quote(str(found)), "bundle" if is_bundle else "checkpoint"
    following = f'fishrt speak --bundle {place} "Hello."' if is_bundle else f"fishrt export {place} BUNDLE"
    finish(
        {"repository": wanted.id, "revision": wanted.revision, "kind": kind, "path": str(found), "files": files},
        printed=str(found),
        said=f"{wanted}: {size(sum(files.values()))} in {len(files)} files\nnext: {following}",
    )
