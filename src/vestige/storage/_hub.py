"""Results on the Hugging Face hub: pushed to a data set of their own there, and fetched from `hub:owner/name`."""

import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vestige.errors import UserError
from vestige.progress import announce

HUB = "hub:"
_MARKER, _CARD = "vestige.json", "README.md"


def cache_folder() -> Path:
    """Return the folder for what Vestige can make again: `$VESTIGE_CACHE`, else the user's cache for programs."""
    given = os.environ.get("VESTIGE_CACHE")
    if given:
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "vestige"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "vestige"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vestige"


def local_result(place: Any) -> Any:
    """Return the folder of a result: for `hub:owner/name` its copy here, fetched if it is not the newest one.

    Raises:
        UserError: There is no such result, or the hub does not give it.
    """
    if not str(place).startswith(HUB):
        return place
    import huggingface_hub

    name, held = str(place).removeprefix(HUB), cache_folder() / "hub"
    try:
        commit = huggingface_hub.HfApi().dataset_info(name, timeout=10).sha or "main"
        folder = held / f"{name.replace('/', '--')}-{commit[:12]}"
        huggingface_hub.snapshot_download(name, repo_type="dataset", revision=commit, local_dir=folder)
    except Exception as error:
        # The hub's client raises whatever its transport does.
        copies = sorted(held.glob(f"{name.replace('/', '--')}-*/{_MARKER}"), key=lambda path: path.stat().st_mtime)
        if not copies:
            raise UserError(
                f"{place}: the hub did not give it ({_reason(error)}). Check the spelling; for a private one type "
                "`hf auth login`."
            ) from error
        announce(f"{place}: the hub was not reached ({_reason(error)}), and the copy in {copies[-1].parent} is used.")
        folder = copies[-1].parent
    if not (folder / _MARKER).is_file():
        raise UserError(f"{place} is no result that Vestige pushed: it has no {_MARKER}.")
    return folder


def push_result(files: Mapping[str, Path | bytes], name: str, *, kind: str, private: bool, card: str) -> str:
    """Upload the files of a result in one commit, in place of what Vestige pushed there before; return the address.

    Args:
        files: What lies at each path of the repository: a file, or its content.
        name: `owner/name` of the data set, which is made if it is not there.
        kind: What the result is, such as "run".
        private: Only its owner sees it.
        card: What it is, for people who come there.

    Raises:
        UserError: The repository holds files of others, or another kind of result, or is public and was not to be; or
            the hub refuses. Nothing was changed.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = huggingface_hub.HfApi()
    marker = {"vestige": version("vestige"), "kind": kind, "files": sorted(files)}
    content = {**files, _MARKER: json.dumps(marker, indent=1).encode(), _CARD: card.encode()}
    try:
        old = _read_old(api, name, kind, private, set(files)) if api.repo_exists(name, repo_type="dataset") else set()
        url = str(api.create_repo(name, repo_type="dataset", private=private, exist_ok=True))
        operations: list[Any] = [CommitOperationAdd(path, place) for path, place in content.items()]
        operations += [CommitOperationDelete(path) for path in sorted(old - set(content))]
        api.create_commit(name, operations, commit_message=f"Vestige {version('vestige')}: {kind}", repo_type="dataset")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"It is on disk, but {name} did not take it: {_reason(error)}. Log in with `hf auth login`, check the "
            "name, and run the same command again."
        ) from error
    return url


def _read_old(api: Any, name: str, kind: str, private: bool, new: set[str]) -> set[str]:
    """Return the files of an earlier push that are in the repository; raise UserError if none may go there now."""
    info = api.dataset_info(name)
    there = {each.rfilename for each in info.siblings or []}
    if private and not info.private:
        raise UserError(f"{name} is public. Type --no-private to push there, or choose another name.")
    old: dict[str, Any] = {"files": []}
    if _MARKER in there:
        old = json.loads(Path(api.hf_hub_download(name, _MARKER, repo_type="dataset")).read_bytes())
        if old["kind"] != kind:
            raise UserError(f"{name} holds a result of another kind: {old['kind']}. Choose another name.")
    ours = {*old["files"], _MARKER, _CARD} if old["files"] else set()
    foreign = there - ours - {".gitattributes"}
    if foreign and (not ours or foreign & new):
        raise UserError(
            f"{name} holds files that Vestige did not push ({', '.join(sorted(foreign)[:3])}); nothing was changed. "
            "Choose another name."
        )
    return there & ours


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
