"""What `serve build` writes and `serve run` reads: the shipped config, with autoscaling, on a Ray of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from service import ROOT, write_index

from serve import application
from tdro_ray.errors import ConfigError


def serve_command(*arguments: str, **environment: str) -> list[Any]:
    """Command and environment of Ray's own `serve`."""
    # A shell's background job, as a CI may start the tests, has SIGINT ignored, and so would what it starts.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from ray.serve.scripts import cli; cli()"
    return [[sys.executable, "-c", code, *arguments], {**os.environ, "PYTHONPATH": str(ROOT), **environment}]


def test_serve_build_writes_the_application(tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    out = tmp_path / "built.yaml"
    given = json.dumps({"model": str(tmp_path / "model"), "num_replicas": 3, "num_cpus": 2})
    command, environment = serve_command("build", "serve.application:app", "-o", str(out), TDRO_SERVE=given)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    built = ServeDeploySchema(**yaml.safe_load(out.read_text()))
    (deployment,) = built.applications[0].deployments
    assert built.applications[0].import_path == "serve.application:app" and deployment.name == "Retriever"
    assert deployment.num_replicas == 3 and deployment.ray_actor_options.num_cpus == 2
    assert deployment.max_ongoing_requests == 2112


@pytest.mark.parametrize(
    ("given", "says"),
    [("", "model: Field required"), ('{"model": 3}', "model: "), ("[", "the value: "), ('{"modle": "a"}', "modle: ")],
)
def test_arguments_of_the_environment_are_checked(given: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDRO_SERVE", given)
    with pytest.raises(ConfigError, match=rf"TDRO_SERVE=.*{re.escape(says)}.*Valid is JSON such as"):
        _ = application.app
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = application.other


@pytest.mark.long
def test_the_shipped_config_runs(tmp_path: Path) -> None:
    from test_serve_ingress import TOPICS, make_tiny

    model = make_tiny(tmp_path / "tiny")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    config["http_options"]["port"] = port
    (app,) = config["applications"]
    app["args"] |= {"model": str(model), "index": str(write_index(model, tmp_path / "index", TOPICS))}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    command, environment = serve_command("run", str(file))
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
            hits = wait_for(client, process)
            assert hits[0]["text"] == "lock thread"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            process.kill()


def wait_for(client: httpx.Client, process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """The hits of a search, once the service answers."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(process.stdout.read() if process.stdout else "")
        try:
            response = client.get("/search", params={"q": "lock thread", "k": 1})
            if response.status_code == 200:
                return response.json()["results"][0]
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError("no answer within three minutes")
