"""What a bank is: every setting that its numbers follow from, its subsets, and how a changed one is refused."""

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vestige.bank._design import Subset
from vestige.errors import IndexMismatch, UserError
from vestige.files import is_temporary, make_folder, remove_strays, write_durably

FORMAT = 1
_NAME = "bank.json"
_OURS = (_NAME, "members", "members.parquet", "examples.parquet", "queries.parquet", "launch")
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
        """The content of `bank.json`."""
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
    """Subsets as a manifest lists them."""
    return tuple((subset.name, subset.digest) for subset in subsets)


def read_manifest(folder: Path) -> BankManifest | None:
    """The manifest of the bank in `folder`, None if there is none.

    Raises:
        IndexMismatch: It was written by another version of Vestige.
    """
    try:
        fields = json.loads((folder / _NAME).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{folder / _NAME} is damaged ({error}). Delete the bank, or give another --out.") from error
    if fields.get("format") != FORMAT:
        raise IndexMismatch(
            f"{folder} is a bank of format {fields.get('format')}, and this version of Vestige reads format {FORMAT}. "
            "Use the version that made it, or make it anew elsewhere."
        )
    subsets = tuple((name, digest) for name, digest in fields["subsets"])
    return BankManifest(fields["identity"], subsets, fields["seeds"], fields["names"])


def prepare_folder(folder: Path, wanted: BankManifest) -> BankManifest:
    """The folder holds the bank's manifest; one that was there is extended, or kept if it is larger.

    Raises:
        IndexMismatch: The bank in the folder was made with other settings; nothing was changed.
        UserError: The folder holds other files.
    """
    old = read_manifest(folder)
    if old is None:
        _require_no_others(folder)
        merged = wanted
    else:
        require_same(folder, old, wanted)
        subsets = max(old.subsets, wanted.subsets, key=len)
        merged = replace(old, subsets=subsets, seeds=max(old.seeds, wanted.seeds))
    for path in (folder, folder / "members"):
        make_folder(path)
        remove_strays(path)
    if merged != old:
        write_durably(folder / _NAME, [merged.to_json()])
    return merged


def require_same(folder: Path, old: BankManifest, wanted: BankManifest) -> None:
    """Nothing happens if `wanted` is the bank in `folder`, a part of it, or an extension.

    Raises:
        IndexMismatch: It is not; the message shows every difference.
    """
    names = [*old.identity, *(name for name in wanted.identity if name not in old.identity)]
    rows = [
        (name.replace("_", "-"), _shown(name, old), _shown(name, wanted))
        for name in names
        if old.identity.get(name) != wanted.identity.get(name)
    ]
    common = min(len(old.subsets), len(wanted.subsets))
    if not rows and old.subsets[:common] != wanted.subsets[:common]:
        rows = [("subsets", _subsets_shown(old), _subsets_shown(wanted))]
    if rows:
        table = [("setting", "on disk", "asked for"), *rows]
        widths = [max(len(row[column]) for row in table) for column in range(2)]
        lines = [f"  {row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in table]
        raise IndexMismatch(
            f"The bank in {folder} was made with other settings; nothing was changed.\n"
            + "\n".join(lines)
            + "\nGive another --out to keep both, or --overwrite to replace it."
        )


def remove_bank(folder: Path) -> None:
    """The bank in `folder` is gone, for `--overwrite`.

    Raises:
        UserError: The folder holds files that are not a bank's.
    """
    if not folder.exists():
        return
    _require_no_others(folder)
    # The manifest goes first: whatever is left after a kill is no longer taken for a bank.
    (folder / _NAME).unlink(missing_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _require_no_others(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder. Choose another --out.")
    found = folder.iterdir() if folder.is_dir() else ()
    others = [path.name for path in found if path.name not in _OURS and not is_temporary(path)]
    if others:
        raise UserError(
            f"{folder} holds other files ({', '.join(sorted(others)[:3])}). Give a new or empty folder as --out."
        )


def _shown(name: str, manifest: BankManifest) -> str:
    value = manifest.identity.get(name)
    if name in manifest.names:
        return f"{manifest.names[name]} ({str(value)[:8]})"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


def _subsets_shown(manifest: BankManifest) -> str:
    names = [name for name, _ in manifest.subsets]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more} ({hashlib.sha256(_canonical(manifest.subsets)).hexdigest()[:8]})"


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
