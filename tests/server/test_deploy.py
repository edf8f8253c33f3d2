"""deploy/: what it asks of fishrt exists, its files fit published schemas, and the container's health check works."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from fishrt.cli import main
from fishrt.cli.serve import serve
from fishrt.server.metrics import Metrics
from fishrt.speaking.stats import Stats

yaml = pytest.importorskip("yaml", reason="needs the dev extra")
DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def values(found: Any, key: str) -> Iterator[Any]:
    """All values of a key, however deep."""
    for name, value in found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ():
        if name == key:
            yield value
        yield from values(value, key)


@pytest.mark.parametrize("name", ["Dockerfile", "fishrt.service", "compose.yaml", "kubernetes/server.yaml"])
def test_options_exist(name: str) -> None:
    text = (DEPLOY / name).read_text(encoding="utf-8")
    options = {option for parameter in serve.params for option in parameter.opts}
    found = set(re.findall(r"(?<=[\s\[])--(?:api|max|bundle|host|port|voice|media)[a-z-]*", text))
    assert found <= options
    variables = {"FISHRT_" + option.removeprefix("--").replace("-", "_").upper() for option in options}
    assert set(re.findall(r"FISHRT_[A-Z_]+", text)) <= variables


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check(status: int, healthy: bool) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/health"
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    found = re.search(r"HEALTHCHECK.*?CMD (\[.*?\])$", (DEPLOY / "Dockerfile").read_text(), re.DOTALL | re.MULTILINE)
    assert found
    _, *arguments = json.loads(found[1])
    with HTTPServer(("127.0.0.1", 0), Handler) as peer:
        threading.Thread(target=peer.handle_request, daemon=True).start()
        env = {"FISHRT_PORT": str(peer.server_port)}
        done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, check=False)
    assert (done.returncode == 0) == healthy


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_fit_the_schemas_of_kubernetes(path: Path) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the dev extra")
    found = documents(path)
    for document in found:
        kubernetes_validate.validate(document, "1.34", strict=True)
    broken = json.loads(json.dumps(found[-1]))
    broken["spec"]["minReplicaz" if "minReplicas" in broken["spec"] else "completionz"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.34", strict=True)


def test_the_parts_of_the_server_belong_together() -> None:
    of = {document["kind"]: document for document in documents(DEPLOY / "kubernetes/server.yaml")}
    assert set(of) == {"PersistentVolumeClaim", "Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
    labels = of["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [of[kind]["spec"]["selector"] for kind in ("Deployment", "PodDisruptionBudget")]
    assert [*(each["matchLabels"] for each in selectors), of["Service"]["spec"]["selector"]] == [labels] * 3
    assert of["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == of["Deployment"]["metadata"]["name"]
    pod = of["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    probes = [container[name]["httpGet"] for name in ("startupProbe", "readinessProbe")]
    assert probes == [{"path": "/health", "port": container["ports"][0]["name"]}] * 2
    user = re.search(r"--uid (\d+)", (DEPLOY / "Dockerfile").read_text())
    assert user
    assert pod["securityContext"]["runAsUser"] == int(user[1])
    (claim,) = values(pod, "claimName")
    assert claim == of["PersistentVolumeClaim"]["metadata"]["name"]


def test_the_job_speaks_every_shard() -> None:
    (job,) = documents(DEPLOY / "kubernetes/render.yaml")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    count = job["spec"]["completions"]
    shards = set()
    for index in range(count):
        script = f"fishrt() {{ printf '%s\\n' \"$@\"; }}; {container['args'][0].removeprefix('exec ')}"
        done = subprocess.run(["sh", "-c", script], env={"JOB_COMPLETION_INDEX": str(index)}, capture_output=True, check=True)
        name, *words = done.stdout.decode().split()
        command = main.commands[name]
        shards.add(str(command.make_context(name, words).params["shard"]))
    assert shards == {f"{n}-of-{count}" for n in range(1, count + 1)}
    volumes = {volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_compose_file_fits_its_schema_and_names_files_that_exist() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the dev extra")
    pytest.importorskip("check_jsonschema", reason="needs the dev extra")
    schema = resources.files("check_jsonschema.builtin_schemas.vendor").joinpath("compose-spec.json").read_text("utf-8")
    (compose,) = documents(DEPLOY / "compose.yaml")
    jsonschema.validate(compose, json.loads(schema))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**compose, "services": {"fishrt": {"portz": []}}}, json.loads(schema))
    services = compose["services"]
    mounts = [mount for service in services.values() for mount in service.get("volumes", ())]
    own = [mount.split(":")[0] for mount in mounts if mount.startswith(".")]
    assert len(own) == 4
    assert all((DEPLOY / path).is_file() for path in own)
    assert {mount.split(":")[0] for mount in mounts} - {*own} == compose["volumes"].keys()
    build = services["fishrt"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    assert shlex.join(services["fishrt"]["command"]) == f"--api-key-file /run/secrets/{services['fishrt']['secrets'][0]}"
    (prometheus,) = documents(DEPLOY / "prometheus.yaml")
    (scraped,) = prometheus["scrape_configs"]
    assert scraped["static_configs"][0]["targets"] == ["fishrt:8080"]
    assert scraped["authorization"]["credentials_file"] == f"/run/secrets/{services['prometheus']['secrets'][0]}"
    (source,) = documents(DEPLOY / "grafana/datasource.yaml")
    assert source["datasources"][0]["url"].removeprefix("http://").split(":")[0] in services


def test_the_dashboard_shows_metrics_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "grafana/fishrt.json").read_text(encoding="utf-8"))
    (source,) = documents(DEPLOY / "grafana/datasource.yaml")
    assert set(values(dashboard, "uid")) - {dashboard["uid"]} == {source["datasources"][0]["uid"]}
    metrics = Metrics(Stats)
    metrics.requests.labels("/", "200").inc()
    served = set(re.findall(r"^(fishrt_\w+)[ {]", metrics.text().decode(), re.MULTILINE))
    shown = {name for text in values(dashboard, "expr") for name in re.findall(r"fishrt_\w+", text)}
    assert shown <= served
    counted = {name for name in served if not name.endswith(("_created", "_sum", "_count"))}
    assert counted - shown == set(), "every metric is shown"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
