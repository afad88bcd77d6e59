"""The object store of a mirror, accessed through fsspec. No other module uses fsspec.

Each operation handles a complete object. One operation decides which server owns a run: `create` writes an
object only if no object has its name, so at most one of two writers succeeds.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

from maskwire_server.errors import ConfigError, StoreError
from maskwire_server.journal.fsync import flush_folder, make_folder

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
CONDITIONAL = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "file")
"""Protocols whose stores can create an object on condition that it does not exist, atomically."""
_S3_OPTIONS = {
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 0}},
}
_AT_ONCE = 64
"""How many objects are read in parallel."""


class ObjectStore:
    """The objects below one address. Methods raise StoreError if the store fails or refuses a call."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._protocol, _, self._root = self.address.partition("://")
        if self._protocol not in CONDITIONAL:
            raise ConfigError(
                f"storage.mirror: {self._protocol}:// has no conditional create, so two servers could write "
                f"the same run; use one of {', '.join(CONDITIONAL)}, got {address!r}"
            )
        try:
            import fsspec

            self._class = fsspec.get_filesystem_class(self._protocol)
        except ImportError as error:
            raise ConfigError(
                f"storage.mirror: {address!r} needs a package that is missing ({error}); install it: pip "
                'install "maskwire[storage]"'
            ) from error
        self._system: Any = None
        self.patience: Callable[[StoreError], bool] = _no_patience
        """Called with the error of each call that failed; returns whether to retry the call."""

    def probe(self) -> None:
        """Raise ConfigError unless the store refuses a second `create` of the same name."""
        name = f"probe-{uuid.uuid4().hex}"
        with contextlib.suppress(FileExistsError):  # an earlier attempt created it, and its answer was lost
            self.create(name, b"first")
        try:
            self.create(name, b"second")
        except FileExistsError:
            return
        else:
            raise ConfigError(
                f"storage.mirror: the store at {self.address} let an object be created twice, so two servers "
                "could write the same run; use a store that creates an object only once (S3: one that "
                "respects If-None-Match)"
            )
        finally:
            with contextlib.suppress(StoreError):
                self.delete(name)

    def create(self, name: str, data: bytes) -> None:
        """Create an object atomically. If the object exists, raises FileExistsError and changes nothing."""
        self._call(f"create {name}", self._create, name, data)

    def _create(self, name: str, data: bytes) -> None:
        if self._protocol == "file":
            self._link(name, data)
        elif self._protocol in ("s3", "s3a"):  # one request, whatever the size
            self._fs.pipe_file(self._path(name), data, mode="create", chunksize=2**32)
        else:
            self._fs.pipe_file(self._path(name), data, mode="create")

    def put(self, name: str, data: bytes) -> None:
        """Write an object atomically. Its name must determine its content, so that a retry is harmless."""
        with contextlib.suppress(FileExistsError):
            self._call(f"write {name}", self._put, name, data)

    def _put(self, name: str, data: bytes) -> None:
        if self._protocol == "file":
            self._link(name, data)
        else:
            self._fs.pipe_file(self._path(name), data)

    def put_file(self, name: str, path: Path) -> None:
        """Write an object from a local file."""
        self._call(f"write {name}", self._put_file, name, path)

    def _put_file(self, name: str, path: Path) -> None:
        self._fs.makedirs(self._fs._parent(self._path(name)), exist_ok=True)
        self._fs.put_file(str(path), self._path(name))
        self._flush(name)

    def copy(self, name: str, target: str) -> None:
        """Copy an object within the store."""
        self._call(f"copy {name}", self._copy, name, target)

    def _copy(self, name: str, target: str) -> None:
        self._fs.makedirs(self._fs._parent(self._path(target)), exist_ok=True)
        self._fs.cp_file(self._path(name), self._path(target))
        self._flush(target)

    def get(self, name: str) -> bytes | None:
        """The content of an object; None if no object has that name."""
        return self._call(f"read {name}", self._get, name)

    def _get(self, name: str) -> bytes | None:
        try:
            return bytes(self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def get_all(self, names: list[str]) -> Iterator[bytes | None]:
        """Yield the contents of objects, in the order of `names`, or None for each missing object."""
        for start in range(0, len(names), _AT_ONCE):
            part = names[start : start + _AT_ONCE]
            found = self._call("read objects", self._get_part, part) if len(part) > 1 else {}
            for name in part:
                content = found.get(self._stripped(self._path(name)))
                yield bytes(content) if isinstance(content, bytes) else self.get(name)

    def _get_part(self, names: list[str]) -> dict[str, object]:
        return dict(self._fs.cat([self._path(name) for name in names], on_error="return"))

    def get_file(self, name: str, path: Path) -> bool:
        """Write an object's content to a local file. Returns False if no object has that name."""
        return self._call(f"read {name}", self._get_file, name, path)

    def _get_file(self, name: str, path: Path) -> bool:
        try:
            self._fs.get_file(self._path(name), str(path))
        except FileNotFoundError:
            return False
        return True

    def names(self, folder: str) -> list[str]:
        """The names of all objects below a folder, sorted, relative to the address."""
        return self._call(f"list {folder}", self._names, folder)

    def _names(self, folder: str) -> list[str]:
        try:
            found = self._fs.find(self._path(folder))
        except FileNotFoundError:
            return []
        start = len(self._stripped(self._path(""))) + 1
        return sorted(path[start:] for path in found if not path.endswith(".part"))

    def delete(self, name: str) -> None:
        """Delete an object, if it exists."""
        self._call(f"delete {name}", self._delete, name)

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _stripped(self, path: str) -> str:
        """A path without its protocol, as fsspec returns paths."""
        return str(self._fs._strip_protocol(path))

    @property
    def _fs(self) -> Any:
        if self._system is None:
            options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
            if self._protocol in ("s3", "s3a"):
                options |= _S3_OPTIONS
            self._system = self._class(**options)
            self._system.retries = 1  # s3fs would retry for seconds; the mirror retries, and reports it
        return self._system

    def _link(self, name: str, data: bytes) -> None:
        """Write a local file under a temporary name, then hard-link it to `name`.

        Raises FileExistsError if `name` exists.
        """
        path = Path(self._path(name))
        make_folder(path.parent)
        draft = path.with_name(f"{path.name}-{uuid.uuid4().hex}.part")
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            path.hardlink_to(draft)
            flush_folder(path.parent)
        finally:
            draft.unlink(missing_ok=True)

    def _flush(self, name: str) -> None:
        """Make a local file durable. In other stores an object is durable once it is written."""
        if self._protocol == "file":
            path = Path(self._path(name))
            with path.open("rb") as file:
                os.fsync(file.fileno())
            flush_folder(path.parent)

    def _call(self, what: str, act: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Call `act`, and retry it as long as `patience` allows.

        Raises FileExistsError if the object exists, and StoreError for every other error.
        """
        while True:
            try:
                return act(*arguments)
            except FileExistsError:
                raise
            except Exception as error:  # fsspec and the packages below it raise errors of many types
                if _precondition_failed(error):
                    raise FileExistsError(what) from error
                if isinstance(error, PermissionError):
                    self._system = None  # connect again, with credentials read again
                words = " ".join(str(error).split())[:300] or type(error).__name__
                failure = StoreError(f"{self.address}: cannot {what}: {type(error).__name__}: {words}")
                if not self.patience(failure):
                    raise failure from error


def _no_patience(_: StoreError) -> bool:
    return False


def _precondition_failed(error: BaseException) -> bool:
    """Whether an S3 store answered 412 (Precondition Failed).

    fsspec recognises this answer only if it names the failed condition, which some stores leave out.
    """
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    return bool(response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412)
