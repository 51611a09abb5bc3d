"""Sources by URL, on fsspec's filesystem in memory: every format as from a local path, what changes, what errors say."""

import gzip
import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tdro_ray.data.count import count_rows
from tdro_ray.data.formats import located, read
from tdro_ray.data.layouts import open_test
from tdro_ray.data.place import files_under, place, stamp
from tdro_ray.data.sources import discover
from tdro_ray.errors import DataError
from tdro_ray.types import RetrievalTest

LINES = "".join(json.dumps([f"q{n}", f"p{n} ü", f"n{n}"]) + "\n" for n in range(50)).encode()
QUERIES = b'{"_id": "t", "text": "asked"}\n'
CORPUS = b'{"_id": "d", "title": "T", "text": "said"}\n'


@pytest.fixture
def root() -> Iterator[str]:
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def put(url: str, data: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(data)


def fill(root: str, local: Path) -> None:
    """The same tasks at a URL and in a folder: lines (plain, .gz, .zst, with a test and task.yaml), Parquet, BEIR."""
    local.mkdir(exist_ok=True)
    pq.write_table(pa.table({"anchor": ["q1", "q2"], "positive": ["p1", "p2"]}), local / "pairs.parquet")
    parquet = (local / "pairs.parquet").read_bytes()
    (local / "pairs.parquet").unlink()
    files = {
        "plain/train.jsonl": LINES,
        "plain/task.yaml": b"symmetric: true\nlanguage: sw\n",
        "plain/corpus.jsonl": CORPUS,
        "plain/queries.jsonl": QUERIES,
        "plain/qrels/test.tsv": b"query-id\tcorpus-id\tscore\nt\td\t1\n",
        "zipped/part1.jsonl.gz": gzip.compress(LINES),
        "zipped/part2.jsonl.zst": zstandard.compress(LINES),
        "table/train.parquet": parquet,
        "beir/corpus.jsonl.gz": gzip.compress(CORPUS),
        "beir/queries.jsonl": QUERIES,
        "beir/qrels/train.tsv": b"t\td\t1\n",
        "nothing/README.md": b"no rows",
    }
    for name, data in files.items():
        put(f"{root}/{name}", data)
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(data)


def test_every_format_reads_as_from_a_folder(root: str, tmp_path: Path) -> None:
    fill(root, tmp_path / "local")
    notes: list[str] = []
    there = discover([root], notes.append)
    here = discover([str(tmp_path / "local")])
    assert [t.name for t in there] == [t.name for t in here] == ["beir", "plain", "table", "zipped"]
    assert notes == [f"{root}/nothing holds no training rows and is left out"]
    for ours, theirs in zip(there, here):
        rows = [row for path, name in ours.files for row in read(located(str(path)), name)]
        assert rows == [row for path, name in theirs.files for row in read(path, name)] and rows
        assert ours.info.symmetric == theirs.info.symmetric == (ours.name == "plain")
        assert ours.info.language == theirs.info.language
        assert count_rows(ours) == count_rows(theirs)
    test = open_test(there[1].test)
    assert test.queries == {"t": "asked"} and [p.full_text for p in test.corpus] == ["T said"]
    assert isinstance(test, RetrievalTest) and len(test.corpus) == 1


def test_one_file_and_one_task_folder(root: str, tmp_path: Path) -> None:
    fill(root, tmp_path / "local")
    assert discover([f"{root}/plain"])[0].name == discover([f"{root}/plain/train.jsonl"])[0].name == "plain"
    with pytest.raises(DataError, match="no known format"):
        discover([f"{root}/nothing/README.md"])
    with pytest.raises(DataError, match="holds no task"):
        discover([f"{root}/nothing"])


def test_the_fingerprint_changes_with_an_object(root: str, tmp_path: Path) -> None:
    fill(root, tmp_path / "local")
    before = {t.name: t.fingerprint() for t in discover([root])}
    assert {t.name: t.fingerprint() for t in discover([root])} == before
    put(f"{root}/plain/train.jsonl", LINES.replace(b"q7", b"Q7"))  # of the same size
    after = {t.name: t.fingerprint() for t in discover([root])}
    assert {name for name in before if before[name] != after[name]} == {"plain"}


def test_a_place_is_like_a_path(root: str, tmp_path: Path) -> None:
    fill(root, tmp_path / "local")
    folder, local = place(root), place(str(tmp_path / "local"))
    assert [str(p).removeprefix(root) for p in files_under(folder)] == [
        str(p).removeprefix(str(local)) for p in files_under(local)
    ]
    file = folder / "zipped" / "part1.jsonl.gz"
    assert (file.name, file.stem, file.suffix, file.parent.name) == ("part1.jsonl.gz", "part1.jsonl", ".gz", "zipped")
    assert str(place(str(file))) == str(file) and stamp(place(str(file))) == stamp(file)
    assert not (folder / "zipped" / "no").exists() and not place(f"{root}/no/where").exists()
    assert place("file:///tmp") == Path("/tmp") and place("~").is_absolute()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("memory://nowhere/at/all", "memory://nowhere/at/all cannot be read: there is no such bucket, folder or file"),
        ("nosuch://bucket", "nosuch://bucket cannot be read: Protocol not known"),
        ("s3://key:secret@bucket/x", "holds a password.*AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("s3://bucket/x?nosuch=1", "Unexpected query parameter"),
    ],
)
def test_what_cannot_be_read_is_one_message(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        discover([source])
    assert "secret" not in str(error.value)


def test_damage_is_not_taken_for_a_failing_service(root: str) -> None:
    put(f"{root}/task/train.jsonl.gz", gzip.compress(LINES)[:-20])
    path, name = discover([f"{root}/task"])[0].files[0]
    with pytest.raises(DataError, match=r"train.jsonl.gz cannot be read as jsonl: .*damaged"):
        list(read(path, name))
