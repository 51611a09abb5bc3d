"""The installed Python environment as a source: sampling, parsing, splitting, and what the tasks promise."""

import ast
import pickle
import textwrap
import warnings

import pytest

from tdro_ray.config import EnvironmentSettings
from tdro_ray.data.environment import TASKS, build_task, distinct_examples, environment_key, environment_tasks
from tdro_ray.data.environment_files import WELL_KNOWN, SourceFile, chunk_files, held_out, sample_files
from tdro_ray.data.environment_metadata import c_function_records, readme_sections, topic_entries, topic_records
from tdro_ray.data.environment_pairs import override_pairs, parameter_pairs
from tdro_ray.data.environment_parse import parse_files
from tdro_ray.data.environment_source import Record
from tdro_ray.data.environment_texts import clip, clip_lines, docstring_parameters, first_paragraph, normalise
from tdro_ray.errors import DataError

SETTINGS = EnvironmentSettings(max_rows=60, test_queries=20, max_files=500)
NOUNS = ["river", "mountain", "harbour", "forest", "meadow", "glacier", "island", "valley", "desert", "canyon"]
VERBS = ["measure", "paint", "describe", "photograph", "survey"]


def module_text(package: int, number: int) -> str:
    """A module whose texts are its own but for `close`, which every module has in the same words."""
    noun, verb = NOUNS[number % 10], VERBS[package % 5]
    where = f"{noun} number {package} {number}"
    return textwrap.dedent(f'''
        """Tools that {verb} the {where} for a travelling reader."""
        import argparse

        class Base{package}_{number}:
            """Keeps everything that is known about the {where} together."""

            def visit(self, guide):
                """Go and {verb} the {where} with a guide.

                Args:
                    guide (str): Name of the person who leads the way to {where}.
                """
                if not guide:
                    raise ValueError(f"Cannot {verb} the {where} without {{guide}}")
                # Remember who came along to {verb} the {where}
                self.guests = [guide, "{where}"]
                return self.guests

            def close(self):
                """Release whatever this thing holds on to."""
                self.guests = None
                return "{where} closed"

        class Special{package}_{number}(Base{package}_{number}):
            def visit(self, guide):
                """Take a different road and {verb} {where} alone."""
                guests = [guide, {number}]
                return sorted(guests, key=str)

        def options_{package}_{number}(parser: argparse.ArgumentParser):
            """Add the command-line options of {where} to a parser."""
            parser.add_argument("--{noun}-{package}-{number}", help="How often to {verb} the {where}, in days")
            return parser
    ''')


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("site")
    for package in range(30):
        folder = root / f"pack{package}"
        folder.mkdir()
        for number in range(3):
            (folder / f"part{number}.py").write_text(module_text(package, number))
    (root / "json.py").write_text(module_text(90, 1))
    info = root / "pack0-1.0.dist-info"
    info.mkdir()
    sections = "\n".join(f"## Chapter on the {n}\n\n{'The ' + n + ' is wide and old. ' * 4}\n" for n in NOUNS)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pack0\nVersion: 1.0\n\n# Pack\n\n{sections}")
    return root


@pytest.fixture(scope="module")
def tasks(tree):
    return environment_tasks(SETTINGS, roots=[tree])


def records_of(tmp_path, text, module="pack.mod"):
    path = tmp_path / "mod.py"
    path.write_text(textwrap.dedent(text))
    return parse_files([SourceFile(module, str(path), path.stat().st_size)])


def of_task(records, task):
    return [(r.id, r.query, r.passage) for r in records if r.task == task]


def check_promises(task):
    """What every task promises: distinct texts, a test apart from training, qrels that point into the corpus."""
    ids = [row.id for row in task.rows]
    positives = [p for row in task.rows for p in row.positives]
    assert ids == sorted(set(ids))
    assert len({p.docid for p in positives}) == len(positives)
    queries = [normalise(row.query) for row in task.rows]
    passages = [normalise(p.text) for p in positives]
    assert len(set(queries)) == len(queries) and len(set(passages)) == len(passages)
    assert all(0 < len(row.query) <= 400 and not row.negatives for row in task.rows)
    assert all(0 < len(p.text) <= 1500 for p in positives)
    assert not any(any(c.isspace() for c in i) for i in ids)  # run files are separated by blanks
    if task.test is None:
        return
    corpus = {p.docid: p for p in task.test.corpus}
    assert len(corpus) == len(task.test.corpus) <= 1500
    assert len({normalise(p.text) for p in task.test.corpus}) == len(corpus)
    assert set(task.test.queries) == set(task.test.qrels) and not set(task.test.queries) & set(ids)
    answers = {d for judged in task.test.qrels.values() for d in judged}
    assert answers <= set(corpus)
    assert not {normalise(corpus[d].text) for d in answers} & set(passages)
    asked = {normalise(q) for q in task.test.queries.values()}
    assert len(asked) == len(task.test.queries) and not asked & set(queries)
    if task.info.symmetric:
        assert not asked & set(passages) and not {normalise(corpus[d].text) for d in answers} & set(queries)


