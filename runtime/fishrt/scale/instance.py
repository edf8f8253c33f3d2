"""A Ray that leaves nothing behind: one on this machine for as long as it is used, or a running cluster."""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import FishrtError

_STORE_BYTES = 80_000_000
"""Shared memory for objects, near the least that Ray takes: only small records are sent."""
_GUARD = """
import os, shutil, signal, sys, time
folder, spared = sys.argv[1], (os.getpid(), os.getppid())
sys.stdin.buffer.read()  # ends when the process that started Ray does, however
time.sleep(2)
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        if int(pid) not in spared and any(file.startswith(folder + "/") for file in files):
            os.kill(int(pid), signal.SIGKILL)
    except OSError:
        pass
shutil.rmtree(folder, ignore_errors=True)
"""
"""A process that ends what stays of a Ray whose driver died: its agents would wait a minute for it."""


@contextmanager
def connected(address: str | None, cpus: int) -> Iterator[Any]:
    """Yield the module `ray`, connected to a cluster, or to one that is started here with so many CPUs and ended afterwards.

    Raises FishrtError if Ray is not installed or cannot be reached, or if the cluster has fewer CPUs.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _started(cpus) if address is None else _joined(address, cpus) as ray:
        yield ray


def _imported() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise FishrtError(f"Ray is not installed ({error})", hint='pip install "fishrt[ray]"') from error


@contextmanager
def _started(cpus: int) -> Iterator[Any]:
    """Start Ray on this machine. A random token keeps others out; nothing is written into the home folder."""
    if "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != "token":  # it reads this once
        raise FishrtError("Ray was imported before it could be closed to others", hint="give the address of the Ray that you use")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # of 30, which a busy machine exceeds
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray = _imported()
    folder = tempfile.mkdtemp(prefix="fishrt-ray-")  # short: the path of a socket has 107 bytes
    guard = subprocess.Popen([sys.executable, "-I", "-c", _GUARD, folder], stdin=subprocess.PIPE, start_new_session=True)
    assert guard.stdin is not None
    try:
        with _signals_kept():
            ray.init(
                num_cpus=cpus,
                num_gpus=0,
                include_dashboard=False,
                object_store_memory=_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=folder,
            )
        try:
            yield ray
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        guard.stdin.close()


@contextmanager
def _joined(address: str, cpus: int) -> Iterator[Any]:
    """Connect to a running cluster."""
    ray = _imported()
    try:
        with _signals_kept():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise FishrtError(
            f"Ray cannot be reached at {address}: {error}",
            hint="start it with: ray start --head; if it was started with RAY_AUTH_MODE=token, set that and RAY_AUTH_TOKEN here",
        ) from error
    try:
        there = int(ray.cluster_resources().get("CPU", 0))
        if there < cpus:
            raise FishrtError(
                f"the workers need {cpus} CPUs, and the cluster has {there}", hint="take fewer --workers or --threads"
            )
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep the handlers of the signals that end a command: Ray sets its own."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
