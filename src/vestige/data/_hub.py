"""Data sets of the `datasets` library: live ones, folders saved by it, and names on the hub."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vestige.data._files import absent_file
from vestige.data._origin import Record, Source
from vestige.errors import DataError
from vestige.progress import announce

HUB_NAME = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")
"""`name`, `owner/name`, and either with `:config` behind it."""


def is_dataset(source: object) -> bool:
    """Return whether `source` is a data set of the `datasets` library, without importing it."""
    is_its_own = any(base.__module__.split(".")[0] == "datasets" for base in type(source).__mro__)
    return is_its_own and hasattr(source, "with_format")


def from_dataset(dataset: Any, split: str | None, name: str = "dataset") -> Source:
    """Return the rows of a live data set, of any output format; of a dictionary of splits, one split.

    Raises:
        DataError: The split is missing or cannot be chosen.
    """
    if isinstance(dataset, Mapping):
        split = _chosen_split(list(dataset), split, name)
        return _source(f"{name}[{split}]", dataset[split])
    if split is not None and str(getattr(dataset, "split", None)) != split:
        raise DataError(f"{name}: split={split!r} was requested, but the source is one data set without splits.")
    return _source(name, dataset)


def _source(name: str, dataset: Any) -> Source:
    # The library gives every data set a fingerprint of its content and of what was done to it.
    return Source(name, _rows(dataset), getattr(dataset, "_fingerprint", None))


def _rows(dataset: Any) -> Iterator[Record]:
    # A format such as "torch" would turn ids and labels into tensors.
    for row in dataset.with_format(None):
        yield Record(row)


def _chosen_split(names: list[str], split: str | None, name: str) -> str:
    if split is not None:
        if split not in names:
            raise DataError(f"{name}: no split {split!r}; its splits are {', '.join(names)}.")
        return split
    if len(names) == 1:
        return names[0]
    if "train" in names:
        announce(f"{name}: reading the split 'train' (of {', '.join(names)}); choose another with split=...")
        return "train"
    raise DataError(f"{name}: which of its splits ({', '.join(names)})? Type split={names[0]!r}.")


def is_saved_dataset(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder."""
    return any((folder / marker).exists() for marker in ("state.json", "dataset_dict.json"))


def from_folder(folder: Path, split: str | None) -> Source:
    """Return the rows of a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.

    Raises:
        DataError: The folder is damaged.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset = datasets.load_from_disk(str(folder))
    except (AttributeError, LookupError, OSError, TypeError, ValueError, DatasetsError) as error:
        raise DataError(f"{folder}: looks like a folder saved by `datasets`, but does not load ({error}).") from error
    return from_dataset(dataset, split, folder.name)


def from_hub(name: str, split: str | None) -> Source:
    """Return the rows of a hub data set, `owner/name` or `owner/name:config`, downloaded or from the cache.

    Raises:
        DataError: It is absent, private or unreachable, or needs a config or a split.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    match = HUB_NAME.fullmatch(name)
    if match is None:
        raise DataError(f"{name!r} is neither a file, a folder nor a name on the hub (`owner/name`).")
    try:
        dataset = datasets.load_dataset(match["path"], match["config"], split=split)
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        raise DataError(_hub_failure(name, error)) from error
    return from_dataset(dataset, None, name)


def _hub_failure(name: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0].rstrip(".")
    message = f"{absent_file(Path(name))} It was not loaded from the hub either: {reason}."
    if "onfig" in reason:
        return f"{message} Choose a config by writing {name.split(':')[0]}:CONFIG."
    if isinstance(error, ConnectionError):
        return f"{message} Check the network, or give a local file."
    return f"{message} Check the name, and log in with `hf auth login` if the data set is private."