def test_synthetic_tree_keeps_every_promise(tasks):
    assert [task.name for task in tasks] == sorted(task.name for task in tasks)
    assert {t.name for t in tasks} == set(TASKS) - {"py_language_reference"}  # which is not under these roots
    for task in tasks:
        check_promises(task)
        assert task.info == TASKS[task.name] and task.info.query_prompt and task.info.language == "en"
    tested = [task for task in tasks if task.test]
    assert len(tested) >= 7
    assert all(
        len(task.rows) <= SETTINGS.max_rows and len(task.test.queries) <= SETTINGS.test_queries for task in tested
    )


def test_packages_stay_on_one_side(tasks):
    for task in tasks:
        if task.test and task.name != "py_readme_section":
            groups = {".".join(i.removeprefix("q:").split(":")[0].split(".")[:2]) for i in task.test.queries}
            assert all(held_out(g) for g in groups)
            assert not any(held_out(".".join(r.id.split(":")[0].split(".")[:2])) for r in task.rows)


def test_well_known_module_is_read_and_trained_on(tasks, tree):
    assert "json" in {f.module for f in sample_files(1, [tree])}
    signature = next(t for t in tasks if t.name == "py_signature_docstring")
    assert any(row.id.startswith("json:") for row in signature.rows)


def test_no_machine_path_in_any_text(tasks, tree):
    for task in tasks:
        assert str(tree) not in repr((task.rows, task.test))


def test_same_tasks_whatever_the_map(tree, tasks):
    def one_file_at_a_time_backwards(function, chunks):
        function = pickle.loads(pickle.dumps(function))
        return [function([file]) for chunk in list(chunks)[::-1] for file in chunk[::-1]]

    assert environment_tasks(SETTINGS, one_file_at_a_time_backwards, roots=[tree]) == tasks


def test_sample_does_not_depend_on_directory_order(tmp_path):
    names = [f"mod{n}" for n in range(40)]
    for folder, order in ((tmp_path / "a", names), (tmp_path / "b", names[::-1])):
        folder.mkdir()
        for name in order:
            (folder / f"{name}.py").write_text("x = 1\n" * 60)
    first, second = ([f.module for f in sample_files(10, [tmp_path / x])] for x in "ab")
    assert first == second == sorted(first) and len(first) == 10


