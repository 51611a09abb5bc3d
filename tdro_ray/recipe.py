"""A recipe from its file: defaults < recipe file < ``--set a.b=c``. Unknown keys are refused with the nearest valid ones.

Imports neither torch nor Ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tdro_ray.config import Recipe
from tdro_ray.errors import ConfigError, nearest

RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Return the recipe of that name or file with ``a.b=c`` overrides applied.

    Raises ConfigError for an unknown recipe, an unknown key (with the nearest valid ones) or a bad value.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_path}.yaml"
        if not path.exists():
            raise ConfigError(
                f"No recipe {name_or_path!r}.{nearest(name_or_path, recipe_names())} A path to a .yaml file works too."
            )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(
            f"Recipe file {path} cannot be read: {err.strerror}. Shipped recipes: {', '.join(recipe_names())}."
        ) from err
    except yaml.YAMLError as err:
        raise ConfigError(f"Recipe file {path} is not valid YAML: {err}") from err
    if not isinstance(raw, dict):
        raise ConfigError(f"Recipe file {path} must hold a mapping, it holds {type(raw).__name__}.")
    raw = _unshared(raw)
    raw.setdefault("name", path.stem)
    for item in overrides:
        _apply(raw, item)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as err:
        raise ConfigError(_explain(err, path)) from err


def _unshared(value: Any) -> Any:
    """A copy in which YAML aliases are mappings of their own: setting `finetune.steps` must not set `reference.steps`."""
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value


def _apply(raw: dict[str, Any], item: str) -> None:
    key, equals, value = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes key=value, e.g. --set optimize.eta=0.01; got {item!r}.")
    *parents, last = key.strip().split(".")
    node = raw
    for part in parents:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: {part!r} holds {child!r}, which has no fields.")
        node = child
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as err:
        raise ConfigError(f"--set {key}: {value!r} is not a valid YAML value: {err}") from err


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    """Field names of the settings model that holds the last element of `location`."""
    model: Any = Recipe
    for part in location[:-1]:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            continue
        options = [field.annotation, *get_args(field.annotation)]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), model)
    return list(model.model_fields)


def _explain(err: ValidationError, path: Path) -> str:
    lines = []
    for e in err.errors():
        where = ".".join(str(p) for p in e["loc"]) or "the recipe"
        if e["type"] == "extra_forbidden":
            lines.append(f"unknown key {where!r}.{nearest(str(e['loc'][-1]), _fields_at(e['loc']))}")
        else:
            lines.append(f"{where}: {e['msg'].removeprefix('Value error, ')} (got {e['input']!r:.120})")
    return f"Recipe {path.stem!r} is not valid: " + "; ".join(lines)
