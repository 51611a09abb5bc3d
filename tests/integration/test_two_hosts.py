"""ZeRO-3 with LoRA over two hosts: network namespaces joined by a bridge, a Ray node in each, one worker on either."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_collections, write_recipe

from tdro_ray import stages
from tdro_ray.config import ScaleSettings
from tdro_ray.data.collate import Collator
from tdro_ray.pipeline import Run
from tdro_ray.recipe import load_recipe

HEAD, WORKER, PORT = "10.77.0.1", "10.77.0.2", 6379
SETTINGS = (
    "model.lora={r: 4}",
    "reference.steps=4",
    "scale.backend=zero3",
    "scale.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}",
    "scale.num_workers=2",
    "scale.placement=STRICT_SPREAD",
)


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)


def must(*arguments):
    done = ip(*arguments)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@pytest.fixture
def hosts():
    """Names of two namespaces, at HEAD and WORKER, joined by a bridge in a third; the host's own network is not touched."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` command: network namespaces cannot be made")
    mark = f"tdro{secrets.token_hex(2)}"
    bridge, *ends = names = [f"{mark}-{kind}" for kind in ("bridge", "head", "worker")]
    tried = ip("netns", "add", bridge)
    if tried.returncode:
        pytest.skip(f"network namespaces cannot be made here (it takes root): {tried.stderr.strip()}")
    with ExitStack() as stack:
        for name in names:
            stack.callback(ip, "netns", "del", name)  # takes the links in it along
        for name in ends:
            must("netns", "add", name)
        must("-n", bridge, "link", "add", "br0", "type", "bridge")
        must("-n", bridge, "link", "set", "br0", "up")
        for number, (name, address) in enumerate(zip(ends, (HEAD, WORKER), strict=True)):
            port = f"port{number}"
            must("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", bridge)
            must("-n", bridge, "link", "set", port, "master", "br0", "up")
            must("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            must("-n", name, "link", "set", "eth0", "up")
            must("-n", name, "link", "set", "lo", "up")
        yield ends


@pytest.fixture
def cluster(hosts):
    """(prefix of a command on the head's host, environment) of a Ray cluster of one node on each host."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets lie in it, and their paths must be short
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "TDRO_RUNS"}
    environment = {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment |= {"GLOO_SOCKET_IFNAME": "eth0", "NO_PROXY": f"{HEAD},{WORKER}", "no_proxy": f"{HEAD},{WORKER}"}
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--num-cpus=1"]
    ray += [f"--object-store-memory={200 << 20}"]
    head = [
        f"--node-ip-address={HEAD}",
        "--head",
        f"--port={PORT}",
        "--include-dashboard=false",
        f"--temp-dir={folder}",
    ]
    started = []
    try:
        for name, options in zip(
            hosts, (head, [f"--node-ip-address={WORKER}", f"--address={HEAD}:{PORT}"]), strict=True
        ):
            with (folder / f"{name}.log").open("w") as log:
                command = ["ip", "netns", "exec", name, *ray, *options]
                started.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
                )
            wait_for(folder / f"{name}.log", "Ray runtime started", started[-1])
        yield ["ip", "netns", "exec", hosts[0]], {**environment, "RAY_ADDRESS": f"{HEAD}:{PORT}"}
    finally:
        for process in started:
            os.killpg(
                process.pid, signal.SIGKILL
            )  # all that it started; SIGTERM would drain the node for half a minute
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(log, words, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if words in log.read_text():
            return
        time.sleep(0.5)
    raise AssertionError(f"Ray did not start: {log.read_text()[-2000:]}")


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_zero3_lora_over_two_hosts_trains_as_one_process_does(cluster, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from tdro_ray.train.context import LocalContext
    from tdro_ray.train.loop import train

    prefix, environment = cluster
    monkeypatch.setenv("TDRO_RUNS", str(tmp_path / "runs"))
    recipe = write_recipe(tmp_path, make_collections(tmp_path / "source"))
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    for command in ("ingest", "mine", "reference"):
        done = subprocess.run(
            [*prefix, sys.executable, "-m", "tdro_ray", command, str(recipe), *sets],
            env={**environment, "TDRO_RUNS": str(tmp_path / "runs")},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    run = Run(load_recipe(str(recipe), SETTINGS), None)
    settings = run.recipe.reference
    collator = Collator(stages.batch_recipe(run, settings, None, "homogeneous"))
    job = stages.train_job(run, "alone", "key", settings)
    context = LocalContext(lambda start: (collator.batch(s, 0, 1) for s in range(start, 4)), tmp_path / "checkpoints")
    train(replace(job, scale=ScaleSettings(backend="ddp", num_workers=1)), context)

    assert losses(run.path("reference")) == pytest.approx(losses(run.path("alone")), rel=1e-5)
    ours = load_file(run.path("reference") / "model" / "model.safetensors")
    theirs = load_file(context.latest_checkpoint() / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).abs().max() < 1e-5, name