def test_sample_shares_files_between_packages_and_skips_tests_and_copies(tmp_path):
    def write(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n" * 60)

    for n in range(100):
        write(f"large/m{n}.py")
    for n in range(4):
        write(f"small/m{n}.py")
    for name in ("tests/a.py", "small/tests/b.py", "small/_vendor/c.py", "small/test_d.py", "small/e_pb2.py"):
        write(name)
    (tmp_path / "huge.py").write_text("x = 1\n" * 60_000)
    sample = [f.module for f in sample_files(12, [tmp_path])]
    assert sum(m.startswith("large.") for m in sample) == 10 and sum(m.startswith("small.") for m in sample) == 2
    everything = {f.module for f in sample_files(1000, [tmp_path])}
    assert everything == {f"large.m{n}" for n in range(100)} | {f"small.m{n}" for n in range(4)}


def test_chunks_hold_every_file_once():
    files = [SourceFile(f"m{n}", "", size) for n, size in enumerate([10, 600, 500, 2000, 1])]
    chunks = chunk_files(files, chunk_bytes=1000)
    assert [f for c in chunks for f in c] == files and [len(c) for c in chunks] == [2, 1, 1, 1]


def test_docstring_is_absent_from_the_source(tasks):
    task = next(t for t in tasks if t.name == "py_docstring_source")
    for row in task.rows:
        for passage in row.positives:
            assert normalise(row.query) not in normalise(passage.text)
            assert ast.get_docstring(ast.parse(passage.text).body[0]) is None


def test_function_whose_docstring_cannot_be_cut_out_is_left_out(tmp_path):
    records = records_of(
        tmp_path,
        '''
        def one(a): "Return the sum of all given numbers."; return a
        def two(a):
            """Return the product of all given numbers."""
        def three(a):
            """Return the largest of all given numbers."""
            # Return the largest of all given numbers.
            b = max(a)
            return b
        def four(a,
                 b):
            """Return the smallest of all given numbers."""
            c = min(a, b)
            return c
        ''',
    )
    assert of_task(records, "py_docstring_source") == [
        (
            "pack.mod:four",
            "Return the smallest of all given numbers.",
            "def four(a,\n         b):\n    c = min(a, b)\n    return c",
        )
    ]


def test_comments_are_comments_and_not_strings(tmp_path):
    records = records_of(
        tmp_path,
        """
        text = '''
        # This line stands inside of a string
        total = 1
        '''
        # Add up the prices of all things
        # that are still in the basket
        total = sum(prices)
        mean = total / len(prices)

        other = 1
        # Licence: this text is copyright of somebody
        rest = total - other - mean
        # value = compute(total, other, rest)
        value = total + other + rest + mean
        """,
    )
    assert of_task(records, "py_comment_code") == [
        (
            "pack.mod:line8",
            "Add up the prices of all things that are still in the basket",
            "total = sum(prices)\nmean = total / len(prices)",
        )
    ]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ('"The value must not be negative"', "The value must not be negative"),
        ('f"The value {x!r} must not be negative"', "The value ... must not be negative"),
        ('"The value %s must be below %d" % (x, y)', "The value ... must be below ..."),
        ('"The value {} must be below {y}".format(x, y=y)', "The value ... must be below ..."),
        ('"The value must not be " + x', "The value must not be ..."),
    ],
)
def test_exception_message(tmp_path, expression, message):
    records = records_of(tmp_path, f"def check(x, y):\n    if x < 0:\n        raise errors.RangeError({expression})\n")
    ((identity, query, passage),) = of_task(records, "py_exception_source")
    assert (identity, query) == ("pack.mod:check", f"RangeError: {message}")
    assert passage.startswith("def check(x, y):\n    if x < 0:")


def test_long_function_keeps_the_raise(tmp_path):
    body = "".join(f"    value_{n} = compute({n})\n" for n in range(200))
    records = records_of(
        tmp_path, f'def long(x):\n{body}    raise ValueError("Nothing could be computed here")\n{body}'
    )
    ((_, _, passage),) = of_task(records, "py_exception_source")
    assert passage.startswith("def long(x):\n    ...\n") and "Nothing could be computed here" in passage
    assert 1300 < len(passage) <= 1500


def test_options_of_argparse_click_and_dataclasses(tmp_path):
    records = records_of(
        tmp_path,
        """
        parser.add_argument("-d", "--depth", type=int, help="Largest depth of the tree (default: %(default)s)")
        parser.add_argument("path", help="A positional argument is not an option")
        group = parser.add_option("--width", help=f"Width of a {unit} in the picture")
        @dataclass
        class Settings:
            height: int = field(default=1, metadata={"help": "Height of the picture in pixels"})
        """,
    )
    assert of_task(records, "py_option_help") == [
        ("pack.mod:depth", "-d --depth of pack.mod", "Largest depth of the tree (default: ...)"),
        ("pack.mod:width", "--width of pack.mod", "Width of a ... in the picture"),
        ("pack.mod:height", "--height of pack.mod", "Height of the picture in pixels"),
    ]


def test_click_decorator_is_an_option(tmp_path):
    records = records_of(
        tmp_path,
        """
        @click.option("--colour", help="Colour of the lines in the picture")
        def main(colour):
            return colour
        """,
    )
    assert of_task(records, "py_option_help") == [
        ("pack.mod:colour", "--colour of pack.mod", "Colour of the lines in the picture")
    ]


GOOGLE = """Do a thing.

Args:
    size (`tuple(int, int)`, *optional*):
        Size of the picture
        in pixels.

        Must be even.
    *names: Names of the things.

Returns:
    int: Not a parameter.
"""
NUMPY = """Do a thing.

Parameters
----------
size : tuple of int, optional
    Size of the picture
    in pixels.
*names
    Names of the things.

Returns
-------
int
    Not a parameter.
"""
SPHINX = """Do a thing.

:param tuple size: Size of the picture
    in pixels.
:param names: Names of the things.
:returns: Not a parameter.
"""


@pytest.mark.parametrize("doc", [GOOGLE, NUMPY, SPHINX])
def test_parameters_in_three_styles(doc):
    (size, first), (names, second) = docstring_parameters(doc)
    assert (size, names, second) == ("size", "names", "Names of the things.")
    assert first.startswith("Size of the picture in pixels.")


