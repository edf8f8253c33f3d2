"""A process that speaks writes nothing outside of its cache folder, and opens no socket."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SPEAKS = """
import os, sys
from fishrt import TTS
TTS.load(threads=1).speak("Good morning.", max_frames=8)
if sys.platform == "linux":
    targets = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
    print(*[target for target in targets if target.startswith("socket:")])
"""


def child(code: str, home: Path, **variables: str) -> str:
    """Run Python code without any variable of this process but the paths: those of a CI service switch telemetry off, too."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "SYSTEMROOT") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        env={**kept, "HOME": str(home), "PYTHONUTF8": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert "elemetry" not in done.stderr
    return done.stdout.strip()


def test_speaking_writes_nothing_and_opens_no_socket(tmp_path: Path) -> None:
    """ONNX Runtime writes a device id into the home folder as soon as a session is made, and opens sockets later."""
    assert child(SPEAKS, tmp_path) == ""
    cache = tmp_path / ".cache" / "fishrt"
    assert [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(cache)] == []


@pytest.mark.parametrize("module", ["fishrt_engines", "fishrt.tts", "fishrt.cli.bundles.export"])
def test_telemetry_is_off_before_onnx_runtime_is_imported(tmp_path: Path, module: str) -> None:
    code = f"import os, sys, {module}; print(os.environ['ORT_DISABLE_TELEMETRY'], 'onnxruntime' in sys.modules)"
    assert child(code, tmp_path) == "1 False"


@pytest.mark.parametrize(("value", "on"), [("0", True), ("", True), ("1", False), ("true", False)])
def test_the_users_environment_decides(tmp_path: Path, value: str, on: bool) -> None:
    code = "from fishrt_engines.providers import telemetry; print(telemetry())"
    assert child(code, tmp_path, ORT_DISABLE_TELEMETRY=value) == str(on)
