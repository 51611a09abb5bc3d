"""Ingest from an object store and from a hub dataset on a real Ray: the rows of a folder, incremental, clear when it fails."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3 import s3_service
from tiny import make_collections

from tdro_ray.config import ModelSettings, Recipe, TinyModel
from tdro_ray.data.clean import clean
from tdro_ray.data.collection import CollectionStore
from tdro_ray.data.formats import read
from tdro_ray.data.ingest import ingest
from tdro_ray.data.layouts import open_test
from tdro_ray.data.place import place
from tdro_ray.data.sources import discover
from tdro_ray.errors import DataError
from tdro_ray.evaluate import encode
from tdro_ray.model.build import build_base
from tdro_ray.types import RetrieverSpec


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    import ray

    with s3_service("sets") as client:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
        yield client
        ray.shutdown()


def upload(client: Any, folder: Path, prefix: str) -> None:
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        client.put_object(Bucket="sets", Key=f"{prefix}/{file.relative_to(folder)}", Body=file.read_bytes())


def recipe(*sources: str, **data: object) -> Recipe:
    return Recipe.model_validate({"data": {"sources": sources, "dev_queries": 5, "dev_corpus": 20, **data}})


def test_a_bucket_gives_what_the_folder_gives_and_only_changes_are_read_again(s3: Any, tmp_path: Path) -> None:
    source = make_collections(tmp_path / "source")
    (source / "hard").mkdir()
    columns = {"anchor": [f"question {n}" for n in range(100)], "positive": [f"answer {n}" for n in range(100)]}
    pq.write_table(pa.table(columns), source / "hard" / "a 100% ü.parquet")
    (source / "hard" / "task.yaml").write_text("language: de\n")
    upload(s3, source, "all/of it")
    here = ingest(recipe(str(source)), tmp_path / "here")
    there = ingest(recipe("s3://sets/all/of it"), tmp_path / "there")
    assert {n: (m.rows, m.hash, m.tests_hash) for n, m in there.items()} == {
        n: (m.rows, m.hash, m.tests_hash) for n, m in here.items()
    }
    assert list(there) == ["easy", "hard", "middle", "noisy"] and there["hard"].info.language == "de"

    lines: list[str] = []
    assert ingest(recipe("s3://sets/all/of it"), tmp_path / "there", lines.append) == there
    assert all("up to date" in line for line in lines) and len(lines) == 4
    time.sleep(1.1)  # S3's times of change are whole seconds
    s3.put_object(Bucket="sets", Key="all/of it/hard/more.jsonl", Body=b'["new q", "new p"]\n')
    lines.clear()
    again = ingest(recipe("s3://sets/all/of it"), tmp_path / "there", lines.append)
    assert again["hard"].rows == there["hard"].rows + 1 and sum("up to date" in line for line in lines) == 3


def test_a_test_in_a_bucket_is_evaluated_and_kept_out_of_training(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_collections(tmp_path / "source")
    upload(s3, source / "easy", "tests/far")
    folder = place("s3://sets/tests/far")
    test = open_test(folder)
    assert len(test.corpus) == 10 and {p.docid for p in test.corpus} == {f"deasy{n}" for n in range(60, 70)}
    model, alone = tmp_path / "model", open_test(source / "easy")
    tiny = TinyModel(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, vocab_size=300)
    build_base(ModelSettings(tiny=tiny), RetrieverSpec(query_length=8, passage_length=8), iter(["bada"]), model, 0)
    monkeypatch.setattr(encode, "SMALL", 0)  # workers read the bucket
    found = [encode.evaluate_model(model, {"t": t}, 1, 1.0, False, 512, 10, 20, "t") for t in (test, alone)]
    assert found[0] == found[1]

    asked = next(iter(test.queries.values()))
    (tmp_path / "train").mkdir()
    rows = [[asked, "a text"], *([f"query number {n} of many", f"text {n}"] for n in range(30))]
    (tmp_path / "train" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = recipe(str(tmp_path / "train"), dev_queries=0)
    ingest(settings, tmp_path / "store")
    cleaned = clean(settings.data.clean, tmp_path / "store", ["train"], [folder], "key", tmp_path / "out")
    assert cleaned["train"]["counts"]["contaminated"] == 1
    assert CollectionStore(tmp_path / "store")["train"].manifest.rows == 30


def test_a_hub_dataset(s3: Any, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    columns = {"query": [f"question {n}" for n in range(3000)], "answer": [f"answer {n}" for n in range(3000)]}
    pq.write_table(pa.table(columns), folder / "train.parquet")
    manifests = ingest(recipe(f"hf:{folder}", dev_queries=0), tmp_path / "store")
    assert manifests["pairs"].rows == 3000
    found = CollectionStore(tmp_path / "store")["pairs"].take_rows(range(3000))["query"].to_pylist()
    assert found == columns["query"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://nobucket/data", "s3://nobucket/data cannot be read: there is no such bucket.*AWS_ENDPOINT_URL"),
        ("s3://sets/nothing", "s3://sets/nothing cannot be read: there is no such bucket, folder or file"),
    ],
)
def test_what_is_not_there(s3: Any, tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ingest(recipe(source), tmp_path / "store")


def test_a_service_that_refuses_or_does_not_answer(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(DataError, match=r"s3://sets/all cannot be read: .*Check bucket, path and network.*AWS_PROFILE"):
        discover(["s3://sets/all"])


@pytest.mark.long  # the timeouts and retries of pyarrow's S3 client
def test_a_service_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with pytest.raises(DataError, match=r"cannot be read: .*NETWORK_CONNECTION"):
            discover([f"s3://sets/all?scheme=http&endpoint_override=127.0.0.1:{server.getsockname()[1]}&region=x"])


def test_without_credentials(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, rights in (("public", "public-read"), ("private", "private")):
        s3.put_object(Bucket="sets", Key=f"{name}/train.jsonl", Body=b'["q", "p"]\n', ACL=rights)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (task,) = discover(["s3://anonymous@sets/public"])
    assert [row.query for row in read(*task.files[0])] == ["q"]
    assert str(task.files[0][0]) == "s3://anonymous@sets/public/train.jsonl"
    (task,) = discover(["s3://anonymous@sets/private"])
    with pytest.raises(DataError, match=r"private/train.jsonl cannot be read: .*ACCESS_DENIED.*AWS_ACCESS_KEY_ID"):
        list(read(*task.files[0]))


def test_an_object_that_goes_away_in_between(s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket="sets", Key="gone/train.jsonl", Body=b'["q", "p"]\n')
    (task,) = discover(["s3://sets/gone"])
    s3.delete_object(Bucket="sets", Key="gone/train.jsonl")
    with pytest.raises(DataError, match=r"s3://sets/gone/train.jsonl cannot be read: .*does not exist"):
        list(read(*task.files[0]))