def test_first_paragraph_stops_at_sections_and_markup():
    assert (
        first_paragraph("Return the :class:`~a.b.Tree` of\n``x``.\nArgs:\n    x: A thing.")
        == "Return the a.b.Tree of x."
    )
    assert first_paragraph("Args:\n    x: A thing.") == ""
    assert first_paragraph("word " * 200, 50) == " ".join(["word"] * 10)


def test_cuts_are_within_the_limit():
    for limit in range(1, 30):
        assert len(clip("alpha beta gamma delta epsilon", limit)) <= limit
        assert len(clip_lines("alpha beta\ngamma delta\nepsilon", limit)) <= limit
    assert clip("alpha beta gamma", 11) == "alpha beta"
    assert clip_lines("alpha beta\ngamma delta", 15) == "alpha beta"


def test_normal_form():
    assert normalise("  Return, the VALUE.\n") == normalise("return the value") == "return the value"
    assert normalise("ﬁne") == "fine" and normalise("-- !") == ""


def test_overrides_give_one_pair_for_a_family(tmp_path):
    records = records_of(
        tmp_path,
        '''
        class Base:
            def read(self):
                """Return the whole content as bytes."""
        class First(Base):
            def read(self):
                """Return all bytes of the opened file."""
        class Second(First):
            def read(self):
                """Return the bytes that the server sent."""
        class Same(Base):
            def read(self):
                """Return the whole content as bytes."""
        ''',
    )
    (pair,) = override_pairs(r for r in records if r.task == "methods")
    assert pair.docid in ("pack.mod:Base.read", "pack.mod:First.read") and pair.query != pair.passage
    assert pair.task == "py_paraphrases" and pair.id in ("pack.mod:First.read", "pack.mod:Second.read")


def test_override_of_an_imported_base(tmp_path):
    base = records_of(tmp_path, 'class B:\n    def go(self):\n        """Walk to the next place."""\n', "pack.base")
    text = 'from .base import B as C\nclass D(C):\n    def go(self):\n        """Walk there in the rain."""\n'
    (pair,) = override_pairs([r for r in base + records_of(tmp_path, text, "pack.other") if r.task == "methods"])
    assert (pair.id, pair.docid) == ("pack.other:D.go", "pack.base:B.go")


def test_parameter_pairs_share_words_but_are_no_copies():
    def parameter(function, text):
        return Record("py_parameter_description", f"pack.mod:{function}.size", "pack.mod", f"size of {function}", text)

    texts = [
        "Size of the printed output picture in pixels.",
        "Size of the picture in pixels.",
        "Something entirely different here.",
    ]
    (pair,) = parameter_pairs(parameter(f"f{n}", text) for n, text in enumerate([*texts, texts[0]]))
    assert normalise(pair.query) != normalise(pair.passage) and {pair.query, pair.passage} == set(texts[:2])


def record(name, query, passage, group="pack"):
    return Record("t", f"{group}:{name}", group, query, passage)


def test_equal_queries_merge_or_drop():
    two = [record("a", "Open it", "first way"), record("b", "open IT!", "second way")]
    (example,) = distinct_examples(two, symmetric=False)
    assert {p.text for p in example.positives} == {"first way", "second way"}
    assert distinct_examples([record(str(n), "Open it", f"way {n}") for n in range(4)], False) == []
    sides = {held_out(f"pack{n}"): f"pack{n}" for n in range(100)}
    both = [record("a", "Open it", "first way", sides[True]), record("b", "Open it", "second way", sides[False])]
    assert distinct_examples(both, False) == []


def test_equal_passages_are_kept_once():
    same = [record("a", "first question", "Answer."), record("b", "second question", "answer")]
    assert len(distinct_examples(same, False)) == 1
    crossed = [record("a", "one text", "another text"), record("b", "another text", "third text")]
    assert len(distinct_examples(crossed, False)) == 2 and len(distinct_examples(crossed, True)) == 1


def test_texts_can_be_encoded(tmp_path):
    records = records_of(
        tmp_path, 'def f(a):\n    "Return the \\ud800 broken \\x00 half of a pair."\n    b = a\n    return b\n'
    )
    (example,) = distinct_examples([r for r in records if r.task == "py_docstring_source"], False)
    assert example.query.encode() == b"Return the  broken  half of a pair."


def test_rows_are_bounded_and_known_modules_do_not_take_all():
    known = [record(f"f{n}", f"known question {n}", f"known answer {n}", "json") for n in range(100)]
    sides = [f"pack{n}" for n in range(400)]
    other = [record("f", f"question {s}", f"answer {s}", s) for s in sides]
    task = build_task("t", TASKS["py_comment_code"], known + other, EnvironmentSettings(max_rows=50, test_queries=10))
    assert len(task.rows) == 50 and sum(r.id.startswith("json:") for r in task.rows) == 30
    assert len(task.test.queries) == 10 and len(task.test.corpus) >= 300
    check_promises(task)


