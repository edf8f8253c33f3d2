"""The execution providers: their names, whether this machine can use them, and the choice of "auto".

A requested provider is used, or an error gives the reason; it is never replaced. Only "auto" chooses, and it logs why.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from types import ModuleType

from . import machine
from .errors import ProviderError

log = logging.getLogger(__name__)

LEAST_TENSORRT = 11
"""The first major version in which every network is strongly typed, as fishrt's plans are."""
NEVER_BY_ITSELF = {
    "tensorrt": "its plans must be built first",
    "coreml": "it runs only the codec of a bundle with static graphs, and the language model on the CPU",
}
"""Providers that "auto" does not choose, and the reason."""
_WHEELS = ("onnxruntime", "onnxruntime-gpu")
"""Distributions that install the same Python package."""
_NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"
"""From 1.29 on, ONNX Runtime stores a device id and a queue in the home folder and uploads the queue after some seconds. It reads
this variable once, at import: `disable_telemetry_events` comes too late."""
os.environ.setdefault(_NO_TELEMETRY, "1")  # at module level: before every import of onnxruntime in this project
_SYSTEMS = {"linux": "Linux", "win32": "Windows", "darwin": "macOS"}


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider that runs graphs, and its requirements."""

    name: str
    extra: str
    """The pip extra of fishrt that installs its libraries."""
    ort_name: str | None
    """ONNX Runtime's name of it; None for TensorRT, which runs without ONNX Runtime."""
    systems: tuple[str, ...] = ()
    """The values of `sys.platform` on which it exists; empty for all."""


_PROVIDERS = (
    Provider("cpu", "cpu", "CPUExecutionProvider"),
    Provider("cuda", "cuda", "CUDAExecutionProvider", ("linux", "win32")),
    Provider("tensorrt", "trt", None, ("linux", "win32")),
    Provider("coreml", "cpu", "CoreMLExecutionProvider", ("darwin",)),
)
PROVIDERS = {provider.name: provider for provider in _PROVIDERS}
"""Providers by name, in the order of the report of doctor.py."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """The reason why a provider cannot be used here, and the remedy."""

    what: str
    hint: str | None


@dataclass(frozen=True, slots=True)
class Choice:
    """The provider that "auto" chooses, and the reason."""

    name: str
    reason: str


def resolve_provider(name: str) -> str:
    """Return `name`, or the provider that "auto" chooses, which is logged. Raises ProviderError if it cannot be used."""
    if name == "auto":
        choice = choose_provider()
        log.info('provider "auto" chose "%s" (%s)', choice.name, choice.reason)
        return choice.name
    if name not in PROVIDERS:
        raise ProviderError(f"unknown provider {name!r}", hint=f"known providers: auto, {', '.join(PROVIDERS)}")
    if name not in _usable:
        if obstacle := find_obstacle(name):
            raise ProviderError(f"provider {name!r} cannot be used: {obstacle.what}", hint=obstacle.hint)
        _usable.add(name)
    return name


_usable: set[str] = set()
"""Providers found to be usable: the check takes up to a second, and every graph of a bundle needs it."""


def choose_provider() -> Choice:
    """Return cuda if ONNX Runtime has it and there is a device, else cpu; see NEVER_BY_ITSELF for the others.

    Raises ProviderError if the CPU cannot be used either.
    """
    if obstacle := find_obstacle("cpu"):
        raise ProviderError(f"no provider can be used: {obstacle.what}", hint=obstacle.hint)
    if obstacle := find_obstacle("cuda"):
        return Choice("cpu", f"no cuda here: {obstacle.what}")
    return Choice("cuda", "ONNX Runtime has its CUDA provider, and there is a device with a driver")


def find_obstacle(name: str) -> Obstacle | None:
    """Return why one of PROVIDERS cannot be used on this machine; None if no obstacle can be found before a session opens."""
    provider = PROVIDERS[name]
    if provider.systems and sys.platform not in provider.systems:
        return Obstacle(f"it exists only on {' and '.join(_SYSTEMS[s] for s in provider.systems)}", "use another provider")
    if provider.ort_name is None:
        return _tensorrt_obstacle(provider) or _device_obstacle()
    try:
        ort = import_onnxruntime(provider.extra)
    except ProviderError as error:
        return Obstacle(str(error), error.hint)
    if provider.ort_name not in ort.get_available_providers():
        return Obstacle(f"the installed ONNX Runtime has no {provider.ort_name}", _replacement(provider))
    return (_device_obstacle() or _library_obstacle(ort)) if name == "cuda" else None


def import_onnxruntime(extra: str = "cpu") -> ModuleType:
    """Return the onnxruntime module. Raises ProviderError, with the pip extra that installs it, if it is missing or broken."""
    check_wheels()
    try:
        import onnxruntime
    except ImportError as error:
        raise ProviderError(f"ONNX Runtime cannot be loaded: {error}", hint=f'pip install "fishrt[{extra}]"') from None
    return onnxruntime  # type: ignore[no-any-return]


def telemetry() -> bool:
    """Return whether ONNX Runtime's telemetry is on: it is off unless the user's environment says otherwise."""
    return os.environ.get(_NO_TELEMETRY, "").lower() not in ("1", "true", "yes", "on")


@cache
def check_wheels() -> None:
    """Check that no two distributions of ONNX Runtime are installed into one folder. Raises ProviderError otherwise.

    In separate folders they do not conflict: Python imports the first one on its path.
    """
    folders = []
    for name in _WHEELS:
        try:
            folders.append(metadata.distribution(name).locate_file("onnxruntime"))
        except metadata.PackageNotFoundError:
            return
    if folders[0] == folders[1]:
        raise ProviderError(
            f"{' and '.join(_WHEELS)} are installed into one folder and overwrite each other's files",
            hint=f"pip uninstall -y {' '.join(_WHEELS)}, and then "
            'pip install "fishrt[cuda]" for NVIDIA devices, or pip install "fishrt[cpu]" for none',
        )


def version(distribution: str) -> str | None:
    """Return the version of a distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _replacement(provider: Provider) -> str:
    """Return the commands that install the build of ONNX Runtime with this provider. They remove another build first."""
    installed = version("onnxruntime") if provider.name == "cuda" else None
    first = "pip uninstall -y onnxruntime, then " if installed else ""
    return f'{first}pip install "fishrt[{provider.extra}]"'


