"""The log of `fishrt serve` on standard error."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .commands import session
from .streams import logging_to, say


@contextmanager
def logging_server(log: Log) -> Iterator[None]:
    """Give the records of this project and of the libraries to a handler inside the block."""
    root = logging.getLogger()
    others = Log(log.as_json)
    others.addFilter(lambda record: not record.name.startswith("fishrt"))
    root.addHandler(others)
    try:
        with logging_to(log, logging.INFO):
            yield
    finally:
        root.removeHandler(others)


class Log(logging.Handler):
    """The log on standard error. By default it has no text of users: only records of the server and errors are in it."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json, self._session = as_json, session()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        least = logging.WARNING if self._session.quiet else logging.INFO
        if not record.name.startswith(("fishrt.server", "fishrt_engines")):
            least = logging.ERROR
        if not self._session.verbose and record.levelno < least:
            return
        message = record.getMessage().partition("\n")[0]
        if record.exc_info and (error := record.exc_info[1]):
            place = traceback.extract_tb(error.__traceback__)[-1]
            message += f": {type(error).__name__} in {Path(place.filename).name}, line {place.lineno}; --debug shows more"
            if self._session.debug:
                message = "".join(traceback.format_exception(error))
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(record.created))
        if not self.as_json:
            say(f"{when} {record.levelname.lower()}: {message}")
            return
        facts = getattr(record, "request", {"message": message})
        say(json.dumps({"time": when, "level": record.levelname.lower(), **facts}))
