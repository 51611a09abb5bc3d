"""The commands that repeat a run: its recipe with the settings that differ from the shipped one."""

from __future__ import annotations

import json
import shlex
from typing import Any

import yaml

from tdro_ray.errors import ConfigError
from tdro_ray.recipe import load_recipe, recipe_names
from tdro_ray.report.collect import RunFacts

MOST_OPTIONS = 8  # changed settings above which a copied recipe reads better than a command


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
    if changed is not None and len(changed) <= MOST_OPTIONS:
        options = "".join(f" --set {shlex.quote(f'{key}={_value(value)}')}" for key, value in changed.items())
        recipe = shlex.quote(facts.name)
        again = [("run it again; stages that are up to date are not repeated", f"tdro run {recipe}{options}")]
    else:
        recipe, options = shlex.quote(f"{facts.name}-again.yaml"), ""
        source = shlex.quote(str(facts.folder / "config.json"))
        again = [
            ("the exact settings of this run as a recipe of your own (JSON is YAML)", f"cp {source} {recipe}"),
            ("run it again; stages that are up to date are not repeated", f"tdro run {recipe}"),
        ]
    return [
        *again,
        ("write this page again", f"tdro report {recipe}"),
        ("serve the index over HTTP", f"tdro serve {recipe}{options}"),
    ]


def _value(value: Any) -> str:
    """The value as `--set` reads it, which is YAML: JSON, or a bare string that YAML takes for itself."""
    if isinstance(value, str):
        try:
            return value if yaml.safe_load(value) == value else json.dumps(value)
        except yaml.YAMLError:
            pass
    return json.dumps(value)
