"""Other words by a model on this machine."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from vestige.data import Example, Message
from vestige.errors import ModelError
from vestige.models import Answer, answer_prompts, load_model, model_fingerprint
from vestige_recipes.data_commands import ParaphraseSettings
from vestige_recipes.prepare._replies import Keep, Reply, Request

_SPARE = 32


class LocalModel:
    """Asks a chat model in batches; a reply is the same whatever stands beside it."""

    def __init__(self, settings: ParaphraseSettings) -> None:
        self._settings = settings
        self._loaded = load_model(
            settings.model, tokenizer=settings.tokenizer, precision=settings.precision, device=settings.device
        )
        if getattr(self._loaded.tokenizer, "chat_template", None) is None:
            raise ModelError(
                f"{self._loaded.name} has no chat template, so it cannot be told to paraphrase. Choose a model "
                "that was trained to follow instructions, --api-model, or --rules."
            )
        self._fingerprint = model_fingerprint(self._loaded.model)

    @property
    def identity(self) -> Mapping[str, Any]:
        """Weights, template, instruction, and how words are drawn."""
        given, tokenizer = self._settings, self._loaded.tokenizer
        return {
            "paraphraser": "local",
            "model": self._fingerprint,
            "template": str(getattr(tokenizer, "chat_template", None)),
            "instruction": given.instruction,
            "temperature": given.temperature,
            "seed": given.seed if given.temperature else None,
            "max_new_tokens": given.max_new_tokens,
        }

    def ask(self, requests: Sequence[Request], keep: Keep) -> None:
        """Every request is answered; replies are stored batch by batch."""

        def store(row: int, answer: Answer) -> None:
            finish = "stop" if answer.ended else "length"
            keep(requests[row], Reply(text=answer.text, finish=finish, received=answer.tokens))

        if requests:
            answer_prompts(
                self._loaded,
                [self._question(row, request) for row, request in enumerate(requests)],
                max_new_tokens=[self._most(request) for request in requests],
                temperature=self._settings.temperature,
                seeds=[self._seed(request) for request in requests],
                keep=store,
            )

    def _question(self, row: int, request: Request) -> Example:
        # Not every template knows a system's turn.
        asked = f"{self._settings.instruction}\n\n{request.text}"
        return Example(id=request.text[:40], row=row, messages=(Message("user", asked),))

    def _most(self, request: Request) -> int:
        if self._settings.max_new_tokens is not None:
            return self._settings.max_new_tokens
        tokenizer: Any = self._loaded.tokenizer
        return 2 * len(tokenizer(request.text, add_special_tokens=False, verbose=False)["input_ids"]) + _SPARE

    def _seed(self, request: Request) -> int:
        digest = hashlib.sha256(f"{self._settings.seed}:{request.number}:{request.text}".encode()).digest()
        return int.from_bytes(digest[:7], "big")
