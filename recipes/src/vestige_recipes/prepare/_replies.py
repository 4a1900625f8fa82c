"""What was asked and what came back, kept on disk under a hash of the question, so that nothing is paid twice."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from vestige.files import make_folder, write_durably
from vestige.parsing import parse_json
from vestige.progress import announce

Finish = Literal["stop", "length", "refused", "too-long"]
"""It ended by itself; it was cut; the endpoint's filter took it; the text does not fit into the model."""


class Request(NamedTuple):
    """A text to be said in other words."""

    key: str
    """sha256 over everything that the reply follows from."""
    text: str
    number: int
    """Which paraphrase of the text this is, from 1."""


class Reply(BaseModel):
    """What came back."""

    model_config = ConfigDict(frozen=True)

    text: str
    finish: Finish = "stop"
    sent: int | None = None
    """Tokens of the question, as the endpoint counts them; None where it does not say."""
    received: int | None = None
    """Tokens of the reply."""


Keep = Callable[[Request, Reply], None]
"""Stores a reply; may be called from any thread, and when it returns, the reply survives a power cut."""


class Paraphraser(Protocol):
    """Says texts in other words."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything beside the text and its number that a reply follows from, in JSON terms."""
        ...

    def ask(self, requests: Sequence[Request], keep: Keep) -> None:
        """Every request is answered, and each reply was handed to `keep` as it came."""
        ...


def request_for(identity: Mapping[str, Any], text: str, number: int) -> Request:
    """The request for one paraphrase of a text, with the key under which its reply is kept."""
    content = json.dumps([identity, text, number], sort_keys=True, ensure_ascii=False)
    return Request(hashlib.sha256(content.encode()).hexdigest(), text, number)


class ReplyCache:
    """Replies in a folder, a file each, which several results may share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> Reply | None:
        """The reply to the request with this key; None if there is none that can be read."""
        path = self._path(key)
        try:
            return Reply.model_validate(parse_json(path.read_text(encoding="utf-8"))["reply"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            announce(f"{path} is damaged ({type(error).__name__}) and is asked for again.")
            return None

    def put(self, request: Request, reply: Reply) -> None:
        """The reply is on disk, whole, with the text that it answers."""
        path = self._path(request.key)
        make_folder(path.parent)
        content = {"text": request.text, "number": request.number, "reply": reply.model_dump()}
        write_durably(path, [json.dumps(content, ensure_ascii=False).encode()])

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
