"""Filters over documents: from the JSON form that users write to Lance SQL, or to a test of one document in memory.
Knows nothing of Lance or HTTP.

    {"task": "nq"}                                  equal
    {"year": {"gte": 2000, "lt": 2010}}             range: gt, gte, lt, lte
    {"id": {"in": ["a", "b"]}}                      one of; also {"eq": …} and {"ne": …}
    {"and": [F, …]}  {"or": [F, …]}  {"not": F}     logic; several keys in one object mean `and`

Every condition is true or false, never unknown: a document without the field satisfies `ne` and `not`, and
`{"field": null}` finds it.
"""

from __future__ import annotations

import math
import operator as op
from collections.abc import Callable
from typing import Any

from tdro_ray.errors import DataError, nearest

MAX_DEPTH = 16  # nested and / or / not
MAX_VALUES = 10_000  # conditions and listed values of one filter
COMPARISONS = {"eq": "=", "ne": "=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
OPERATORS = (*COMPARISONS, "in")
LOGIC = ("and", "or", "not")
TYPES = {"string": "a string", "int64": "an integer", "double": "a number", "bool": "true or false"}


class FilterError(DataError):
    """A filter names an unknown field or operator, compares with a wrong type, or cannot be applied."""


def to_sql(filter: dict[str, Any], fields: dict[str, str], column: Callable[[str], str]) -> str:
    """Return the SQL condition of `filter`.

    `fields` maps each field that may be used to its type (a key of `TYPES`), `column` a field to its column.
    Raises FilterError that names the offending part and what is valid.
    """
    return _Compiler(fields, column).node(filter, 0)


def predicate(filter: dict[str, Any], fields: dict[str, str]) -> Callable[[dict[str, Any]], bool]:
    """Return a test of ``{"id", "metadata", …}`` documents that agrees with `to_sql` over their columns.

    `filter` must be one that `to_sql` takes: it is not checked again.
    """
    tests = [
        _logic(key, value, fields) if key in LOGIC else _conditions(key, value, fields) for key, value in filter.items()
    ]
    return tests[0] if len(tests) == 1 else lambda document: all(test(document) for test in tests)


def fitting(value: Any, kind: str) -> Any:
    """Return a metadata value as a column of type `kind` holds it; None (null) where it does not fit."""
    if isinstance(value, bool) or kind == "bool":
        return value if isinstance(value, bool) and kind == "bool" else None
    if kind == "double":
        if not isinstance(value, int | float) or (isinstance(value, int) and abs(value) >= 2**1023):
            return None
        return float(value) + 0.0  # no negative zero, which SQL would tell from zero
    if kind == "int64":
        return value if isinstance(value, int) and -(2**63) < value < 2**63 else None
    return value if isinstance(value, str) else None


def _logic(key: str, value: Any, fields: dict[str, str]) -> Callable[[dict[str, Any]], bool]:
    if key == "not":
        test = predicate(value, fields)
        return lambda document: not test(document)
    tests = [predicate(child, fields) for child in value]
    join = any if key == "or" else all
    return lambda document: join(test(document) for test in tests)


def _conditions(name: str, value: Any, fields: dict[str, str]) -> Callable[[dict[str, Any]], bool]:
    kind = fields[name]
    conditions = [_condition(o, v, kind) for o, v in (value if isinstance(value, dict) else {"eq": value}).items()]

    def test(document: dict[str, Any]) -> bool:
        held = document["id"] if name == "id" else fitting(document["metadata"].get(name), kind)
        return all(condition(held) for condition in conditions)

    return test


def _condition(operator: str, operand: Any, kind: str) -> Callable[[Any], bool]:
    if operator == "in":
        values = frozenset(fitting(v, kind) for v in operand)
        return lambda held: held is not None and held in values
    operand = fitting(operand, kind)
    if operator == "eq":
        return lambda held: held == operand
    if operator == "ne":
        return lambda held: held != operand
    compare = {"gt": op.gt, "gte": op.ge, "lt": op.lt, "lte": op.le}[operator]
    return lambda held: held is not None and compare(held, operand)


class _Compiler:
    def __init__(self, fields: dict[str, str], column: Callable[[str], str]) -> None:
        self.fields, self.column, self.values = fields, column, 0

    def node(self, node: Any, depth: int) -> str:
        if depth > MAX_DEPTH:
            raise FilterError(
                f"The filter is nested deeper than {MAX_DEPTH} levels; join the conditions into flat lists."
            )
        if not isinstance(node, dict) or not node:
            raise FilterError(
                f"A filter must be an object with at least one field or one of {', '.join(LOGIC)}; got {_show(node)}."
            )
        parts = [
            self.logic(key, value, depth) if key in LOGIC else self.field(key, value) for key, value in node.items()
        ]
        return parts[0] if len(parts) == 1 else "(" + " AND ".join(parts) + ")"

    def logic(self, key: str, value: Any, depth: int) -> str:
        if key == "not":
            return f"(NOT {self.node(value, depth + 1)})"
        if not isinstance(value, list) or not value:
            raise FilterError(f"{key!r} takes a list of at least one filter; got {_show(value)}.")
        return "(" + f" {key.upper()} ".join(self.node(child, depth + 1) for child in value) + ")"

    def field(self, name: str, value: Any) -> str:
        if name not in self.fields:
            raise FilterError(f"Unknown filter field {_show(name)}.{nearest(name[:64], (*self.fields, *LOGIC))}")
        if not isinstance(value, dict):
            return self.compare(name, "eq", value)
        if not value:
            raise FilterError(f"The filter on {name!r} is empty; give one of {', '.join(OPERATORS)}.")
        parts = [self.compare(name, operator, operand) for operator, operand in value.items()]
        return parts[0] if len(parts) == 1 else "(" + " AND ".join(parts) + ")"

    def compare(self, name: str, operator: str, value: Any) -> str:
        column = f"`{self.column(name)}`"
        if operator == "in":
            if not isinstance(value, list) or not value:
                raise FilterError(f"'in' on {name!r} takes a list of at least one value; got {_show(value)}.")
            return f"({column} IS NOT NULL AND {column} IN ({', '.join(self.literal(name, v) for v in value)}))"
        if operator not in COMPARISONS:
            raise FilterError(
                f"Unknown filter operator {_show(operator)} on {name!r}.{nearest(operator[:64], OPERATORS)}"
            )
        if value is None and operator in ("eq", "ne"):
            return f"({column} IS {'NOT ' if operator == 'ne' else ''}NULL)"
        # Without the null check a missing field would make `NOT (…)` unknown, and so drop the document.
        condition = f"({column} IS NOT NULL AND {column} {COMPARISONS[operator]} {self.literal(name, value)})"
        return f"(NOT {condition})" if operator == "ne" else condition

    def literal(self, name: str, value: Any) -> str:
        self.values += 1
        if self.values > MAX_VALUES:
            raise FilterError(f"The filter holds more than {MAX_VALUES} values; send fewer.")
        text = literal(value, self.fields[name])
        if text is None:
            raise FilterError(f"Field {name!r} compares with {TYPES[self.fields[name]]}; got {_show(value)}.")
        return text


def literal(value: Any, kind: str) -> str | None:
    """SQL literal of `value` for a column of type `kind`, or None where it does not fit."""
    if kind == "bool":
        return str(value).lower() if isinstance(value, bool) else None
    if isinstance(value, bool):
        return None
    if kind == "string" and isinstance(value, str) and is_unicode(value):
        return "'" + value.replace("'", "''") + "'"
    if kind == "int64" and isinstance(value, int) and -(2**63) < value < 2**63:
        return str(value)
    if kind == "double" and isinstance(value, int | float):
        fits = abs(value) < 2**1023 if isinstance(value, int) else math.isfinite(value)
        return f"CAST('{float(value) + 0.0!r}' AS DOUBLE)" if fits else None
    return None


def is_unicode(text: str) -> bool:
    """True where `text` can be written as UTF-8, false where it holds a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _show(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**30:  # printing an enormous integer is refused by Python itself
        return "an integer of more than 30 digits"
    return f"{value!r:.80}"
