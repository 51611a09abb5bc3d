"""Checkpoints in an object store: a run that is killed goes on from there, on one to two workers."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from s3 import s3_service
from safetensors.torch import load_file
from tiny import make_collections, tdro, write_recipe

BUCKET = "runs"


@pytest.fixture
def s3():
    with s3_service(BUCKET) as client:
        yield client


def keys(client):
    return [entry["Key"] for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def saved_step(client):
    """The step of the newest checkpoint that Ray Train has noted in the bucket: 0 before the first."""
    names = [key for key in keys(client) if key.endswith("checkpoint_manager_snapshot.json")]
    if not names:
        return 0
    noted = json.loads(client.get_object(Bucket=BUCKET, Key=names[0])["Body"].read())
    return noted["latest_checkpoint_result"]["metrics"]["step"] if noted["latest_checkpoint_result"] else 0


def weights(runs):
    return load_file(runs / "small" / "stages" / "reference" / "model" / "model.safetensors")


@pytest.mark.long
@pytest.mark.timeout(900)  # three runs
def test_a_killed_run_goes_on_from_the_object_store(s3, tmp_path):
    recipe = write_recipe(tmp_path, make_collections(tmp_path / "source"))
    runs, metrics = tmp_path / "runs", tmp_path / "runs" / "small" / "stages" / "reference" / "metrics.jsonl"
    changes = [f"scale.storage=s3://{BUCKET}/here", "scale.num_workers=[1, 2]", "scale.keep_checkpoints=2"]
    whole = ["run", recipe, "--until", "reference", "--set", "reference.steps=40"]
    command = [*whole, *(part for c in changes for part in ("--set", c))]
    process = subprocess.Popen(
        [sys.executable, "-m", "tdro_ray", *map(str, command)],
        env={**os.environ, "TDRO_RUNS": str(runs)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while saved_step(s3) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = metrics.read_text().splitlines()
    done = saved_step(s3)
    assert 2 <= done < 40 and not (metrics.parent / "ray").exists()

    ended = tdro(*command, runs=runs)
    assert ended.returncode == 0, ended.stderr[-3000:]
    after = metrics.read_text().splitlines()
    assert after[:done] == before[:done] and len(after) == 40  # with their times: these steps were not made again
    finished = {key.rsplit("/", 2)[1] for key in keys(s3) if key.endswith("/manifest.json")}
    assert 2 <= len(finished) <= 4  # Ray Train keeps those of a killed session beside its own

    alone = tdro(*whole, "--set", "scale.num_workers=0", runs=tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr[-3000:]
    ours, theirs = weights(runs), weights(tmp_path / "alone")
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4), name
