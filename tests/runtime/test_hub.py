"""Downloads from a small hub on the loopback interface, without network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from click.testing import CliRunner, Result

from fishrt.bundle.fetched import bundle_folder
from fishrt.bundle.folder import Bundle, describe_files
from fishrt.bundle.manifest import MANIFEST, Manifest
from fishrt.cli import main
from fishrt.errors import BundleError, HubError
from fishrt.hub.download import PARTIAL, download
from fishrt.hub.repository import Repository, names_repository
from fishrt.progress import size
from fishrt_export.checkpoint.names import checkpoint_name, choose_checkpoint
from fishrt_export.errors import ExportError
from helpers_text import OWN_GOLDEN, voice
from helpers_text import bundle_folder as write_bundle
from small_hub import SmallHub, serving

CHECKPOINT, BUNDLE = "fish/fish-1.5", "someone/my-bundle"
NEEDED = {
    "LICENSE",
    "README.md",
    "codec_config.json",
    "config.json",
    "firefly-gan-vq-fsq-8x1024-21hz-generator.pth",
    "model.pth",
    "references/anna/a.lab",
    "references/anna/a.wav",
    "special_tokens.json",
    "tokenizer.tiktoken",
}
MODEL_BYTES = 897157


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    """A hub with a checkpoint and a bundle; the hub's library uses it, with its cache in a new folder."""
    checkpoint = tmp_path / "served/checkpoint"
    for half in ("lm", "codec"):
        shutil.copytree(OWN_GOLDEN / "fish-1.5" / half / "checkpoint", checkpoint, dirs_exist_ok=True)
    (checkpoint / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n")
    (checkpoint / "LICENSE").write_text("Terms\n")
    (checkpoint / "references/anna").mkdir(parents=True)
    (checkpoint / "references/anna/a.wav").write_bytes(b"a recording")
    (checkpoint / "references/anna/a.lab").write_text("Words.")
    for unwanted in ("demo.png", ".gitattributes", "vq-gan.pth", "samples/a.wav", "assets/LICENSE"):
        (checkpoint / unwanted).parent.mkdir(exist_ok=True)
        (checkpoint / unwanted).write_bytes(bytes(20_000))
    write_bundle(tmp_path / "served/bundle", voices=[voice()])
    (tmp_path / "served/bundle/picture.png").write_bytes(bytes(100))
    with serving() as served:
        served.repositories = {CHECKPOINT: checkpoint, BUNDLE: tmp_path / "served/bundle"}
        home = tmp_path / "hf"
        for name, value in (
            ("ENDPOINT", served.url),
            ("HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_CACHE", str(home / "hub")),
            ("HF_TOKEN_PATH", str(home / "token")),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_TELEMETRY", True),
            ("DOWNLOAD_CHUNK_SIZE", 10_000),
        ):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
        yield served


def fetch(name: str = CHECKPOINT, folder: Path | None = None) -> Path:
    return download(Repository.parse(name), choose_checkpoint, folder)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_same(folder: Path, hub: SmallHub, name: str = CHECKPOINT) -> None:
    """Check that every file has the served content."""
    for file in names(folder):
        assert (folder / file).read_bytes() == (hub.repositories[name] / file).read_bytes(), file


@pytest.mark.parametrize("into", ["folder", "cache"])
def test_a_checkpoint_comes_with_what_an_export_needs_and_nothing_else(hub: SmallHub, tmp_path: Path, into: str) -> None:
    folder = tmp_path / "new/folder" if into == "folder" else None
    found = fetch(folder=folder)
    assert found == folder or folder is None
    assert names(found) == NEEDED
    assert_same(found, hub)
    assert sorted(name for name, _ in hub.downloads()) == sorted(Path(name).name for name in NEEDED)
    assert all(agent.startswith("fishrt/") for agent in hub.agents)
    hub.asked.clear()
    assert fetch(folder=folder) == found
    assert hub.downloads() == []


def test_progress_tells_bytes_of_all(hub: SmallHub, tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    download(Repository.parse(CHECKPOINT), choose_checkpoint, tmp_path / "a", lambda *told: seen.append(told))
    total = sum((hub.repositories[CHECKPOINT] / name).stat().st_size for name in NEEDED)
    parts = [part for _, part in seen]
    assert parts == sorted(parts)
    assert seen[-1] == (f"downloading config.json, {size(total)} of {size(total)}", 1.0)


@pytest.mark.parametrize("into", ["folder", "cache"])
def test_a_download_that_breaks_off_goes_on_by_itself(hub: SmallHub, tmp_path: Path, into: str) -> None:
    hub.break_off["model.pth"] = [300_000, 0, 200_000]
    found = fetch(folder=tmp_path / "a" if into == "folder" else None)
    assert_same(found, hub)
    assert [sent for name, sent in hub.downloads() if name == "model.pth"] == [
        None,
        "bytes=300000-",
        "bytes=300000-",
        "bytes=500000-",
    ]


@pytest.mark.parametrize("into", ["folder", "cache"])
def test_a_later_call_goes_on_where_a_download_ended(hub: SmallHub, tmp_path: Path, into: str) -> None:
    folder = tmp_path / "a" if into == "folder" else None
    hub.break_off["model.pth"] = [300_000] + [0] * 20
    with pytest.raises(HubError, match="cannot be reached, or the connection broke off") as caught:
        fetch(folder=folder)
    assert "goes on where the download ended" in str(caught.value.hint)
    for left in tmp_path.rglob("*"):
        assert left.name not in ("model.pth", "config.json") or "served" in left.parts
    hub.asked.clear()
    hub.break_off.clear()
    found = fetch(folder=folder)
    assert names(found) == NEEDED
    assert_same(found, hub)
    assert [sent for name, sent in hub.downloads() if name == "model.pth"] == ["bytes=300000-"]
    assert "README.md" not in {name for name, _ in hub.downloads()}


def test_what_has_come_of_another_commit_is_not_gone_on_with(hub: SmallHub, tmp_path: Path) -> None:
    hub.break_off["model.pth"] = [300_000] + [0] * 20
    with pytest.raises(HubError):
        fetch(folder=tmp_path / "a")
    hub.break_off.clear()
    served = hub.repositories[CHECKPOINT] / "model.pth"
    served.write_bytes(served.read_bytes()[::-1])
    assert_same(fetch(folder=tmp_path / "b"), hub)
    (tmp_path / "b/model.pth").write_bytes(b"mine")
    with pytest.raises(HubError, match=r"exists, and is not the one of fish/fish-1\.5") as caught:
        fetch(folder=tmp_path / "b")
    assert "another folder" in str(caught.value.hint)
    assert (tmp_path / "b/model.pth").read_bytes() == b"mine"


def test_content_that_was_not_announced_is_thrown_away(hub: SmallHub, tmp_path: Path) -> None:
    hub.corrupt.add("model.pth")
    with pytest.raises(HubError, match=r"model\.pth of fish/fish-1\.5 came with other content"):
        fetch(folder=tmp_path / "a")
    assert not (tmp_path / "a/model.pth").exists()
    hub.corrupt.clear()
    assert_same(fetch(folder=tmp_path / "a"), hub)
    assert not (tmp_path / "a" / PARTIAL).exists()


def test_a_gated_repository(hub: SmallHub, tmp_path: Path) -> None:
    hub.gated.add(CHECKPOINT)
    with pytest.raises(HubError, match=r"fish/fish-1\.5 is gated") as caught:
        fetch(folder=tmp_path / "a")
    for words in (f"accept the terms at {hub.url}/fish/fish-1.5", "hf auth login", "HF_TOKEN"):
        assert words in str(caught.value.hint)


def test_a_private_repository_needs_the_right_token(hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_right"
    with pytest.raises(HubError, match=r"has no repository fish/fish-1\.5, or it is private"):
        fetch(folder=tmp_path / "a")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="refuses your token") as caught:
        fetch(folder=tmp_path / "a")
    assert "HF_TOKEN" in str(caught.value.hint)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert names(fetch(folder=tmp_path / "a")) == NEEDED


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fish/none", "has no repository fish/none"),
        (f"{CHECKPOINT}@v9", "has no revision v9"),
        ("hf:three/parts/here", "does not name a repository"),
        (f"{CHECKPOINT}@", "does not name a repository"),
    ],
)
def test_what_is_not_there(hub: SmallHub, name: str, says: str) -> None:
    with pytest.raises(HubError, match=says) as caught:
        fetch(name)
    assert caught.value.hint


