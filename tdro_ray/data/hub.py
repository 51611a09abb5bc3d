"""A Hugging Face dataset as a source of rows: `hf:NAME?config=…&split=…&revision=…`, read as a stream by the `datasets` library.

NAME is a hub id (`org/name`) or a folder that `datasets.load_dataset` takes. Credentials and hosts are the library's own
environment variables: HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any
from urllib.parse import parse_qsl, urlencode

from tdro_ray.errors import DataError, nearest

PREFIX = "hf:"


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset; `str()` gives the source that names it."""

    path: str  # hub id or folder
    config: str = ""  # also called subset; "" takes the default one
    split: str = "train"
    revision: str = ""  # branch, tag or commit; "" takes the newest

    def __str__(self) -> str:
        given = {name: value for name, value in asdict(self).items() if name != "path" and value}
        if self.split == "train":
            del given["split"]
        return PREFIX + self.path + (f"?{urlencode(given)}" if given else "")

    @property
    def name(self) -> str:
        """What a task of it is called: the dataset's name, configuration, and split where it is not `train`."""
        parts = [self.path.rstrip("/").rpartition("/")[2], self.config, self.split if self.split != "train" else ""]
        return "-".join(part for part in parts if part)

    @classmethod
    def parse(cls, source: str) -> HubDataset:
        """Return what `hf:NAME?config=…` names. Raises DataError for an option that there is not."""
        path, _, options = source.removeprefix(PREFIX).partition("?")
        given = dict(parse_qsl(options, keep_blank_values=True))
        valid = ("config", "split", "revision")
        for key in given:
            if key not in valid:
                raise DataError(f"Source {source!r}: no option {key!r}.{nearest(key, valid)}")
        if not path.strip("/"):
            raise DataError(
                f"Source {source!r} names no dataset. Write hf:org/name, or hf:org/name?config=…&split=train&revision=…."
            )
        return cls(path, **given)

    def fingerprint(self) -> str:
        """Return a key that changes when the dataset does: the revision's commit on the hub, times of change in a folder."""
        builder = self._builder()
        files = builder.config.data_files or {}
        origin = [[str(f) for f in files.get(self.split, ())], getattr(files.get(self.split), "origin_metadata", None)]
        parts = [str(self), builder.hash, str(builder.info.version), origin]
        return blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()

    def rows(self) -> int | None:
        """Return the number of rows where the dataset's card says it."""
        found = (self._builder().info.splits or {}).get(self.split)
        return found.num_examples or None if found else None

    def batches(self, size: int) -> Iterator[list[dict[str, Any]]]:
        """Yield the records of the split in its order, `size` at a time; only these are in memory."""
        with self._explained():
            rows = _library(self).load_dataset(
                self.path, self.config or None, split=self.split, revision=self.revision or None, streaming=True
            )
            for batch in rows.iter(batch_size=size):
                names = list(batch)
                yield [dict(zip(names, values)) for values in zip(*batch.values())]

    def _builder(self) -> Any:
        with self._explained():
            return _library(self).load_dataset_builder(self.path, self.config or None, revision=self.revision or None)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except Exception as err:  # datasets, huggingface_hub, fsspec and httpx each raise their own kinds
            reason = " ".join(str(err).split())[:400] or type(err).__name__
            raise DataError(
                f"Source {str(self)!r} cannot be read: {type(err).__name__}: {reason.rstrip('.')}. Check name, config, split and revision; "
                f"without a way to the hub give a folder (hf:/FOLDER, or plain FOLDER) or download it first and set HF_HUB_OFFLINE=1; "
                f"a private dataset needs HF_TOKEN in the environment of every node."
            ) from err


def _library(dataset: HubDataset) -> Any:
    try:
        import datasets
    except ImportError as err:
        raise DataError(
            f"Source {str(dataset)!r} needs the datasets library on every node: pip install 'tdro-ray[hf]'."
        ) from err
    return datasets
