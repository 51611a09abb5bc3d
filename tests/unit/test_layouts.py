"""MIRACL and Mr.TyDi folders as published: their training rows, their tests, and where their corpora may lie."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tdro_ray.config import Recipe
from tdro_ray.data.count import count_rows
from tdro_ray.data.formats import Reject, read
from tdro_ray.data.layouts import corpus_files, layout_of, open_test, qrels_lines, read_judged
from tdro_ray.data.sources import discover
from tdro_ray.errors import DataError
from tdro_ray.stages import results
from tdro_ray.types import Passage, Row


def put(path: Path, lines: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def documents(start: int, stop: int) -> list[dict]:
    return [{"docid": f"{n}#0", "title": f"T{n}", "text": f"text {n}"} for n in range(start, stop)]


def make_miracl(root: Path, corpus: str) -> Path:
    """Eleven documents in three files, so that docs-10 comes after docs-2; train and dev judgements, test without."""
    folder, name = root / "miracl" / "miracl-v1.0-sw", "miracl-v1.0-sw"
    put(folder / "topics" / f"topics.{name}-train.tsv", ["1\twho is it", "2\twhat is it"])
    put(folder / "topics" / f"topics.{name}-dev.tsv", ["7\tdev question", "8\tnever judged"])
    put(folder / "topics" / f"topics.{name}-test-a.tsv", ["9\thidden"])
    put(folder / "qrels" / f"qrels.{name}-train.tsv", ["1\tQ0\t0#0\t1", "1\tQ0\t3#0\t0", "2\tQ0\t10#0\t1"])
    put(folder / "qrels" / f"qrels.{name}-dev.tsv", ["7\tQ0\t4#0\t1", "7\tQ0\t5#0\t0"])
    for file, (start, stop) in {"docs-0": (0, 4), "docs-2": (4, 8), "docs-10": (8, 11)}.items():
        put(root / corpus.format(folder=folder.relative_to(root)) / f"{file}.jsonl.gz", documents(start, stop))
    return folder


@pytest.mark.parametrize(
    "corpus",
    ["{folder}", "{folder}/corpus", "miracl/miracl-corpus-v1.0-sw", "miracl-corpus/miracl-corpus-v1.0-sw"],
)
def test_miracl(tmp_path: Path, corpus: str) -> None:
    folder = make_miracl(tmp_path, corpus)
    assert list(read(folder)) == [
        Row("1", "who is it", (Passage("0#0", "text 0", "T0"),), (Passage("3#0", "text 3", "T3"),)),
        Row("2", "what is it", (Passage("10#0", "text 10", "T10"),)),
    ]
    (task,) = discover([str(folder)])
    assert (task.name, task.files, task.test) == ("miracl-v1.0-sw", ((folder, "miracl"),), folder)
    test = open_test(folder)
    assert test.queries == {"7": "dev question"} and test.qrels == {"7": {"4#0": 1, "5#0": 0}}
    assert [p.docid for p in test.corpus] == [f"{n}#0" for n in range(11)] and len(test.corpus) == 11
    assert count_rows(task)[0] in (2, 3)
    before = task.fingerprint()
    put(corpus_files(folder)[1], documents(4, 9))
    assert task.fingerprint() != before


def test_all_languages_of_miracl_at_once(tmp_path: Path) -> None:
    make_miracl(tmp_path, "miracl/miracl-corpus-v1.0-sw")
    notes: list[str] = []
    assert [task.name for task in discover([str(tmp_path / "miracl")], notes.append)] == ["miracl-v1.0-sw"]
    assert len(notes) == 1 and "miracl-corpus-v1.0-sw" in notes[0]


def test_mrtydi_rows_with_docids_in_its_tests(tmp_path: Path) -> None:
    folder = tmp_path / "mr-tydi" / "mrtydi-v1.1-swahili"
    row = {
        "query_id": "1",
        "query": "who?",
        "positive_passages": [{"docid": "0#0", "title": "T0", "text": "text 0"}],
        "negative_passages": [{"docid": "1#0", "title": "T1", "text": "text 1"}],
    }
    put(folder / "train.jsonl.gz", [row])
    for split in ("dev", "test"):
        docids = [{"docid": "2#0", "title": "", "text": ""}]
        put(folder / f"{split}.jsonl.gz", [{"query_id": "5", "query": split, "positive_passages": docids}])
    put(tmp_path / "mr-tydi-corpus" / "mrtydi-v1.1-swahili" / "corpus.jsonl.gz", documents(0, 3))
    (task,) = discover([str(folder)])
    assert [path.name for path, _ in task.files] == ["train.jsonl.gz"] and task.test == folder
    assert list(read(folder / "train.jsonl.gz")) == [
        Row("1", "who?", (Passage("0#0", "text 0", "T0"),), (Passage("1#0", "text 1", "T1"),))
    ]
    test = open_test(folder)
    assert (test.queries, test.qrels) == ({"5": "test"}, {"5": {"2#0": 1}})
    assert tuple(test.corpus)[2] == Passage("2#0", "text 2", "T2")


def test_mrtydi_topics_and_qrels(tmp_path: Path) -> None:
    folder = tmp_path / "mrtydi-v1.1-swahili"
    put(folder / "collection" / "docs.jsonl.gz", [{"id": f"{n}#0", "contents": f"text {n}"} for n in range(3)])
    for split, docid in (("train", "0#0"), ("dev", "1#0"), ("test", "2#0")):
        put(folder / f"topic.{split}.tsv", [f"{split}1\tquestion of {split}"])
        put(folder / f"qrels.{split}.txt", [f"{split}1 Q0 {docid} 1"])
    assert layout_of(folder, "train") == "mrtydi"
    assert list(read(folder)) == [Row("train1", "question of train", (Passage("0#0", "text 0"),))]
    assert open_test(folder).qrels == {"test1": {"2#0": 1}} and open_test(folder, "dev").qrels == {"dev1": {"1#0": 1}}


def test_a_judged_document_that_is_not_there_is_a_reject(tmp_path: Path) -> None:
    folder = make_miracl(tmp_path, "{folder}")
    (folder / "docs-10.jsonl.gz").unlink()
    rows = list(read(folder))
    assert isinstance(rows[1], Reject) and (rows[1].line, rows[1].reason) == (3, "wrong type")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: [p.unlink() for p in f.glob("docs-*")], "no corpus.jsonl .*docs-"),
        (lambda f: [p.unlink() for p in f.glob("topics/*dev*")], r"no topics/topics\.\*-dev\.tsv"),
        (lambda f: put(f / "topics" / "topics.x-dev.tsv", ["7 no tab"]) and None, r"x-dev.tsv:1: .*separated by a tab"),
        (lambda f: put(f / "qrels" / "qrels.a-dev.tsv", ["7\tQ0\td\tyes", "7\tQ0\td\tno"]), r":2: expected query-id"),
        (lambda f: [p.unlink() for p in f.glob("qrels/*")], r"has no qrels/test.tsv"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, break_it, message: str) -> None:
    folder = make_miracl(tmp_path, "{folder}")
    if "x-dev" in message:
        (folder / "topics" / "topics.miracl-v1.0-sw-dev.tsv").unlink()
    break_it(folder)
    with pytest.raises(DataError, match=message):
        open_test(folder)


def test_a_bad_document_is_named_when_it_is_reached(tmp_path: Path) -> None:
    folder = make_miracl(tmp_path, "{folder}")
    put(folder / "docs-2.jsonl.gz", [*documents(4, 5), {"docid": "x", "text": None}])
    test = open_test(folder)
    with pytest.raises(DataError, match=r"docs-2.jsonl.gz:2: field 'text' must be a string"):
        list(test.corpus)


def test_blank_lines_and_headers_of_judgements(tmp_path: Path) -> None:
    path = put(tmp_path / "qrels.tsv", ["query-id\tcorpus-id\tscore", "", "q\td\t1"])
    assert [tuple(j) for j in qrels_lines(path)] == [(3, "q", "d", 1)]
    assert [tuple(j) for j in qrels_lines(put(tmp_path / "blank.tsv", ["", "q d 1"]))] == [(2, "q", "d", 1)]


def test_dev_judgements_of_a_beir_folder_are_a_test_where_it_has_no_other(tmp_path: Path) -> None:
    put(tmp_path / "queries.jsonl", [{"_id": "q", "text": "asked"}])
    put(tmp_path / "corpus.jsonl", [{"_id": "d", "text": "said"}])
    put(tmp_path / "qrels" / "dev.tsv", ["q\td\t1"])
    assert read_judged(tmp_path) == ({"q": "asked"}, {"q": {"d": 1}})
    put(tmp_path / "qrels" / "test.tsv", ["q\td\t2"])
    assert read_judged(tmp_path)[1] == {"q": {"d": 2}}


def test_extra_tests_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [make_miracl(tmp_path / where, "{folder}") for where in ("a", "b")]
    monkeypatch.setattr(results, "collections", lambda run: [])
    recipe = Recipe.model_validate({"evaluate": {"extra_tests": [str(folders[0])]}})
    assert list(results.tests_of(SimpleNamespace(recipe=recipe))) == ["miracl-v1.0-sw"]
    recipe = Recipe.model_validate({"evaluate": {"extra_tests": list(map(str, folders))}})
    with pytest.raises(DataError, match=r"Two tests are called 'miracl-v1.0-sw'.*Rename"):
        results.tests_of(SimpleNamespace(recipe=recipe))
