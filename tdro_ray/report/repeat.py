"""The commands that repeat a run: its recipe with the settings that differ from the shipped one."""

from __future__ import annotations

import json
import shlex
from typing import Any

import yaml

from tdro_ray.config import load_recipe, recipe_names
from tdro_ray.errors import ConfigError
from tdro_ray.report.collect import RunFacts


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"a.b": value}` of nested settings; empty mappings stay as values."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changed_settings(facts: RunFacts) -> dict[str, Any] | None:
    """Return the settings of the run that differ from the shipped recipe of its name; None where there is no such recipe."""
    if facts.name not in recipe_names():
        return None
    try:
        shipped = flatten(load_recipe(facts.name).model_dump(mode="json"))
    except ConfigError:
        return None
    return {key: value for key, value in flatten(facts.config).items() if key not in shipped or shipped[key] != value}


def commands(facts: RunFacts) -> list[tuple[str, str]]:
    """Return (what it does, command) of the ways to repeat the run and to go on with it."""
    if not facts.config:
        return []
    changed = changed_settings(facts)
    saved = f"{facts.name}-again.yaml"
    again = [
        ("the exact settings of this run, as a recipe of your own (JSON is YAML)", f"cp {shlex.quote(str(facts.folder / 'config.json'))} {shlex.quote(saved)}"),
        ("run it", f"tdro run {shlex.quote(saved)}"),
    ]  # fmt: skip
    if changed is not None:
        options = "".join(f" --set {shlex.quote(f'{key}={_value(value)}')}" for key, value in changed.items())
        again = [
            (
                "run it again; stages that are up to date are not repeated",
                f"tdro run {shlex.quote(facts.name)}{options}",
            )
        ]
        saved = facts.name + options
    else:
        saved = shlex.quote(saved)
    return [
        *again,
        ("this page from the run folder", f"tdro report {saved}"),
        ("serve the index over HTTP", f"tdro serve {saved}"),
    ]


def _value(value: Any) -> str:
    """The value as `--set` reads it, which is YAML: JSON, or a bare string that YAML takes for itself."""
    if isinstance(value, str):
        try:
            return value if yaml.safe_load(value) == value else json.dumps(value)
        except yaml.YAMLError:
            pass
    return json.dumps(value)