def _device_obstacle() -> Obstacle | None:
    if error := machine.driver_error():
        return Obstacle(
            f"NVIDIA's driver cannot be loaded ({error})",
            "install the driver; start a container with its devices, such as `docker run --gpus all`",
        )
    if machine.gpus() == ():
        return Obstacle("NVIDIA's driver shows no device", "check CUDA_VISIBLE_DEVICES, and the list of nvidia-smi")
    return None


def _library_obstacle(ort: ModuleType) -> Obstacle | None:
    missing = [library for library in machine.cuda_libraries(ort) if library.error]
    if not missing:
        return None
    return Obstacle(
        f"the CUDA provider needs {', '.join(library.name for library in missing)}, which cannot be loaded ({missing[0].error})",
        'pip install "onnxruntime-gpu[cuda,cudnn]"',
    )


def _tensorrt_obstacle(provider: Provider) -> Obstacle | None:
    hint = f'pip install "fishrt[{provider.extra}]"'
    for module in ("tensorrt", "cuda.bindings.runtime"):
        try:
            loaded = importlib.import_module(module)
        except ModuleNotFoundError as error:
            return Obstacle(f"{error.name or module} is not installed", hint)
        except (ImportError, OSError) as error:
            return Obstacle(f"{module} cannot be loaded: {error}", f"{hint} again: the libraries come with it")
        if module == "tensorrt" and int(str(loaded.__version__).partition(".")[0]) < LEAST_TENSORRT:
            return Obstacle(f"TensorRT {loaded.__version__} is too old; {LEAST_TENSORRT} is needed", f"{hint} --upgrade")
    return None
