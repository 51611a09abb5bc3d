"""`tdro versions` and `tdro merge`: what an operator does to an index folder, by itself, without a recipe, Ray or a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from tdro_ray.display import table


def versions(arguments: argparse.Namespace) -> int:
    """Select, snapshot or restore where asked to, then print what there is."""
    from tdro_ray.index import snapshots
    from tdro_ray.index import versions as kept

    folder = Path(arguments.folder)
    kept.current(folder)  # no index is said before anything is written
    if arguments.select:
        kept.select(folder, arguments.select)
        print(f"Version {arguments.select} is current; running servers follow within 2 seconds.")
    elif arguments.snapshot:
        made = snapshots.snapshot(folder, arguments.snapshot)
        print(f"Snapshot {arguments.snapshot}: {made['documents']:,} documents, all changes included.")
    elif arguments.restore:
        made = snapshots.restore(folder, arguments.restore)
        print(
            f"Version {made['version']} is current, with the {made['documents']:,} documents of snapshot {arguments.restore}. "
            "What was written after the snapshot is no longer searched."
        )
    print(_listing(folder))
    return 0


def merge(arguments: argparse.Namespace) -> int:
    """Merge the changes of an index folder into a new version."""
    from tdro_ray.index import versions as kept
    from tdro_ray.index.merge import merge

    folder = Path(arguments.folder)
    made = merge(folder)
    if made is None:
        print(f"Version {kept.current(folder).name} has merged all changes.")
    else:
        print(
            f"Version {made['version']}: {made['documents']:,} documents, recall@10 {made['recall@10']}, {made['seconds']} s."
        )
    return 0


def _listing(folder: Path) -> str:
    from tdro_ray.index import snapshots
    from tdro_ray.index.changes import ChangeLog

    last = ChangeLog(folder).last_seq()
    rows = [["name", "documents", "factory", "recall@10", "changes since", "created"]]
    for made in snapshots.listing(folder):
        since = f"{last - made.get('merged_seq', 0):,}" if made["kind"] == "version" else "-"
        name = f"{made['name']}{' (current)' if made['current'] else ''}{' (snapshot)' if made['kind'] == 'snapshot' else ''}"
        created = made.get("created", "")
        rows.append([name, f"{made['documents']:,}", made["factory"], f"{made['recall@10']:.3f}", since, created])
    return table(rows)