def test_bad_files_are_left_out_in_silence(tmp_path):
    good = b'"""Say what this whole module does."""\n'
    bad = {
        "latin": b"# coding: latin-1\nx = '\xe9'\ndef f(a):\n    'Return the text of a \xe9 thing.'\n    b = a\n    return b\n",
        "no_codec": b"# coding: nonsense\n" + good,
        "not_utf8": b"x = '\xff'\n",
        "null": b"x = '\x00'\n",
        "syntax": b"def f(:\n",
        "deep": b"x = " + b"(" * 5000 + b")" * 5000,
        "nested": b"x = " + b"-" * 50_000 + b"1\n",
        "escape": b"x = '\\d'\nassert (x, 'always true')\n",
        "elif": b"if x == 0:\n    pass\n" + b"".join(b"elif x == %d:\n    pass\n" % n for n in range(900)),
    }
    files = []
    for name, content in bad.items():
        (tmp_path / f"{name}.py").write_bytes(content)
        files.append(SourceFile(name, str(tmp_path / f"{name}.py"), len(content)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = parse_files(files)
    assert not caught
    assert {r.id for r in records} == {"latin:f"} and "é" in records[0].query


def test_missing_file_and_empty_environment_are_explained(tmp_path):
    with pytest.raises(DataError, match=r"Module gone .* cannot be read .* install them there"):
        parse_files([SourceFile("gone", str(tmp_path / "gone.py"), 1)])
    with pytest.raises(DataError, match="no documented source was found"):
        environment_tasks(SETTINGS, roots=[tmp_path])


def test_second_definition_gets_its_own_id(tmp_path):
    text = 'try:\n    def f(a):\n        """Return one of all things."""\nexcept E:\n    def f(a):\n        """Return two of all things."""\n'
    ids = {identity for identity, _, _ in of_task(records_of(tmp_path, text), "py_signature_docstring")}
    assert ids == {"pack.mod:f", "pack.mod:f#2"}


def test_readme_sections():
    text = "# Title\n\n![badge](x.svg) See [the\ndocs](http://x).\n\n```sh\n# not a heading\n```\n\n## Use\nCall <b>it</b>.\n"
    assert readme_sections(text) == [("Title", "See the\ndocs.\n# not a heading"), ("Use", "Call it.")]
    rst = "Title\n=====\n\nSee `docs <http://x>`_.\n\n.. image:: x\n\nUse it\n------\nCall ``it``.\n"
    assert readme_sections(rst) == [("Title", "See docs."), ("Use it", "Call it.")]


def test_topic_entries():
    text = "Numbers\n*******\n\nAbout numbers.\n\nobject.__add__(self, other)\n\n   Called for a sum.\n\nMore text.\n"
    entries = dict(topic_entries(text))
    assert entries["object.__add__(self, other)"] == "Called for a sum."
    assert entries["Numbers"].startswith("About numbers.") and entries["Numbers"].endswith("More text.")


def test_language_reference_and_c_functions():
    assert any(r.query == "object.__len__(self)" for r in topic_records())
    found = {r.id: r for r in c_function_records()}
    assert found["math:sqrt"].query.startswith("sqrt(") and "square root" in found["math:sqrt"].passage
    assert {"itertools:chain", "builtins:str.split"} <= set(found)


def test_key_follows_settings_and_nothing_else():
    assert environment_key(SETTINGS) == environment_key(SETTINGS.model_copy())
    assert environment_key(SETTINGS) != environment_key(SETTINGS.model_copy(update={"max_rows": 61}))


def test_installed_environment_has_its_tasks():
    settings = EnvironmentSettings(max_files=250, max_rows=300, test_queries=30)
    tasks = {task.name: task for task in environment_tasks(settings)}
    assert len(tasks) >= 7
    for task in tasks.values():
        check_promises(task)
        assert task.rows
    docstrings = {p.docid: p.text for row in tasks["py_signature_docstring"].rows for p in row.positives}
    assert any(docid.split(":")[0] in WELL_KNOWN for docid in docstrings)


def test_well_known_modules_are_always_sampled():
    tops = {f.module.partition(".")[0] for f in sample_files(200)}
    compiled = {"itertools", "time", "_pydatetime"}  # no Python source, or only in some versions
    assert tops >= WELL_KNOWN - compiled
