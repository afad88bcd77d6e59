"""Data sets of the package `datasets`: objects, and folders that `save_to_disk` wrote."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from maskwire.data.record import Fields, Item

_ROWS = 1024  # read at once
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


def is_dataset(value: object) -> bool:
    """Whether an object is a data set of the package `datasets`. Does not import the package."""
    datasets: Any = sys.modules.get("datasets")  # an object of the package exists only after its import
    if datasets is None:
        return False
    kinds = (datasets.Dataset, datasets.IterableDataset, datasets.DatasetDict, datasets.IterableDatasetDict)
    return isinstance(value, kinds)


def is_dataset_folder(path: Path) -> bool:
    """Whether a folder holds a data set that `save_to_disk` wrote."""
    return (path / _SPLITS).is_file() or ((path / _STATE).is_file() and (path / _INFO).is_file())


def dataset_folders(files: Iterable[str]) -> list[str]:
    """Return the folders among `files` that `save_to_disk` wrote, as the names of their files show."""
    given = {PurePosixPath(file) for file in files}
    found = {file.parent for file in given if file.name == _SPLITS}
    found |= {file.parent for file in given if file.name == _STATE and file.with_name(_INFO) in given}
    return sorted(map(str, found))


def load(path: Path) -> Any:
    """Load a folder that `save_to_disk` wrote. Its files are memory-mapped, not read."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f'{path}: a Hugging Face data set needs the package `datasets`: pip install "maskwire[data]"'
        ) from None
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # the package raises errors of many types
        raise ValueError(
            f"{path}: cannot be loaded as a data set: {error}; save the data set again"
        ) from error


class DatasetSource:
    """A source of texts: the rows of a data set. A position in it is a row number."""

    def __init__(self, dataset: Any, fields: Fields, folder: Path | None = None) -> None:
        self.name = "data set" if folder is None else str(folder)
        if isinstance(dataset, dict):
            first = next(iter(dataset), "train")
            raise ValueError(
                f"{self.name} has the splits {', '.join(map(str, dataset))}: give one of them, such as "
                f"{folder or 'FOLDER'}/{first} or dataset[{first!r}]"
            )
        names = dataset.column_names
        if names is not None and any(field not in names for field in fields.names):
            raise ValueError(f"{self.name}: {fields.missing(list(names))}")
        self._fields = fields
        self._dataset = (dataset.select_columns(fields.names) if names is not None else dataset).with_format(
            None  # a format such as "arrow" or "numpy" gives values that are no Python strings
        )
        self._random_access = hasattr(dataset, "__len__")
        self.size = int(self._dataset.data.nbytes) if self._random_access else 0
        self.identity = str(getattr(dataset, "_fingerprint", uuid.uuid4().hex))

    def read(self, start: int) -> Iterator[Item]:
        """Yield an Item for each row from number `start` onwards. The first row has the number 0."""
        dataset = self._dataset
        rows = len(dataset) if self._random_access else 0
        if self._random_access and start >= rows:  # `datasets` cannot select an empty range
            return
        if self._random_access:
            dataset = dataset.select(range(start, rows))
        elif start:
            dataset = dataset.skip(start)
        number = start
        for batch in dataset.iter(_ROWS):
            for field in self._fields.names:
                if field not in batch:
                    raise ValueError(f"{self.name}, row {number + 1:,}: {self._fields.missing(list(batch))}")
            for values in zip(*(batch[field] for field in self._fields.names), strict=True):
                number += 1
                done = self.size * number // rows if rows else 0
                where = f"{self.name}, row {number:,}"
                try:
                    yield self._fields.item(where, list(values), number, done)
                except ValueError as error:
                    yield Item.invalid(f"{where}: {error}", number, done)
