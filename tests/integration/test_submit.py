"""`tdro submit` and a joined cluster, against a real Ray head with token authentication on; the launcher file."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from tiny import make_collections, write_recipe

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 4


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def head():
    """(GCS address, dashboard URL) of a Ray head of this test's own, beside any other on this machine."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets lie in it, and their paths must be short
    gcs, dashboard, client, agent, grpc = free_ports(5)
    command = f"""{sys.executable} -m ray.scripts.scripts start --head --block --disable-usage-stats --temp-dir={folder} --num-cpus=2
        --node-ip-address=127.0.0.1 --port={gcs} --dashboard-host=127.0.0.1 --dashboard-port={dashboard} --ray-client-server-port={client}
        --dashboard-agent-listen-port={agent} --dashboard-agent-grpc-port={grpc} --min-worker-port=0 --max-worker-port=0
        --object-store-memory={300 << 20}"""
    with (Path(folder) / "start.log").open("w") as log:
        process = subprocess.Popen(
            command.split(),
            env=environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(f"{url}/api/version", process, Path(folder) / "start.log")
        yield f"127.0.0.1:{gcs}", url
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # all that it started; SIGTERM would drain the node for half a minute
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def environment(**changes):
    """This process's environment without any cluster's marks."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "TDRO_RUNS"}
    return {**kept, **changes}


def get(url):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
        return json.loads(answer.read())


def wait_for(url, process, log):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return get(url)
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"Ray did not start: {log.read_text()[-2000:]}")


def tdro(*arguments, folder=ROOT, timeout=280, **changes):
    return subprocess.run(
        [sys.executable, "-m", "tdro_ray", *map(str, arguments)],
        cwd=folder,
        env=environment(**{"RAY_AUTH_TOKEN": TOKEN, "PYTHONPATH": str(ROOT), **changes}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_a_job_is_followed_to_its_end(head, tmp_path):
    done = tdro("submit", "recipes", RAY_API_SERVER_ADDRESS=head[1], TDRO_RUNS=str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    assert "quickstart\n" in done.stdout and str(tmp_path / "runs") in done.stdout
    name = re.search(r"Job (tdro-recipes-\w+) submitted", done.stdout)[1]
    job = next(j for j in get(f"{head[1]}/api/jobs/") if j["submission_id"] == name)
    assert (
        job["status"] == "SUCCEEDED"
        and job["entrypoint"] == "python -m tdro_ray recipes"
        and job["metadata"]["job_name"] == "tdro recipes"
    )
    assert job["runtime_env"]["env_vars"]["TDRO_RUNS"] == str(tmp_path / "runs")


def test_a_failed_job_gives_its_exit_code_and_its_message(head, tmp_path):
    done = tdro(
        "submit",
        "ingest",
        "real",
        "--set",
        f"data.sources={tmp_path}/nowhere",
        RAY_API_SERVER_ADDRESS=head[1],
        TDRO_RUNS=str(tmp_path),
    )
    assert done.returncode == 2, done.stderr
    assert (
        "nowhere' does not exist" in done.stdout
        and "failed" in done.stderr
        and "Traceback" not in done.stdout + done.stderr
    )


def test_a_wrong_command_is_not_sent(head):
    before = len(get(f"{head[1]}/api/jobs/"))
    done = tdro("submit", "--address", head[1], "run", "quickstart", "--set", "optimize.eat=1")
    assert done.returncode == 2 and "Did you mean 'eta'" in done.stderr
    assert len(get(f"{head[1]}/api/jobs/")) == before


@pytest.mark.parametrize(("token", "said"), [("", "has no token"), ("wrong" * 8, "has the wrong token")])
def test_the_token_is_asked_for(head, tmp_path, token, said):
    done = tdro("submit", "--address", head[1], "recipes", RAY_AUTH_TOKEN=token, HOME=str(tmp_path))
    assert done.returncode == 2 and said in done.stderr and "ray get-auth-token" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_that_is_too_large_is_not_sent(head, tmp_path):
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "big.bin").open("wb") as file:
        file.truncate(101 << 20)
    done = tdro("submit", "--address", head[1], "recipes", folder=tmp_path)
    assert done.returncode == 2 and "101 MiB" in done.stderr and "data 101 MiB" in done.stderr
    (tmp_path / ".gitignore").write_text("/data/\n")
    assert tdro("submit", "--address", head[1], "--detach", "recipes", folder=tmp_path).returncode == 0


def test_joining_without_the_token_is_refused_at_once(head, tmp_path):
    began = time.monotonic()
    recipe = write_recipe(tmp_path, make_collections(tmp_path / "source", rows=30))
    done = tdro("ingest", recipe, RAY_ADDRESS=head[0], TDRO_RUNS=str(tmp_path / "runs"))
    assert done.returncode == 2 and "asks for a token" in done.stderr and "RAY_AUTH_MODE=token" in done.stderr
    assert time.monotonic() - began < 30
    done = tdro("ingest", recipe, RAY_ADDRESS=head[0], RAY_AUTH_MODE="token", TDRO_RUNS=str(tmp_path / "runs"))
    assert done.returncode == 0 and "3 tasks" in done.stdout


@pytest.mark.long
def test_a_whole_run_as_a_job_and_its_names_on_the_dashboard(head, tmp_path):
    recipe = write_recipe(tmp_path, make_collections(tmp_path / "source"))
    done = tdro("submit", "run", recipe, RAY_API_SERVER_ADDRESS=head[1], TDRO_RUNS=str(tmp_path / "runs"), timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "runs" / "small" / "report.html").exists() and "Next:" in done.stdout
    job = next(
        j for j in get(f"{head[1]}/api/jobs/") if (j["metadata"] or {}).get("job_name", "").startswith("tdro run")
    )
    trained = {r["name"].rpartition("-")[0]: r["status"] for r in get(f"{head[1]}/api/train/v2/runs/v1")["train_runs"]}
    assert trained == dict.fromkeys(
        ("small-reference", "small-optimize", "small-finetune-current", "small-finetune-top70"), "FINISHED"
    )
    datasets = " ".join(d["dataset"] for d in get(f"{head[1]}/api/data/datasets/{job['job_id']}")["datasets"])
    for name in ("ingest", "mine:easy", "small-reference", "score", "small-optimize", "evaluate:top70", "index"):
        assert name in datasets


def test_ray_accepts_the_launcher_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "ray_config.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["provider"]["type"] == "local" and prepared["max_workers"] == len(config["provider"]["worker_ips"])
    started = " ".join(prepared["head_start_ray_commands"])
    assert "--autoscaling-config" in started and "RAY_AUTH_MODE=token" in started
