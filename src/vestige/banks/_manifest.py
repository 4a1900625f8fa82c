"""What a bank is: every setting that its numbers follow from, its subsets, and how a changed one is refused."""

import hashlib
import json
import operator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vestige.banks._design import Subset
from vestige.errors import CorruptFile, Difference, IndexMismatch, differences, mismatch_message
from vestige.launch import JOB_FILES
from vestige.parsing import parse_object
from vestige.storage import make_folder, remove_result, remove_strays, require_no_others, write_durably

FORMAT = 1
_NAME = "bank.json"
_OURS = (
    _NAME,
    *(f"{name}.parquet" for name in ("members", "examples", "queries")),
    *(f"members/[0-9]*-[0-9]*{ending}" for ending in (".json", ".parquet", "-unfinished.pt", "-model", "-model.part")),
    *JOB_FILES,
)
_SHOWN = 6


@dataclass(frozen=True)
class BankManifest:
    """Everything about a bank but its numbers."""

    identity: dict[str, Any]
    """Every setting, and the fingerprint of every input, that the numbers follow from; JSON terms."""
    subsets: tuple[tuple[str, str], ...]
    """Name and digest of each subset, in order."""
    seeds: int
    """Runs of each subset."""
    names: dict[str, str]
    """What model, data and queries were called, for people."""

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits of the sha256 over the identity; a larger bank of the same kind keeps it."""
        return hashlib.sha256(_canonical(self.identity)).hexdigest()[:16]

    def to_json(self) -> bytes:
        """Return the content of `bank.json`."""
        fields = {
            "format": FORMAT,
            "id": self.id,
            "identity": self.identity,
            "names": self.names,
            "seeds": self.seeds,
            "subsets": self.subsets,
        }
        return (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode()


def subsets_shown(subsets: list[Subset]) -> tuple[tuple[str, str], ...]:
    """Return subsets as a manifest lists them."""
    return tuple((subset.name, subset.digest) for subset in subsets)


def read_manifest(folder: Path) -> BankManifest | None:
    """Read the manifest of the bank in `folder`, None if there is none.

    Raises:
        IndexMismatch: It was written by another version of Vestige.
    """
    try:
        fields = parse_object((folder / _NAME).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error
    if fields.get("format") != FORMAT:
        raise IndexMismatch(
            f"{folder} is a bank of format {fields.get('format')}, and this version of Vestige reads format {FORMAT}. "
            "Use the version that made it, or make it again elsewhere."
        )
    try:
        subsets = tuple((str(name), str(digest)) for name, digest in fields["subsets"])
        return BankManifest(dict(fields["identity"]), subsets, operator.index(fields["seeds"]), dict(fields["names"]))
    except (LookupError, TypeError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> CorruptFile:
    return CorruptFile(f"{folder / _NAME} is damaged ({error!r}). Delete the bank, or give another --out.")


def prepare_folder(folder: Path, wanted: BankManifest) -> BankManifest:
    """Prepare the folder with the bank's manifest; one that was there is extended, or kept if it is larger.

    Raises:
        IndexMismatch: The bank in the folder was made with other settings; nothing was changed.
        UserError: The folder holds other files.
    """
    old = read_manifest(folder)
    if old is None:
        require_no_others(folder, ())
        merged = wanted
    else:
        require_same(folder, old, wanted)
        subsets = max(old.subsets, wanted.subsets, key=len)
        merged = replace(old, subsets=subsets, seeds=max(old.seeds, wanted.seeds))
    make_folder(folder)
    remove_strays(folder)
    if merged != old:
        write_durably(folder / _NAME, [merged.to_json()])
    make_folder(folder / "members")
    return merged


def require_same(folder: Path, old: BankManifest, wanted: BankManifest) -> None:
    """Raise unless `wanted` is the bank in `folder`, a part of it, or an extension.

    Raises:
        IndexMismatch: It is not; the message shows every difference.
    """
    found = differences(old.identity, wanted.identity, old.names, wanted.names)
    common = min(len(old.subsets), len(wanted.subsets))
    if not found and old.subsets[:common] != wanted.subsets[:common]:
        found = [Difference("subsets", _subsets_shown(old), _subsets_shown(wanted))]
    if found:
        raise IndexMismatch(mismatch_message(f"The bank in {folder}", found))


def remove_bank(folder: Path) -> None:
    """Remove the bank in `folder`, for `--overwrite`.

    Raises:
        UserError: The folder holds files that are not a bank's.
    """
    remove_result(folder, _OURS, _NAME)


def _subsets_shown(manifest: BankManifest) -> str:
    names = [name for name, _ in manifest.subsets]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more} ({hashlib.sha256(_canonical(manifest.subsets)).hexdigest()[:8]})"


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