def test_a_revision_is_one_commit(hub: SmallHub) -> None:
    commit = hub.commit(CHECKPOINT)
    found = fetch(f"hf:{CHECKPOINT}@{commit}")
    assert found == fetch(CHECKPOINT)
    assert found.name == commit
    with pytest.raises(HubError, match="two revisions"):
        Repository.parse(f"{CHECKPOINT}@a", "b")


def test_no_network(hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The cached copy is used; without one, the error gives the reason."""
    found = fetch()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch() == found
    assert "the hub cannot be reached" in caplog.text
    for place in (None, tmp_path / "a"):
        with pytest.raises(HubError, match=r"127\.0\.0\.1:9 cannot be reached") as caught:
            fetch(CHECKPOINT if place else "fish/other", place)
        assert "HTTPS_PROXY" in str(caught.value.hint)
        assert "Errno" not in str(caught.value)
    (found / "model.pth").unlink()
    with pytest.raises(ExportError, match="lacks weights"):
        fetch()


def test_a_hub_that_is_down_or_none(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.down = True
    with pytest.raises(HubError, match="HTTP status 503"):
        fetch()
    hub.down = False
    monkeypatch.setattr("small_hub._Handler._info", lambda *_: [1, 2])
    with pytest.raises(HubError, match="does not answer as a hub does") as caught:
        fetch()
    assert "HF_ENDPOINT" in str(caught.value.hint)


def test_offline_mode(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fetch()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert fetch() == found
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        fetch("fish/other")
    assert hub.asked == []


def test_a_full_disk_is_found_out_before(hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = namedtuple("disk", "total used free")
    hub.break_off["model.pth"] = [300_000] + [0] * 20
    with pytest.raises(HubError):
        fetch(folder=tmp_path / "a")
    hub.asked.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(0, 0, 2_000_000))
    with pytest.raises(HubError, match=r"fish/fish-1\.5 needs 2\.3 MB more in .*a, and 2\.0 MB are free"):
        fetch(folder=tmp_path / "a")
    assert hub.downloads() == []


def test_a_disk_that_fills_up(hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(HubError, match="cannot be written: No space left on device"):
        fetch(folder=tmp_path / "a")


def test_shards_and_their_index(hub: SmallHub) -> None:
    folder = hub.repositories[CHECKPOINT].parent / "s2"
    for half in ("lm", "codec"):
        shutil.copytree(OWN_GOLDEN / "s2-pro" / half / "checkpoint", folder, dirs_exist_ok=True)
    (folder / "model.pth").write_bytes(b"another set of weights")
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"of another index")
    hub.repositories["fish/s2"] = folder
    assert names(fetch("fish/s2")) == {
        "codec.pth",
        "codec_config.json",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    }


def test_a_repository_that_lacks_a_part_is_refused_before_anything_comes(hub: SmallHub, tmp_path: Path) -> None:
    (hub.repositories[CHECKPOINT] / "firefly-gan-vq-fsq-8x1024-21hz-generator.pth").unlink()
    with pytest.raises(ExportError, match="lacks a codec") as caught:
        fetch(folder=tmp_path / "a")
    assert "--codec" in str(caught.value.hint)
    assert not (tmp_path / "a").exists()


def test_a_name_that_leads_out_of_the_folder(hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "small_hub._Handler._info", lambda *_: {"id": "x", "sha": "0" * 40, "siblings": [{"rfilename": "references/../../x"}]}
    )
    for place in (None, tmp_path / "a"):
        with pytest.raises(HubError, match="leads out of its folder"):
            download(Repository(CHECKPOINT), lambda names, _: names, place)


def test_a_bundle_is_downloaded_once(hub: SmallHub) -> None:
    bundle = Bundle.load(f"hf:{BUNDLE}")
    assert names(bundle.path) == {*bundle.manifest.files, MANIFEST}
    assert_same(bundle.path, hub, BUNDLE)
    hub.asked.clear()
    assert Bundle.load(Path(f"hf:{BUNDLE}")).path == bundle.path
    assert hub.asked == []
    bundle.verify()
    commit = hub.commit(BUNDLE)
    assert Bundle.load(f"hf:{BUNDLE}@{commit}").path == bundle.path
    assert hub.asked == []


def test_a_bundle_that_broke_off_goes_on(hub: SmallHub) -> None:
    (hub.repositories[BUNDLE] / "slow_ar.onnx").write_bytes(os.urandom(50_000))
    manifest = Manifest.from_json((hub.repositories[BUNDLE] / MANIFEST).read_text())
    (hub.repositories[BUNDLE] / MANIFEST).write_text(manifest.sealed(describe_files(hub.repositories[BUNDLE])).to_json())
    hub.break_off["slow_ar.onnx"] = [20_000] + [0] * 20
    with pytest.raises(HubError):
        bundle_folder(f"hf:{BUNDLE}")
    hub.break_off.clear()
    hub.asked.clear()
    Bundle.load(f"hf:{BUNDLE}").verify()
    assert ("slow_ar.onnx", "bytes=20000-") in hub.downloads()


def test_a_bundle_whose_files_are_not_those_of_its_manifest(hub: SmallHub) -> None:
    (hub.repositories[BUNDLE] / "slow_ar.onnx").write_bytes(b"not a grape")
    with pytest.raises(BundleError, match=r"slow_ar\.onnx was altered"):
        Bundle.load(f"hf:{BUNDLE}")


def test_a_checkpoint_is_no_bundle(hub: SmallHub) -> None:
    with pytest.raises(BundleError, match=r"fish/fish-1\.5 is not a bundle: it has no manifest\.json") as caught:
        Bundle.load(f"hf:{CHECKPOINT}")
    assert f"fishrt export {CHECKPOINT} BUNDLE" in str(caught.value.hint)


def test_the_environment_is_honoured(hub: SmallHub, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads the variables once."""
    code = "from fishrt import Bundle; print(Bundle.load('hf:someone/my-bundle').path)"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**clean, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    for extra in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**environment, **extra}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home/hub")
    assert len(hub.agents) == 1
    assert not any("torch" in agent for agent in hub.agents)  # which goes with telemetry, that we switch off


