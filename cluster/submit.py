"""`tdro submit`: send a tdro command to a cluster as a Ray job and follow its log.

The job runs in a copy of the working directory, whose relative paths lead nowhere else: paths in the arguments are made
absolute, and run folders go to `$TDRO_RUNS`, a folder that the cluster must see too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from tdro_ray.config import runs_root
from tdro_ray.errors import ConfigError, ResourceError
from tdro_ray.recipe import load_recipe

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
LIMIT = 100 << 20  # bytes of a job's working directory that Ray takes
# In the syntax of .gitignore, names at any depth; Ray leaves out what .gitignore names as well.
EXCLUDES = [".venv", "venv", "runs", "stores", ".git", "tests", "*.lance", "*.egg-info", "__pycache__", ".*_cache"]
PATH_SETTINGS = ("data.store", "data.sources", "model.name", "evaluate.extra_tests", "weights", "compare")
PATH_OPTIONS = ("--model", "--index", "--to")
PATH_COMMANDS = ("merge", "versions")  # of an index folder
CHATTY = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)
ANSWER_SECONDS = 3.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def submit(arguments: list[str], address: str = "", follow: bool = True) -> int:
    """Run `tdro <arguments>` as a Ray job and return its exit code (0 at once where `follow` is False).

    `address` is the dashboard's URL; "" takes `$RAY_API_SERVER_ADDRESS`, then this machine's default. Raises ConfigError for
    a command that is not valid, before anything is sent, and ResourceError when no cluster takes the job.
    """
    arguments = check(arguments)
    folder = Path.cwd()
    check_size(folder)
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    client = connect(address)
    try:
        job = client.submit_job(
            entrypoint=f"python -m tdro_ray {shlex.join(arguments)}",
            submission_id=name_of(arguments),
            metadata={"job_name": f"tdro {shlex.join(arguments[:2])}"},
            runtime_env={"working_dir": str(folder), "excludes": EXCLUDES, "env_vars": environment()},
        )
    except (RuntimeError, ValueError) as err:
        raise ResourceError(f"The cluster at {address} did not take the job: {err}") from err
    print(f"Job {job} submitted to {address}. Run folders: {runs_root()}", flush=True)
    if not follow:
        print(f"Follow it with `ray job logs --follow {job}`, stop it with `ray job stop {job}`.")
        return 0
    try:
        return _follow(client, job)
    except KeyboardInterrupt:
        print(f"\ntdro: no longer following; the job goes on. `ray job stop {job}` ends it.", file=sys.stderr)
        return 130


def check(arguments: list[str]) -> list[str]:
    """Return the arguments as the job takes them, paths absolute. Raises ConfigError for what would fail there."""
    from tdro_ray.__main__ import parser

    arguments = arguments[1:] if arguments[:1] == ["--"] else arguments
    if not arguments or arguments[0] == "submit":
        raise ConfigError("tdro submit takes a tdro command, e.g. `tdro submit run quickstart`.")
    absolute = list(absolute_paths(arguments))
    parsed = parser().parse_args(absolute)
    if "recipe" in parsed:
        load_recipe(parsed.recipe, tuple(parsed.overrides))
    return absolute


def absolute_paths(arguments: list[str]) -> Iterator[str]:
    """Yield the arguments with the paths among them absolute: recipe files, index folders, values of --model and the like, path settings."""
    option = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if option in (*PATH_OPTIONS, *PATH_COMMANDS) or argument.endswith((".yaml", ".yml")):
            yield _absolute(argument)
        elif equals and name in PATH_OPTIONS:
            yield f"{name}={_absolute(value)}"
        elif option == "--set" and name in PATH_SETTINGS:
            yield f"{name}={_absolute_setting(name, value)}"
        elif name == "--set" and value.partition("=")[0] in PATH_SETTINGS:
            key, _, value = value.partition("=")
            yield f"--set={key}={_absolute_setting(key, value)}"
        else:
            yield argument
        option = argument


def _absolute_setting(key: str, value: str) -> str:
    found = yaml.safe_load(value)
    if isinstance(found, list):
        return "[" + ", ".join(_absolute(str(v), must_exist=True) for v in found) + "]"
    return _absolute(value, must_exist=key != "data.store")


def _absolute(value: str, must_exist: bool = False) -> str:
    """The path as seen from here; with `must_exist` a word that is no path here ("environment", a Hub id) stays itself."""
    path = Path(value).expanduser()
    return str(path.resolve()) if path.exists() or not must_exist else value


def environment() -> dict[str, str]:
    """Environment of the job: where run folders go, and this Python first on the PATH, which a node without it passes over."""
    # The job's PATH is that of the shell that ran `ray start`, in which the virtual environment need not be active.
    return {"TDRO_RUNS": str(runs_root()), "PATH": f"{Path(sys.executable).parent}:${{PATH}}"}


def name_of(arguments: list[str]) -> str:
    """A telling, unique name for the dashboard: command and recipe."""
    words = [Path(a).stem for a in arguments[:2] if not a.startswith("-")]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(["tdro", *words, secrets.token_hex(3)]))


def check_size(folder: Path) -> None:
    """Raise ConfigError when the folder is too large to be sent along, naming what is large in it."""
    sizes = {entry.name: sum(_sizes(entry, _patterns(folder))) for entry in folder.iterdir()}
    total = sum(sizes.values())
    if total <= LIMIT:
        return
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
    raise ConfigError(
        f"The working directory {folder} holds {total / 2**20:.0f} MiB, and a job takes at most {LIMIT >> 20} MiB along. Largest: "
        + ", ".join(f"{name} {sizes[name] / 2**20:.0f} MiB" for name in largest)
        + ". Move data out of it and name it by absolute path, put it into runs/ or stores/, or list it in .gitignore."
    )


def _patterns(folder: Path) -> list[str]:
    ignore = folder / ".gitignore"
    lines = ignore.read_text(encoding="utf-8", errors="replace").split() if ignore.is_file() else []
    return EXCLUDES + [p for line in lines if (p := line.strip("/")) and "/" not in p and p[0] not in "#!"]


def _sizes(path: Path, excludes: list[str]) -> Iterator[int]:
    if any(fnmatch(path.name, pattern) for pattern in excludes):
        return
    if path.is_symlink() or not path.is_dir():
        yield path.lstat().st_size
        return
    for entry in path.iterdir():
        yield from _sizes(entry, excludes)


def connect(address: str) -> Any:
    """Return the job client of the cluster at `address`. Raises ResourceError when it does not answer or refuses the token."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray's client puts the environment before its argument
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        url = urlsplit(address)  # Ray's client would wait without end for an address that answers nothing
        socket.create_connection((url.hostname or "", url.port or 80), timeout=ANSWER_SECONDS).close()
        return JobSubmissionClient(address, headers=token_headers())
    except AuthenticationError as err:
        have = "has the wrong token" if token_headers() else "has no token"
        raise ResourceError(
            f"The cluster at {address} asks for a token, and this user {have}. `ray get-auth-token` on the head node prints it: "
            "put it into ~/.ray/auth_token here, or set RAY_AUTH_TOKEN."
        ) from err
    except (OSError, RuntimeError, ValueError) as err:  # of the socket, of requests, of Ray
        raise ResourceError(
            f"No Ray cluster answers at {address}: {err} Start one with `ray start --head` (token first: "
            "`ray get-auth-token --generate`), or give its dashboard address by --address or RAY_API_SERVER_ADDRESS."
        ) from err


def token_headers() -> dict[str, str]:
    """The header with this user's token, looked up where Ray does; {} without one or with RAY_AUTH_MODE=disabled."""
    # Ray's client sends it by itself only under RAY_AUTH_MODE=token, and is refused without saying so.
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        token = path.read_text(encoding="utf-8") if path.is_file() else ""
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}


def _follow(client: Any, job: str) -> int:
    """Print the job's log as it grows and return its exit code."""
    import aiohttp

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    try:
        asyncio.run(tail())
    except (aiohttp.ClientError, RuntimeError) as err:  # the job itself may well go on
        print(f"tdro: the log broke off ({err}); waiting for the job to end", file=sys.stderr)
    info = client.get_job_info(job)
    while info.status not in ENDED:
        time.sleep(1)
        info = client.get_job_info(job)
    if info.status == "SUCCEEDED":
        return 0
    print(f"tdro: job {job} {str(info.status).lower()}: {info.message}", file=sys.stderr)
    return info.driver_exit_code or 1
