"""Pairs of the symmetric task: two descriptions, by different hands, of one method or one parameter.

Each family of descriptions of the same thing gives one pair, since all of them would be right answers to each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import combinations

from tdro_ray.data.environment_files import held_out, stable_hash
from tdro_ray.data.environment_source import Record
from tdro_ray.data.environment_texts import QUERY_CHARS, clip, normalise

TASK = "py_paraphrases"
OVERLAP = (0.35, 0.8)  # shared share of all words: below, the two may mean different things; above, they are copies
FAMILY = 8  # members that are compared


def override_pairs(methods: Iterable[Record]) -> list[Record]:
    """Return (description of a method, description of the one it overrides), one pair for each family of overrides.

    A base class is looked up by its dotted name, then by its bare name where that is unique in the package. One pair
    for a family, since all descriptions in it would be right answers to each other.
    """
    by_name = {record.id.replace(":", "."): record for record in methods}
    by_class: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name in by_name:
        package, owner = name.partition(".")[0], name.rpartition(".")[0]
        by_class[package, owner.rpartition(".")[2]].add(owner)

    def overridden(record: Record) -> Record | None:
        for base in record.links:
            owners = by_class[record.group.partition(".")[0], base.rpartition(".")[2]]
            owner = next(iter(owners)) if len(owners) == 1 else base
            found = by_name.get(f"{base}.{record.passage}") or by_name.get(f"{owner}.{record.passage}")
            if found is not None and found is not record:
                return found
        return None

    families: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(by_name.values(), key=lambda r: r.id):
        base = root = overridden(record)
        if (
            base is None
            or held_out(base.group) != held_out(record.group)
            or normalise(base.query) == normalise(record.query)
        ):
            continue
        path = {record.id}
        while root is not None and root.id not in path:
            path.add(root.id)
            top, root = root, overridden(root)
        pair = record._replace(task=TASK, passage=base.query, docid=base.id, links=())
        families[top.id].append(pair)
    return [min(family, key=lambda r: (stable_hash(r.id), r.id)) for _, family in sorted(families.items())]


def parameter_pairs(parameters: Iterable[Record]) -> list[Record]:
    """Return (description of a parameter, another one) for parameters of one name in one package that share words."""
    families: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in parameters:
        name = record.id.rpartition(".")[2].partition("#")[0]
        families[record.group, name].append(record)
    return [pair for _, family in sorted(families.items()) for pair in _nearest_pair(family)]


def _nearest_pair(family: list[Record]) -> Iterator[Record]:
    members = sorted(family, key=lambda r: (stable_hash(r.id), r.id))[:FAMILY]
    words = {record.id: frozenset(normalise(record.passage).split()) for record in members}
    best, chosen = 0.0, None
    for first, second in combinations(members, 2):
        overlap = len(words[first.id] & words[second.id]) / len(words[first.id] | words[second.id])
        if OVERLAP[0] <= overlap <= OVERLAP[1] and overlap > best:
            best, chosen = overlap, (first, second)
    if chosen:
        first, second = chosen
        yield first._replace(
            task=TASK,
            query=clip(first.passage, QUERY_CHARS),
            passage=clip(second.passage, QUERY_CHARS),
            docid=second.id,
        )