def test_which_paths_name_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("fish/fish-1.5", "hf:fish/fish-1.5", "fish/fish-1.5@v1"):
        assert names_repository(Path(text)), text
    (tmp_path / "fish/fish-1.5").mkdir(parents=True)
    for text in ("fish/fish-1.5", "fish", "a/b/c", "./a", "../a/b", "/a/b", "~/a"):
        assert not names_repository(Path(text)), text


def test_a_checkpoint_in_the_cache_has_the_name_of_its_repository(hub: SmallHub, tmp_path: Path) -> None:
    assert checkpoint_name(fetch()) == "fish-1.5"
    assert checkpoint_name(tmp_path) == tmp_path.name


# ---- commands


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    for word in ("error: ", "hint: ", *words):
        assert word in result.stderr
    assert "Traceback" not in result.output


def test_fetch(hub: SmallHub, tmp_path: Path) -> None:
    (hub.repositories[CHECKPOINT] / "model.safetensors").write_bytes(b"another set of weights")
    target = tmp_path / "my checkpoint"
    result = run("fetch", CHECKPOINT, target)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{target}\n"
    assert names(target) == (NEEDED - {"model.pth"}) | {"model.safetensors"}
    assert "several sets of weights; left out: model.pth" in result.stderr
    assert f"next: fishrt export '{target}' BUNDLE" in result.stderr
    data = json.loads(run("fetch", f"hf:{BUNDLE}", "--json").stdout)
    assert (data["ok"], data["command"], data["kind"], data["repository"]) == (True, "fetch", "bundle", BUNDLE)
    assert data["files"].keys() == names(Path(data["path"]))
    failed = run("fetch", "fish/none", "--json")
    assert json.loads(failed.stdout)["error"]["kind"] == "HubError"
    refused(failed, "has no repository fish/none")
    refused(run("fetch", "fish"), "'fish' does not name a repository")
    assert run("fetch", CHECKPOINT, "-q").stderr.count("\n") == 1  # the warning


