"""Loading of TensorRT, a logger that keeps its error messages, and calls whose failures become errors.

TensorRT has no type stubs, so its objects are untyped. Its import needs NVIDIA's libraries, so only `load_tensorrt` imports it.
The names that fishrt uses are those of TensorRT 11.4; `tests/support/fake_tensorrt.py` has the same.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from ..errors import GraphError
from ..providers import resolve_provider

log = logging.getLogger(__name__)
T = TypeVar("T")

_ERRORS_KEPT = 12
"""The number of TensorRT's last error messages that an error shows. The first message of a failure is often its cause."""
_ERROR, _WARNING = 1, 2
"""`ILogger.Severity` as numbers: INTERNAL_ERROR 0, ERROR 1, WARNING 2, INFO 3, VERBOSE 4."""


def load_tensorrt() -> Any:
    """Return the tensorrt module. Raises ProviderError if it or a library it needs is missing, broken or too old."""
    resolve_provider("tensorrt")
    return importlib.import_module("tensorrt")


@cache
def log_of(trt: Any) -> Any:
    """Return the one logger of this process, which TensorRT calls from several threads and keeps references to."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class is known only at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: deque[str] = deque(maxlen=_ERRORS_KEPT)
            self._lock = threading.Lock()

        def log(self, severity: Any, msg: str) -> None:
            level = int(severity)
            if level <= _ERROR:
                with self._lock:
                    self._errors.append(msg.strip())
            log.log(logging.INFO if level <= _WARNING else logging.DEBUG, "TensorRT: %s", msg)

        def take_errors(self) -> list[str]:
            """Return and clear the error messages, oldest first, without repetitions."""
            with self._lock:
                errors = list(dict.fromkeys(self._errors))
                self._errors.clear()
            return errors

    return Logger()


def checked(trt: Any, what: str, call: Callable[[], T | None], hint: str | None = None) -> T:
    """Return the result of a call of TensorRT, which reports failures as None, False or an exception and logs the reason.

    what: names the call. Raises GraphError, with the messages of the log, for a failure.
    """
    kept = log_of(trt)
    kept.take_errors()  # drop messages of earlier failures
    raised = ""
    try:
        result = call()
    except (RuntimeError, ValueError, TypeError) as error:  # pybind11 converts C++ exceptions to these
        result, raised = None, str(error)
    if result is None or result is False:
        reasons = [*kept.take_errors(), *([raised] if raised else [])]
        raise GraphError(f"TensorRT {what} failed: {'; '.join(reasons) or 'it gave no reason'}", hint=hint)
    return result
