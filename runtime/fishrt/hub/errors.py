"""Errors of huggingface_hub, of its HTTP client and of the disk, as HubErrors that say what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import FishrtError, HubError
from .repository import Repository

_ERRNO = re.compile(r"\[Errno -?\d+\] ")
_LOGIN = "hf auth login, or set HF_TOKEN to a token of https://huggingface.co/settings/tokens"


def endpoint() -> str:
    """Return the address of the hub."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def is_unreachable(error: Exception) -> bool:
    """Return whether no hub answered: no network, offline mode, or a hub that is down."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, OfflineModeIsEnabled | HfHubHTTPError.__bases__[0])  # the base of all errors of its HTTP client


@contextmanager
def explained(repository: Repository) -> Iterator[None]:
    """Turn the errors of huggingface_hub, of its HTTP client and of the disk into HubError."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except FishrtError:
        raise
    except Exception as error:
        cause: BaseException = error
        if isinstance(cause, LocalEntryNotFoundError) and cause.__cause__:
            cause = cause.__cause__  # the reason why hf_hub_download could not ask the hub
        address = endpoint()
        match cause:
            case GatedRepoError():
                said = f"{repository.id} is gated: its publisher asks you to accept terms before you download it"
                hint = f"accept the terms at {address}/{repository.id}; then: {_LOGIN}"
            case RepositoryNotFoundError():
                said = f"{address} has no repository {repository.id}, or it is private and your token may not read it"
                hint = f"check the spelling; for a private one: {_LOGIN}; a folder is given as ./{repository.id}"
            case RevisionNotFoundError():
                said, hint = f"{repository.id} has no revision {repository.revision}", f"see {address}/{repository.id}/tree/main"
            case HfHubHTTPError(response=response) if response.status_code in (401, 403):
                said, hint = f"{address} refuses your token, or your token may not read {repository.id}", _LOGIN
            case HfHubHTTPError(response=response):
                said, hint = f"{address} answers with HTTP status {response.status_code}", "try again later"
            case OfflineModeIsEnabled():
                said = f"{repository} is not in the cache {repository.storage.parent}, and HF_HUB_OFFLINE is set"
                hint = "unset HF_HUB_OFFLINE to download it"
            case Exception() if is_unreachable(cause) or (isinstance(cause, OSError) and cause.errno is None):
                said = f"{address} cannot be reached, or the connection broke off: {_ERRNO.sub('', str(cause))}"
                hint = (
                    "the same command goes on where the download ended; behind a proxy set HTTPS_PROXY, for a mirror HF_ENDPOINT"
                )
            case OSError():
                said, hint = (
                    f"{cause.filename or 'a file'} cannot be written: {cause.strerror}",
                    "the same command resumes the download",
                )
            case _:
                raise
        raise HubError(said, hint=hint) from error
