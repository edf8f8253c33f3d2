"""Errors of requests: one class, from every source, with OpenAI's error object as the body of the reply."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from ..errors import (
    ArgumentError,
    AudioError,
    BusyError,
    FishrtError,
    KeptVoiceError,
    OutputError,
    PromptError,
    SamplingError,
    TakenVoiceError,
    TimeLimitError,
    UnknownVoiceError,
    VoiceError,
)
from .encodings import answer
from .words import expected

log = logging.getLogger(__name__)

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_PARAMS: Mapping[type[FishrtError], str | None] = {
    PromptError: "input",
    VoiceError: "voice",
    SamplingError: None,
    AudioError: None,
    ArgumentError: None,
}
"""The errors of the runtime that are a client's mistake, with the field that they are about."""
_STATUS: Mapping[type[FishrtError], tuple[int, str]] = {
    UnknownVoiceError: (404, "voice_not_found"),
    TakenVoiceError: (409, "voice_exists"),
    KeptVoiceError: (403, "voice_kept"),
}
"""Those that have a status and a code of their own."""


GONE = 499
"""The status in log and metrics of a request whose client went away; nobody receives it."""


class GoneError(Exception):
    """The client went away."""


class Problem(HTTPException):
    """A request that is not answered with what it asks for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Make the problem. status: of HTTP. param: the field at fault. code: a word for programs. headers: of the reply."""
        super().__init__(status, message, headers=headers)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _KINDS.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


def problem(error: Exception) -> Problem:
    """Return the problem that an exception of any kind is to the client. A fault of the server tells nothing of its inside."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, HTTPException):
        what = error.detail
        if error.status_code == 404:
            what = "there is no such path; /docs lists all"
        elif error.status_code == 405:
            what = f"this path takes {(error.headers or {}).get('Allow', 'another method')}; /docs lists all"
        return Problem(error.status_code, what, code=_WORDS.get(error.status_code), headers=error.headers)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        names = [str(part) for part in first["loc"][1:]]
        return Problem(400, f"{'.'.join(names)}: {expected(first)}", param=names[0])
    if isinstance(error, BusyError | TimeLimitError):
        why = "queue_full" if isinstance(error, BusyError) else "waited_too_long"
        return Problem(429, f"{error}; {error.hint}", code=why, headers={"Retry-After": str(error.retry_s)})
    if isinstance(error, FishrtError):
        message = f"{error}; {error.hint}" if error.hint else str(error)
        for kind, param in _PARAMS.items():
            if isinstance(error, kind):
                status, code = _STATUS.get(type(error), (400, None))
                return Problem(status, message, param=param, code=code)
        if isinstance(error, OutputError):  # its message names a folder of the server
            log.error("%s", error)
            return Problem(500, "the server cannot write its files; its log has more", code="cannot_write")
        return Problem(500, message, code="generation_failed")
    return Problem(500, "the server has a fault; its log has more", code="internal_error")


@contextmanager
def about(param: str, code: str | None = None) -> Iterator[None]:
    """Let an error of a client's value in the block name the field that has it. code: of errors that have none."""
    try:
        yield
    except (AudioError, PromptError, VoiceError) as error:
        found = problem(error)
        raise Problem(found.status_code, found.detail, param=param, code=found.code or code) from None


_WORDS = {404: "not_found", 405: "method_not_allowed"}


NATIVE = re.compile(r"/v1/(tts|references|vqgan)(/|$)|/model(/|$)|/generate$")
"""Paths whose clients read more than OpenAI's object."""
PACKED = re.compile(r"/v1/(references|vqgan)/")
"""Paths that answer in MessagePack, unless JSON is asked for."""


def reply(found: Problem, scope: Scope) -> Response:
    """Return the reply to a request for a problem."""
    body, path = found.body, scope["path"]
    if NATIVE.match(path):
        said = {"statusCode": found.status_code, "message": found.detail, "detail": found.detail, "success": False}
        return answer(said | body, scope, found.status_code, found.headers, packed=PACKED.match(path) is not None)
    return JSONResponse(body, found.status_code, dict(found.headers or {}))
