"""Where sources lie: a local path, or a file or folder of an object store by its URL, both used like a `pathlib.Path`.

`s3://`, `gs://`, `abfs://` and `hdfs://` go through pyarrow's own filesystems, any other URL through fsspec, where the
package for it is installed. A folder is listed once for each `place(…)`, however often its entries are asked for.
"""

from __future__ import annotations

import gzip
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from tdro_ray.errors import DataError

READ_BYTES = 4 << 20  # of one request while a remote file is read from its beginning to its end
GCS_SECONDS = 30  # after which an unreachable Google service counts as such; the client's own limit is 15 minutes
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Entry(NamedTuple):
    """What a listing says of a file or folder."""

    is_dir: bool
    size: int
    stamp: str  # changes when the file does


@dataclass(frozen=True)
class _Source:
    """One `place(…)`: the filesystem, its path there, and the folders listed so far."""

    filesystem: Any
    path: str
    quoted: bool  # names in its URLs are percent-encoded
    listings: dict[str, dict[str, Entry]] = field(default_factory=dict)


class RemotePath:
    """A file or folder of another filesystem: the part of `pathlib.Path` that reading needs. `str()` gives its URL."""

    def __init__(self, url: str, path: str, source: _Source) -> None:
        self.url, self._path, self._source = url, path, source

    def __str__(self) -> str:
        return self.url

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __lt__(self, other: RemotePath) -> bool:
        return self.url < other.url

    def __truediv__(self, name: str) -> RemotePath:
        base, mark, options = self.url.partition("?")
        shown = quote(name) if self._source.quoted else name
        return RemotePath(f"{base.rstrip('/')}/{shown}{mark}{options}", f"{self._path}/{name}", self._source)

    @property
    def parent(self) -> RemotePath:
        base, mark, options = self.url.partition("?")
        url = f"{base.rstrip('/').rpartition('/')[0]}{mark}{options}"
        return RemotePath(url, self._path.rpartition("/")[0], self._source)

    @property
    def name(self) -> str:
        return self._path.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def resolve(self) -> RemotePath:
        """Return itself: a URL is absolute."""
        return self

    def exists(self) -> bool:
        return self.entry() is not None

    def is_file(self) -> bool:
        entry = self.entry()
        return entry is not None and not entry.is_dir

    def is_dir(self) -> bool:
        entry = self.entry()
        return entry is not None and entry.is_dir

    def iterdir(self) -> Iterator[RemotePath]:
        return (self / name for name in self._entries())

    def open(self, mode: str = "rb", encoding: str = "utf-8") -> Any:
        """Open for reading from its beginning to its end, in few requests."""
        file = io.BufferedReader(self.open_anywhere(), READ_BYTES)
        return file if "b" in mode else io.TextIOWrapper(file, encoding)

    def open_anywhere(self) -> Any:
        """Open for reading at any place of it."""
        with explained(self.url):
            return self._source.filesystem.open_input_file(self._path)

    def read_text(self, encoding: str = "utf-8") -> str:
        with explained(self.url), self.open("r", encoding) as file:
            return str(file.read())

    def entry(self) -> Entry | None:
        """Return what the filesystem says of it, None where there is nothing."""
        if self._path.startswith(f"{self._source.path}/"):  # below the source: the folder's listing tells
            return self.parent._entries().get(self.name)
        with explained(self.url):
            return self._entry_of(self._source.filesystem.get_file_info(self._path))

    def _entries(self) -> dict[str, Entry]:
        from pyarrow import fs

        listings = self._source.listings
        if self._path not in listings:
            with explained(self.url):
                infos = self._source.filesystem.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
            found = {info.base_name: self._entry_of(info) for info in sorted(infos, key=lambda info: info.path)}
            listings[self._path] = {name: entry for name, entry in found.items() if name and entry is not None}
        return listings[self._path]

    def _entry_of(self, info: Any) -> Entry | None:
        from pyarrow import fs

        if info.type == fs.FileType.NotFound:
            return None
        if info.type == fs.FileType.Directory:
            return Entry(True, 0, "")
        stamp = str(info.mtime_ns or "")
        if not stamp and isinstance(self._source.filesystem, fs.PyFileSystem):
            stamp = str(self._source.filesystem.handler.fs.ukey(info.path))  # ETag and the like, by its own names
        return Entry(False, int(info.size or 0), stamp)


Place = Path | RemotePath


def is_url(text: str) -> bool:
    """Return whether a source is a URL rather than a path of this machine."""
    return bool(_URL.match(text)) and not text.startswith("file://")


