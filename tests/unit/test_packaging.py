"""The lock file is complete, plain and fits pyproject.toml."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def locked():
    lines = [
        line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert all(
        re.fullmatch(r"[a-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines
    )  # no hosts, paths, hashes, local versions
    return {name: Version(version) for name, version in (line.split("==") for line in lines)}


def test_the_lock_has_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(r for extra in ("cpu", "train", "serve", "dev") for r in extras[extra])]
    found = locked()
    for requirement in map(Requirement, asked):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in found, f"{name} is not locked: run `make lock`"
        assert requirement.specifier.contains(found[name], prereleases=True), (
            f"{name} {found[name]} is not {requirement.specifier}"
        )


def test_the_lock_is_for_a_cpu():
    assert not [name for name in locked() if name.startswith(("nvidia", "cuda", "triton", "faiss-gpu"))]
