"""What `tdro submit` makes of a command before it is sent: paths, names, the token."""

from pathlib import Path

import pytest

from cluster import submit
from tdro_ray.errors import ConfigError


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("run quickstart --set seed=3", "run quickstart --set seed=3"),
        ("-- run quickstart", "run quickstart"),
        ("run mine.yaml", "run {here}/mine.yaml"),
        ("run quickstart --set data.sources=data", "run quickstart --set data.sources={here}/data"),
        ("run quickstart --set=data.sources=../{name}/data", "run quickstart --set=data.sources={here}/data"),
        ("run quickstart --set data.sources=environment", "run quickstart --set data.sources=environment"),
        (
            "run quickstart --set data.sources=[data,environment]",
            "run quickstart --set data.sources=[{here}/data, environment]",
        ),
        (
            "run quickstart --set data.sources=[s3://bucket/data,hf:org/name,data]",
            "run quickstart --set data.sources=[s3://bucket/data, hf:org/name, {here}/data]",
        ),
        (
            "run quickstart --set evaluate.extra_tests=[gs://b/t]",
            "run quickstart --set evaluate.extra_tests=[gs://b/t]",
        ),
        ("run quickstart --set data.store=new", "run quickstart --set data.store={here}/new"),
        ("run quickstart --set model.name=org/model", "run quickstart --set model.name=org/model"),
        ("run quickstart --set model.name=/abs/model", "run quickstart --set model.name=/abs/model"),
        ("merge data", "merge {here}/data"),
        ("versions data --select 2", "versions {here}/data --select 2"),
        ("export quickstart --to out", "export quickstart --to {here}/out"),
        ("serve quickstart --index=data", "serve quickstart --index={here}/data"),
    ],
)
def test_paths_are_as_seen_from_here(here, given, sent):
    given, sent = (text.format(here=here, name=here.name) for text in (given, sent))
    assert " ".join(submit.check(given.split())) == sent


@pytest.mark.parametrize("arguments", [[], ["--"], ["submit", "run", "quickstart"]])
def test_no_command_is_refused(arguments):
    with pytest.raises(ConfigError, match="takes a tdro command"):
        submit.check(arguments)


def test_names_are_telling_and_differ():
    names = {submit.name_of(["run", "/a b/mine.yaml", "--set", "x=1"]) for _ in range(3)}
    assert len(names) == 3 and all(name.startswith("tdro-run-mine-") for name in names)


def test_the_token_is_looked_up_where_ray_does(here, monkeypatch):
    assert submit.token_headers() == {}
    (here / ".ray").mkdir()
    (here / ".ray" / "auth_token").write_text("from-home\n")
    assert submit.token_headers() == {"Authorization": "Bearer from-home"}
    (here / "other").write_text("from-path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(here / "other"))
    assert submit.token_headers() == {"Authorization": "Bearer from-path"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from-environment")
    assert submit.token_headers() == {"Authorization": "Bearer from-environment"}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert submit.token_headers() == {}


def test_only_what_is_sent_counts_for_its_size(here):
    for name in ("runs/r", ".venv/lib", "stores/s", "deep/rows.lance", "ignored"):
        (here / name).mkdir(parents=True)
        with (here / name / "big").open("wb") as file:
            file.truncate(submit.LIMIT + 1)
    (here / ".gitignore").write_text("# comment\n/ignored/\n!kept\n")
    submit.check_size(here)
    with (here / "data" / "big").open("wb") as file:
        file.truncate(submit.LIMIT)
    with pytest.raises(ConfigError, match=r"100 MiB, and a job takes at most 100 MiB along\. Largest: data 100 MiB"):
        submit.check_size(here)


def test_runs_go_to_this_machines_folder(here, monkeypatch):
    monkeypatch.delenv("TDRO_RUNS", raising=False)
    assert submit.environment()["TDRO_RUNS"] == str(here / "runs")
    assert Path(submit.environment()["PATH"].partition(":")[0]).is_dir()
