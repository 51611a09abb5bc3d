"""Mistakes that show only at work: one clear message, exit code 2, and nothing half-written."""

import gzip
import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
from tiny import make_collections, tdro, write_recipe

from tdro_ray.__main__ import main
from tdro_ray.recipe import load_recipe


@pytest.fixture(scope="module", autouse=True)
def _ray():
    import ray

    before = dict(os.environ)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    yield
    ray.shutdown()
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TDRO_RUNS", str(tmp_path / "runs"))

    def run(*arguments):
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def source(tmp_path):
    return make_collections(tmp_path / "source", rows=30)


@pytest.fixture
def recipe(tmp_path, source):
    return write_recipe(tmp_path, source)


def refused(result, said):
    code, out, err = result
    assert code == 2, out + err
    message = err[err.index("tdro: ") :]
    assert re.search(said, message), message
    assert len(message.splitlines()) == 1 and "Traceback" not in out + err


def leftovers(folder):
    return [p for p in folder.rglob("*") if p.name.startswith(".") and p.name.endswith("tmp")]


def rewrite(path: Path, text: str) -> None:
    with gzip.open(path, "wt") as file:
        file.write(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"easy.*(empty|no rows|no training row)"),
        ("this is not JSON\n" * 20, r"easy.*train\.jsonl\.gz:1\b.*JSON"),
        ('{"_id": "1", "text": "a question"}\n' * 20, r"easy.*positive"),
        ('{"_id": "1", "query": "", "positive_passages": [{"docid": "d", "text": "t"}]}\n', r"easy.*query"),
    ],
    ids=["empty", "not JSON", "no positives", "empty query"],
)
def test_a_bad_task_stops_the_ingest_and_leaves_no_task_behind(cli, tmp_path, source, recipe, text, said):
    rewrite(source / "easy" / "train.jsonl.gz", text)
    refused(cli("ingest", recipe), said)
    folder = tmp_path / "runs" / "small"
    assert (
        not list(folder.glob("store/easy/manifest.json"))
        and not (folder / "stages" / "ingest" / "manifest.json").exists()
    )
    assert not leftovers(folder)


def test_no_test_split_anywhere_is_said_before_anything_is_trained(cli, tmp_path, source, recipe):
    for name in ("easy", "middle", "noisy"):
        shutil.rmtree(source / name / "qrels")
    refused(cli("run", recipe), r"No task has a test split.*qrels/test\.tsv")
    assert not (tmp_path / "runs" / "small" / "stages" / "reference").exists()


def test_a_model_folder_without_a_tokenizer_is_refused(cli, tmp_path, recipe):
    assert cli("ingest", recipe)[0] == 0
    assert cli("mine", recipe)[0] == 0
    from transformers import Qwen2Config, Qwen2Model

    folder = tmp_path / "bare"
    Qwen2Model(
        Qwen2Config(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=64,
        )
    ).save_pretrained(folder)
    refused(cli("reference", recipe, "--set", f"model.name={folder}"), rf"{folder}.*tokenizer")
    stages = tmp_path / "runs" / "small" / "stages"
    assert not (stages / "model" / "manifest.json").exists() and not (stages / "reference").exists()


@pytest.mark.parametrize("name", ["nowhere/at/all", "/nowhere/at/all"])
def test_a_model_that_is_not_there_is_refused(cli, recipe, name):
    assert cli("ingest", recipe)[0] == 0
    assert cli("mine", recipe)[0] == 0
    refused(cli("reference", recipe, "--set", f"model.name={name}"), r"nowhere/at/all")


def test_more_workers_than_the_cluster_has_cpus(cli, recipe):
    refused(
        cli("ingest", recipe, "--set", "scale.num_workers=5"),
        r"5 workers .* the cluster has 2\. Set scale\.num_workers to at most 3",
    )


def test_a_batch_smaller_than_the_number_of_workers(cli, recipe):
    for stage in ("ingest", "mine"):
        assert cli(stage, recipe)[0] == 0
    refused(cli("reference", recipe, "--set", "reference.batch_size=1"), r"batch of 1 .* 2 workers")


@pytest.mark.long  # a process with a Ray of its own
def test_a_port_in_use(tmp_path, recipe):
    from tdro_ray.index.build import build_index
    from tdro_ray.model.build import build_base
    from tdro_ray.types import RetrieverSpec

    model, index = tmp_path / "model", tmp_path / "index"
    texts = [f"word{i % 7} and word{i % 5}" for i in range(200)]
    build_base(load_recipe(str(recipe)).model, RetrieverSpec(pooling="mean"), iter(texts), model, 0)
    build_index(((str(i), "", t, {}) for i, t in enumerate(texts)), model, index, cpus_per_actor=0.5)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # Apart: ray.serve reads its environment when it is first imported, and test_serve.py has another one for it.
        asked = ("serve", recipe, "--model", model, "--index", index, "--set", f"serve.port={port}")
        done = tdro(*asked, runs=tmp_path / "runs")
    refused((done.returncode, done.stdout, done.stderr), rf"127\.0\.0\.1:{port}.*serve\.port")


def test_a_damaged_weight_file(cli, tmp_path, recipe):
    for stage in ("ingest", "mine"):
        assert cli(stage, recipe)[0] == 0
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"domain_ids": ["easy"], "domain_weights": [0.5, 0.5]}))
    refused(cli("finetune", recipe, "--set", f"weights=[{path}]"), r"weights\.json")
    refused(cli("finetune", recipe, "--set", "weights=[curent]"), r"No mixture 'curent'\. Did you mean 'current'")
