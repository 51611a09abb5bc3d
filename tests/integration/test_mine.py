"""Mining on a real Ray: never a positive, filled, repeatable, and unseen until the manifest names it."""

import json
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from crossencoder import tiny_cross_encoder
from tiny import make_collections, tdro, write_recipe

from tdro_ray.config import ModelSettings, Recipe, ScaleSettings, TinyModel
from tdro_ray.data import mine as mine_module
from tdro_ray.data.collate import BatchRecipe, Collator, versions_of
from tdro_ray.data.collection import Collection, CollectionStore
from tdro_ray.data.dedup import text_key
from tdro_ray.data.ingest import ingest
from tdro_ray.data.mine import mine
from tdro_ray.data.plan import Plan
from tdro_ray.errors import CheckpointError, DataError
from tdro_ray.model.build import build_base
from tdro_ray.model.cross_encoder import CrossEncoder
from tdro_ray.types import RetrieverSpec

TINY = TinyModel(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, vocab_size=300)

TOPICS = [
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "bird",
    "river",
    "mountain",
    "ocean",
    "engine",
    "wheel",
    "music",
    "guitar",
    "paint",
    "sugar",
    "salt",
]


pytestmark = pytest.mark.usefixtures("small_ray")


def recipe(source: Path, seed: int = 1, **settings: object) -> Recipe:
    return Recipe.model_validate(
        {"seed": seed, "data": {"sources": [str(source)], "dev_queries": 0}, "mine": {"num_negatives": 4, **settings}}
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Queries asked twice with different positives, twins in case, a query that stands among the passages."""
    folder = tmp_path / "source" / "task"
    folder.mkdir(parents=True)
    rows = []
    for n in range(1500):
        topic = TOPICS[n % len(TOPICS)]
        rows.append([f"about {topic} number {n // 2}", f"a {topic} text {n}"])
    rows.append(["About Red  number 0", "A RED text 0", "given negative"])
    rows.append(["a cat text 3", "something else"])
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tiny = tmp_path / "source" / "tiny"
    tiny.mkdir()
    (tiny / "train.jsonl").write_text("\n".join(json.dumps([f"q{n}", f"p{n % 2}"]) for n in range(5)))
    return tmp_path / "source"


def test_negatives(source: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    names = list(ingest(recipe(source), store))
    reports = mine(recipe(source), store, names)
    collection = CollectionStore(store)["task"]
    rows = collection.take_rows(range(len(collection))).to_pylist()
    texts = collection.take_texts(range(collection.manifest.passages))
    positives: dict[bytes, set[bytes]] = {}
    for row in rows:
        positives.setdefault(text_key(row["query"]), set()).update(text_key(texts[p]) for p in row["positives"])
    for row in rows:
        negatives = [text_key(texts[n]) for n in row["negatives"]]
        assert len(set(negatives)) == len(negatives) == 4
        assert not set(negatives) & positives[text_key(row["query"])], (
            "a positive, its twin, or one of another row with the query"
        )
        assert text_key(row["query"]) not in negatives
    topical = sum(
        TOPICS[n % len(TOPICS)] in texts[neg] for n, row in enumerate(rows[:1500]) for neg in row["negatives"]
    )
    assert topical > 0.9 * 6000, "mined negatives are about the query's topic"
    assert texts[rows[1500]["negatives"][0]] == "given negative"
    assert reports["task"]["mean_given"] == pytest.approx(1 / 1502)
    example, margins = reports["task"]["examples"][0], reports["task"]["margin_percentiles"]
    assert example["query"] == rows[0]["query"] and example["negative"] in {texts[n] for n in rows[0]["negatives"]}
    assert example["positive_score"] > 0 and len(reports["task"]["examples"]) == 5
    assert margins == sorted(margins) and len(margins) == 3
    tiny = CollectionStore(store)["tiny"].take_rows(range(5)).to_pylist()
    assert [row["negatives"] for row in tiny] == [[1 - row["positives"][0]] for row in tiny], (
        "no more than the task has"
    )


def test_the_same_twice_and_another_with_another_seed(source: Path, tmp_path: Path) -> None:
    stores = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    hashes = []
    for store, seed in zip(stores, (1, 1, 2), strict=True):
        ingest(recipe(source), store)
        hashes.append(mine(recipe(source, seed), store, ["task"])["task"]["hash"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_up_to_date_and_mined_again(source: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    ingest(recipe(source), store)
    first = mine(recipe(source), store, ["task"])
    lines: list[str] = []
    assert mine(recipe(source), store, ["task"], lines.append) == first and lines == ["task: negatives up to date"]
    before = Collection(store / "task")
    four = before.take_rows([0])["negatives"].to_pylist()
    second = mine(recipe(source, num_negatives=6), store, ["task"])
    assert len(Collection(store / "task").take_rows([0])["negatives"].to_pylist()[0]) == 6
    assert second["task"]["version"] > first["task"]["version"]
    assert Collection(store / "task").take_rows([5])["query"] == before.take_rows([5])["query"]
    assert before.take_rows([0])["negatives"].to_pylist() == four, "a reader that had the old version keeps it"
    mine(recipe(source), store, ["task"])
    assert CollectionStore(store)["task"].manifest.negatives["hash"] == first["task"]["hash"]


def test_a_cut_between_column_and_manifest_changes_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    ingest(recipe(source), store)

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mine_module, "write_manifest", cut)
    with pytest.raises(KeyboardInterrupt):
        mine(recipe(source), store, ["task"])
    assert "negatives" not in Collection(store / "task").take_rows([0]).column_names
    monkeypatch.undo()
    mine(recipe(source), store, ["task"])
    assert "negatives" in Collection(store / "task").take_rows([0]).column_names


def test_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Run `tdro ingest` first"):
        mine(Recipe(), tmp_path, ["nope"])


def words_as_vectors(items: Sequence[tuple[str, str, str]]) -> np.ndarray:
    """A made-up encoder: unit vectors of the words' counts."""
    out = np.zeros((len(items), 64), np.float32)
    for at, (text, _, _) in enumerate(items):
        for word in text.lower().split():
            out[at, crc32(word.encode()) % 64] += 1
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def test_an_encoder_mines_within_the_margins(source: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    names = list(ingest(recipe(source), store))
    first = mine(recipe(source), store, names)
    asked = recipe(source, method="encoder", model="made up", first_rank=1, last_rank=100, margin_relative=0.9)
    report = mine(asked, store, names, encode=words_as_vectors)
    assert report["task"]["hash"] != first["task"]["hash"] and report["task"]["version"] > first["task"]["version"]
    collection = CollectionStore(store)["task"]
    rows = collection.take_rows(range(len(collection))).to_pylist()
    texts = collection.take_texts(range(collection.manifest.passages))
    passage_PD = words_as_vectors([(text, "passage", "task") for text in texts])
    query_QD = words_as_vectors([(row["query"], "query", "task") for row in rows])
    within = mined = 0
    for row, query_D in zip(rows, query_QD):
        score_P = passage_PD @ query_D
        positive = min(score_P[p] for p in row["positives"])
        twins = {text_key(texts[p]) for p in row["positives"]}
        assert len(row["negatives"]) == 4 and not twins & {text_key(texts[n]) for n in row["negatives"]}
        within += sum(score_P[n] <= positive - 0.1 * abs(positive) + 1e-6 for n in row["negatives"])
        mined += len(row["negatives"])
    found = report["task"]
    filled = found["random_filled"] + len(rows) * found["mean_given"]
    assert mined - within <= filled and found["mean_mined"] > 0
    assert 0 < found["share_filtered"] < 1 and found["margin_percentiles"] == sorted(found["margin_percentiles"])
    assert found["margin_percentiles"][0] > 0 and found["examples"][0]["negative"] in texts
    again = mine(asked, store, names, encode=words_as_vectors)
    assert again["task"] == report["task"], "up to date"


@pytest.mark.parametrize("method", ["bm25", "encoder"])
def test_a_cross_encoder_rescores(source: Path, tmp_path: Path, method: str) -> None:
    store, workers = tmp_path / "store", {"num_workers": 0 if method == "encoder" else 1, "cpus_per_worker": 1}
    cross = tiny_cross_encoder(tmp_path / "cross", [*TOPICS, "about", "number", "text"])
    names = ["task"]
    ingest(recipe(source), store)
    encoder = {"method": "encoder", "model": "made up"} if method == "encoder" else {}
    settings = {"last_rank": 8, "margin_relative": None, "margin_absolute": 0.1, "rescore": {"model": str(cross)}}
    asked = recipe(source, **settings, **encoder).model_copy(update={"scale": ScaleSettings(**workers)})
    encode = words_as_vectors if method == "encoder" else None
    report = mine(asked, store, names, encode=encode)["task"]
    collection = CollectionStore(store)["task"]
    rows = collection.take_rows(range(0, len(collection), 25)).to_pylist()
    texts = collection.take_texts(range(collection.manifest.passages))
    model = CrossEncoder.load(cross, 512)
    mined = 0
    for row in rows:
        passages = [*row["positives"], *row["negatives"]]
        score_X = model.score([row["query"]] * len(passages), [texts[p] for p in passages])
        for at, (known, score) in enumerate(zip(row["rescored"], score_X, strict=True)):
            if known is None:
                continue  # a random one
            assert known == pytest.approx(float(score), abs=1e-4)
            if at >= len(row["positives"]) and passages[at] not in row["given_negatives"]:
                mined += 1
                assert known <= min(row["rescored"][: len(row["positives"])]) - 0.1
    assert mined > 10 and 0 < report["share_filtered"] < 1 and report["margin_percentiles"][0] >= 0.1
    assert mine(asked, store, names, encode=encode)["task"] == report, "up to date"

    base = tmp_path / "base"
    build_base(ModelSettings(tiny=TINY), RetrieverSpec(query_length=8, passage_length=8), iter(TOPICS), base, 0)
    plan = Plan([len(collection)], None, 2, 8, 0)
    made = BatchRecipe(store, ("task",), versions_of([collection]), base, plan, 2, teacher=True)
    batch = Collator(made).batch(1, 0, 1)
    for row, keys, teacher in zip(batch.row_B.tolist(), batch.passage_key_BP.tolist(), batch.teacher_BP):
        (record,) = collection.take_rows([row]).to_pylist()
        known = dict(zip([*record["positives"], *record["negatives"]], record["rescored"], strict=True))
        assert np.allclose([np.nan if known[k] is None else known[k] for k in keys], teacher, equal_nan=True)
    assert np.isfinite(batch.teacher_BP[:, 0]).all()

    assert mine(recipe(source), store, names)["task"]["method"] == "bm25"
    assert "rescored" not in CollectionStore(store)["task"].rows.schema.names, "another mining leaves none behind"


def test_a_cross_encoder_that_is_none_is_one_message(source: Path, tmp_path: Path) -> None:
    ingest(recipe(source), tmp_path / "store")
    with pytest.raises(CheckpointError, match=r"Cross-encoder 'no/such' cannot be loaded"):
        mine(recipe(source, rescore={"model": "no/such"}), tmp_path / "store", ["tiny"])


@pytest.mark.long
def test_the_reference_model_mines(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, make_collections(tmp_path / "source"))
    encoder = ["--set", "mine.method=encoder", "--set", "mine.model=reference"]
    for command in ("ingest", "mine", "reference"):
        if command == "mine":
            refused = tdro(command, path, *encoder, runs=tmp_path / "runs")
            assert refused.returncode == 2 and "no trained reference yet" in refused.stderr
        done = tdro(command, path, runs=tmp_path / "runs")
        assert done.returncode == 0, done.stderr[-2000:]
    done = tdro("mine", path, *encoder, runs=tmp_path / "runs")
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads((tmp_path / "runs" / "small" / "stages" / "mine" / "mine.json").read_text())["tasks"]
    assert all(task["method"] == "encoder" and task["examples"] for task in written.values())
    assert "up to date" in tdro("mine", path, *encoder, runs=tmp_path / "runs").stdout