def test_fetch_says_how_much_is_there(hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fishrt.cli.base.progress.Reporter.INTERVAL_S", 0.0)
    result = run("fetch", CHECKPOINT, tmp_path / "a")
    assert re.search(r"\[#+ *\] +\d+% downloading model\.pth, \d+\.\d kB of 2\.6 MB, about \d+ s left", result.stderr), (
        result.stderr
    )


@pytest.mark.parametrize("command", ["inspect", "voice"])
def test_a_bundle_of_the_hub_is_taken_where_a_bundle_is(hub: SmallHub, command: str) -> None:
    words = ["inspect", f"hf:{BUNDLE}"] if command == "inspect" else ["voice", "list", "--bundle", f"hf:{BUNDLE}"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "anna" in result.stdout
    refused(run(*words[:-1], "hf:fish/none"), "has no repository fish/none")


def test_export_of_a_repository(hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fishrt_export

    seen = []

    def export(checkpoint: Path, *_: object, **__: object) -> Bundle:
        seen.append(checkpoint)
        return Bundle.load(hub.repositories[BUNDLE])

    monkeypatch.setattr(fishrt_export, "export_bundle", export, raising=False)
    monkeypatch.chdir(tmp_path)
    assert run("export", CHECKPOINT, "out", "--revision", hub.commit(CHECKPOINT)).exit_code == 0
    assert names(seen[0]) == NEEDED
    assert checkpoint_name(seen[0]) == "fish-1.5"
    refused(run("export", "some/folder", "out"), "has no repository some/folder", "a folder is given as ./some/folder")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/x").touch()
    hub.asked.clear()
    refused(run("export", CHECKPOINT, "taken"), "is not empty")
    assert hub.asked == []


def test_export_of_a_diffusion_model_brings_its_codec(hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fishrt_export

    seen: list[tuple[Path, Path | None]] = []

    def export(checkpoint: Path, _out: Path, options: fishrt_export.Options, **_: object) -> Bundle:
        seen.append((checkpoint, options.codec))
        return Bundle.load(hub.repositories[BUNDLE])

    monkeypatch.setattr(fishrt_export, "export_bundle", export, raising=False)
    monkeypatch.chdir(tmp_path)
    golden, base, codec = OWN_GOLDEN / "echo-tts/checkpoint", "jordand/echo-tts-base", "jordand/fish-s1-dac-min"
    for name, of in ((base, base), (codec, codec), ("someone/codec", codec)):
        hub.repositories[name] = Path(shutil.copytree(golden / of.partition("/")[2], tmp_path / "served" / name))
        (hub.repositories[name] / "unwanted.bin").write_bytes(bytes(100))
    local = str(hub.repositories[base])
    for words in ([base], [base, "--codec", "someone/codec"], [local, "--codec", "someone/codec"], [local]):
        assert run("export", words[0], "out", *words[1:]).exit_code == 0
    model, found = seen[0]
    assert names(model) == {"pca_state.safetensors", "pytorch_model.safetensors"}
    assert found is not None
    assert names(found) == {"pytorch_model.safetensors"}
    assert ["fish-s1-dac-min" in str(codec) for _, codec in seen] == [True, False, False, False]
    assert ["someone--codec" in str(codec) for _, codec in seen] == [False, True, True, False]
    assert run("fetch", base, "fetched").exit_code == 0
    assert names(tmp_path / "fetched") == names(model)
    refused(run("export", base, "out", "--codec", CHECKPOINT), "the repository has no codec")