def place(text: str | Path) -> Place:
    """Return the file or folder that a path or URL names, whether it is there or not.

    Raises DataError for a URL that no installed filesystem reads, and where its service refuses to say.
    """
    text = str(text)
    if not is_url(text):
        return Path(text.removeprefix("file://")).expanduser()
    from pyarrow import fs

    if re.match(r"[^/]+://[^/@]*:[^/@]*@", text):
        raise DataError(
            f"The source {text.partition('://')[0]}://…@… holds a password. Take it out, and give it in the environment: {_variables(text)}."
        )
    asked = quote(text, safe="%:/?&=@#+,;!$'()*[]~")
    if text.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in text:
        asked += f"{'&' if '?' in text else '?'}retry_limit_seconds={GCS_SECONDS}"
    quoted = True
    with explained(text):
        try:
            filesystem, path = _s3(asked) if asked.startswith("s3://") else fs.FileSystem.from_uri(asked)
        except ValueError as err:  # ArrowInvalid: a scheme that pyarrow does not know, or a wrong option of one
            if "nrecognized filesystem type" not in str(err):
                raise
            import fsspec

            found, path = fsspec.core.url_to_fs(text)
            filesystem, quoted = fs.PyFileSystem(fs.FSSpecHandler(found)), False
    return RemotePath(text, path.rstrip("/"), _Source(filesystem, path.rstrip("/"), quoted))


def _s3(url: str) -> tuple[Any, str]:
    """Return pyarrow's S3 filesystem and the path there. It gives up on a silent service after some seconds; the one that
    `from_uri` makes takes minutes. `s3://anonymous@bucket` sends no credentials, as for `gs://`."""
    from pyarrow import fs

    parts = urlsplit(url)
    filesystem, path = fs.FileSystem.from_uri(url.replace("://anonymous@", "://", 1))
    options = dict(parse_qsl(parts.query))
    if options.keys() <= {"region", "scheme", "endpoint_override"} and parts.username in (None, "anonymous"):
        service = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        options = {"region": filesystem.region, **({"endpoint_override": service} if service else {}), **options}
        filesystem = fs.S3FileSystem(**options, anonymous=parts.username == "anonymous")
    return filesystem, path


def name_in(text: str) -> str:
    """Return the file name in what `str()` of a place, or of a hub dataset, gives."""
    if _URL.match(text) or text.startswith("hf:"):
        text = unquote(text.partition("?")[0])
    return Path(text).name


def files_under(folder: Place) -> list[Place]:
    """Return every file under a folder, in name order."""
    found: list[Place] = []
    for entry in sorted(folder.iterdir()):
        found += files_under(entry) if entry.is_dir() else [entry]
    return found


def stamp(file: Place) -> list[Any]:
    """Return name, size and time of change (or ETag) of a file: what differs when the file was written again."""
    if isinstance(file, RemotePath):
        entry = file.entry() or Entry(False, 0, "")
        return [str(file), entry.size, entry.stamp]
    status = file.stat()
    return [str(file), status.st_size, status.st_mtime_ns]


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what a filesystem raises into a DataError that says what to do."""
    import pyarrow as pa

    try:
        yield
    except (OSError, ValueError, ImportError, pa.ArrowException) as err:
        raise DataError(remote_message(url, err)) from err


def remote_message(url: str, err: BaseException) -> str:
    """Return what to tell the user of an error at a URL."""
    reason = " ".join(str(err).split())[:300] or type(err).__name__
    return (
        f"{url} cannot be read: {reason.rstrip('.')}. Check bucket, path and network; credentials and service come from the "
        f"environment of every node that reads: {_variables(url)}."
    )


def _variables(url: str) -> str:
    scheme = url.partition("://")[0].lower()
    if scheme in ("s3", "s3a"):
        return (
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), AWS_DEFAULT_REGION, and AWS_ENDPOINT_URL for "
            "another service than Amazon's; s3://anonymous@bucket/… for a public bucket"
        )
    if scheme in ("gs", "gcs"):
        return "GOOGLE_APPLICATION_CREDENTIALS (a key file), or gs://anonymous@bucket/… for a public bucket"
    if scheme in ("abfs", "abfss"):
        return "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or an Azure login"
    return f"what fsspec's filesystem for {scheme}:// asks for"


def open_stream(path: Place) -> BinaryIO:
    """Open a file for reading bytes, decompressed by its ending (`.gz`, `.zst`)."""
    raw = path.open("rb")
    stream = decompressed(path, raw)
    if isinstance(stream, gzip.GzipFile):
        stream.myfileobj = raw  # closed with it
    return stream


def decompressed(path: Place, raw: Any) -> Any:
    """Return the bytes of `raw`, an opened `path`, decompressed by the path's ending."""
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".zst":
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return raw


def open_anywhere(path: Place) -> BinaryIO:
    """Open a file for reading at any place of it."""
    return path.open("rb") if isinstance(path, Path) else path.open_anywhere()


def first_existing(folder: Place, name: str) -> Place | None:
    """Return `folder/name`, or its `.gz` or `.zst` form, whichever is there first."""
    return next((p for end in ("", ".gz", ".zst") if (p := folder / (name + end)).is_file()), None)


def plain_suffix(path: Place) -> str:
    """Return the ending of a file name without its compression."""
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix
