"""Who may import whom: imports point down, Ray stays in few files, pure rooms stay pure. DESIGN.md says why."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(p for room in ("tdro_ray", "serve", "cluster") for p in (ROOT / room).rglob("*.py"))

BASE = {"types", "errors", "config", "recipe"}
BELOW_STAGES = {*BASE, "dro", "retrieval", "model", "data", "train", "index", "evaluate", "report"}
MAY_IMPORT = {  # room -> rooms of tdro_ray that it may import, itself aside
    "errors": set(),
    "types": set(),
    "config": {"errors"},
    "recipe": {"config", "errors"},
    "dro": {"errors", "types"},
    "retrieval": {"errors", "types"},
    "model": {*BASE, "retrieval"},
    "data": {*BASE, "retrieval", "model"},
    "index": {*BASE, "retrieval", "model", "data"},
    "evaluate": {*BASE, "dro", "retrieval", "model", "data"},
    "train": {*BASE, "dro", "retrieval", "model", "data"},
    "report": {*BASE, "dro", "evaluate"},
    "pipeline": {"config", "errors"},  # knows no stage's inside
    "stages": {*BELOW_STAGES, "pipeline"},
    "tune": {*BELOW_STAGES, "pipeline", "stages"},  # a search runs stages
    "serve": {"types", "errors", "model", "index"},
    "display": set(),
    "dryrun": {*BELOW_STAGES, "pipeline", "stages", "display"},
    "index_commands": {"errors", "index", "display"},  # no recipe, no Ray
    "commands": {*BELOW_STAGES, "pipeline", "stages", "tune", "display", "dryrun", "index_commands"},
    "__main__": {"errors", "commands"},
    "cluster": {*BASE, "__main__"},  # `submit` checks a command with the command line's own parser
}
RAY = {
    "cluster/session.py",
    "cluster/submit.py",
    "serve/deployment.py",
    "tdro_ray/data/ingest.py",
    "tdro_ray/data/mine.py",
    "tdro_ray/data/ray_data.py",
    "tdro_ray/data/rescore.py",
    "tdro_ray/data/score.py",
    "tdro_ray/data/stream.py",
    "tdro_ray/evaluate/encode.py",
    "tdro_ray/index/build.py",
    "tdro_ray/train/ray_train.py",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "tdro_ray" else parts[0]


def imports(path: Path, top_level: bool = False) -> set[str]:
    """Dotted names that a file imports, `from a import b` as both a and a.b; with `top_level` only those run at import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def rooms_imported(path: Path) -> set[str]:
    rooms = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] in ("serve", "cluster"):
            rooms.add(parts[0])
        elif parts[0] == "tdro_ray" and len(parts) > 1 and not parts[1].startswith("__version"):
            rooms.add(parts[1])
    return rooms


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    room = room_of(path)
    if room == "__init__":
        assert not rooms_imported(path)
        return
    allowed = MAY_IMPORT[room] | {room}
    if room in ("commands", "__main__"):
        allowed |= {"serve", "cluster"}
    assert rooms_imported(path) <= allowed


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_marked_files_import_ray(path):
    has_ray = any(name == "ray" or name.startswith("ray.") for name in imports(path))
    if room_of(path) != "tune":
        assert has_ray == (name_of(path) in RAY)


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in ("dro", "retrieval")], ids=name_of)
def test_pure_rooms_import_only_numerics(path):
    third_party = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"tdro_ray"}
    assert third_party <= {"torch", "numpy", "pyarrow"}
    assert not any(name.startswith("torch.distributed") for name in imports(path))


def loaded_by(module: str, watched: tuple[str, ...], blocked: tuple[str, ...] = ()) -> set[str]:
    """Import a module in a fresh Python, in which `blocked` cannot be imported, and return which of `watched` came along."""
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import {module}
print(*[name for name in {watched!r} if sys.modules.get(name)])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


HEAVY = ("torch", "ray", "lance", "transformers", "faiss", "matplotlib", "scipy")


@pytest.mark.parametrize(
    "module", ["tdro_ray.__main__", "tdro_ray.config", "tdro_ray.commands", "tdro_ray.stages", "tdro_ray.display"]
)
def test_the_command_line_loads_nothing_heavy(module):
    assert not loaded_by(module, HEAVY)


def test_the_training_loop_runs_without_ray_and_lance():
    assert "torch" in loaded_by("tdro_ray.train.loop, tdro_ray.train.context", HEAVY, blocked=("ray", "lance"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_reads_the_environment_at_import(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_import = [n for n in tree.body if not isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    read = [
        n.lineno
        for top in at_import
        for n in ast.walk(top)
        if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv")
    ]
    assert not read
