"""The command line: quick to answer, and one clear message with exit code 2 for every mistake that needs no Ray to find."""

import json
import os
import re
import statistics
import subprocess
import sys
import time

import pytest

from tdro_ray.__main__ import STAGES, main, parser
from tdro_ray.recipe import recipe_names

COMMANDS = ["run", *STAGES, "tune", "serve", "export", "submit", "recipes", "versions", "merge"]


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run a command in a folder of its own; return (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TDRO_RUNS", str(tmp_path / "runs"))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)

    def run(*arguments):
        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as exit:  # argparse
            code = exit.code
        return code, *capsys.readouterr()

    yield run
    for name in set(os.environ) - set(before):  # settings that quieten libraries
        del os.environ[name]


def test_help_answers_in_a_blink():
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "tdro_ray", "--help"], capture_output=True, text=True, timeout=60)
        seconds.append(time.perf_counter() - began)
        assert done.returncode == 0 and "run" in done.stdout
    assert statistics.median(seconds) < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0 and out.startswith(f"usage: tdro {command}")
    assert command in parser().format_help()


def test_recipes_are_listed(cli):
    assert cli("recipes") == (0, "".join(f"{name}\n" for name in recipe_names()), "")


MISTAKES = {
    "recipe": (["run", "quikstart"], r"No recipe 'quikstart'\. Did you mean 'quickstart'"),
    "recipe file": (["run", "no/such.yaml"], r"no/such\.yaml cannot be read"),
    "key": (["run", "quickstart", "--set", "optimise.eta=1"], r"unknown key 'optimise'\. Did you mean 'optimize'"),
    "deep key": (["run", "quickstart", "--set", "optimize.eat=1"], r"Did you mean 'eta'"),
    "value": (["run", "quickstart", "--set", "optimize.eta=-1"], r"optimize\.eta: .*greater than 0"),
    "no equals sign": (["run", "quickstart", "--set", "seed"], r"--set takes key=value"),
    "too many workers": (["run", "quickstart", "--set", "scale.num_workers=4000"], r"4000 workers .* this machine has"),
    "missing source": (["ingest", "real", "--set", "data.sources=nowhere"], r"Source 'nowhere' does not exist"),
    "folder without tasks": (["ingest", "real", "--set", "data.sources=."], r"holds no task"),
    "unknown format": (["ingest", "real", "--set", "data.sources=notes.txt"], r"in no known format"),
    "mine before ingest": (["mine", "quickstart"], r"Stage ingest has not run\. Run `tdro ingest quickstart`"),
    "score before ingest": (["score", "quickstart"], r"Stage ingest has not run"),
    "finetune before ingest": (["finetune", "quickstart"], r"Stage ingest has not run"),
    "evaluate before ingest": (["evaluate", "quickstart"], r"tdro (run|ingest|reference) quickstart"),
    "index before evaluate": (["index", "quickstart"], r"tdro (run|ingest|evaluate) quickstart"),
    "serve before index": (["serve", "quickstart"], r"tdro (run|index) quickstart"),
    "export before training": (
        ["export", "quickstart", "--to", "out"],
        r"tdro (run|evaluate) quickstart|No trained model",
    ),
    "nothing to submit": (["submit"], r"takes a tdro command"),
    "a wrong command to submit": (["submit", "run", "quikstart"], r"Did you mean 'quickstart'"),
    "no cluster to submit to": (
        ["submit", "--address", "http://127.0.0.1:9", "recipes"],
        r"No Ray cluster answers at http://127\.0\.0\.1:9",
    ),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_clear_message_and_exit_code_2(cli, tmp_path, arguments, said):
    (tmp_path / "notes.txt").write_text("no rows here")
    code, out, err = cli(*arguments)
    assert code == 2, out + err
    assert re.search(said, err), err
    assert err.startswith("tdro: ") and len(err.splitlines()) == 1 and "Traceback" not in out + err
    half = [p for p in tmp_path.rglob("*") if p.name.startswith(".") or "tmp" in p.name]
    assert (
        not half
        and not list(tmp_path.glob("runs/*/stages/*/manifest.json"))
        and not list(tmp_path.glob("runs/*/store"))
    )


@pytest.mark.parametrize(
    "arguments", [["rum", "quickstart"], ["run"], [], ["run", "quickstart", "--sett", "a=b"], ["export", "quickstart"]]
)
def test_a_wrong_command_line_shows_the_usage(cli, arguments):
    code, _, err = cli(*arguments)
    assert code == 2 and "usage: tdro" in err and "Traceback" not in err


def test_a_wrong_command_names_the_valid_ones(cli):
    assert all(
        repr(command) in cli("rum", "quickstart")[2] or command in cli("rum", "quickstart")[2] for command in COMMANDS
    )


def test_an_interruption_is_said_and_exits_130(cli, monkeypatch):
    from tdro_ray import stages

    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "ingest", interrupted)
    code, _, err = cli("ingest", "quickstart")
    assert code == 130 and "the same command goes on" in err


def test_the_resolved_recipe_and_the_versions_are_kept(cli, tmp_path):
    cli("mine", "quickstart", "--set", "optimize.eta=0.125")
    folder = tmp_path / "runs" / "quickstart"
    assert json.loads((folder / "config.json").read_text())["optimize"]["eta"] == 0.125
    assert {"python", "torch", "ray", "tdro-ray"} <= set(json.loads((folder / "versions.json").read_text()))


def test_every_serving_setting_of_a_recipe_reaches_the_application():
    from serve.deployment import Args
    from tdro_ray.commands import _serve_options
    from tdro_ray.recipe import load_recipe

    changed = ("serve.cache_mb=7", "serve.threads=3", "serve.device=cuda", "index.device=cuda", "serve.port=0")
    options = _serve_options(load_recipe("quickstart", changed))
    place = {key: options.pop(key) for key in ("host", "port")}
    args = Args(model="m", **options)
    assert place == {"host": "127.0.0.1", "port": 0}
    assert (args.cache_mb, args.threads, args.device, args.index_device) == (7, 3, "cuda", "cuda")
