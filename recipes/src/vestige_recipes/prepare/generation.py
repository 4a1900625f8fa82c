"""`vestige data generate`: a model's own answers to prompts; and other words by a model on this machine."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vestige.data import Example, Message, conversation_columns, turn_record
from vestige.errors import DataError, ModelError
from vestige.models import Answer, LoadedModel, answer_prompts, load_model, model_fingerprint
from vestige.prepare import Prepared, check_same_result, fingerprint_of, read_rows, row_of, write_prepared
from vestige.progress import announce
from vestige.settings import with_settings
from vestige_recipes.commands import GenerateSettings, ParaphraseSettings
from vestige_recipes.prepare.replies import Keep, Reply, ReplyCache, Request, describe_problems, request_for

KIND = "generate"
_SPARE = 32
"""Tokens that a paraphrase may have beyond twice those of its text."""


@with_settings(GenerateSettings)
def generate(settings: GenerateSettings) -> Prepared:
    """Write every prompt with the model's answer into `out`, the most likely or one drawn; ids and other columns stay.

    In batches padded on the left: an answer is the same alone and in any batch. Each row says in `finish`
    whether the model ended its answer (`stop`) or it was cut at `max_new_tokens` or at the end of the context
    (`length`). Answers are kept on disk batch by batch: killed at any moment, the same call goes on. Rows whose answer
    is empty go to flagged.jsonl.

    Raises:
        ModelError: The model does not load or cannot generate.
        DataError: The data is absent or broken, a row has no prompt, or a prompt fills the context.
    """
    examples = read_rows(settings)
    fingerprint = fingerprint_of(examples)
    check_same_result(settings, KIND, fingerprint, frozenset())
    prompts = {row: _prompt(example) for row, example in enumerate(examples) if _is_asked(example, settings)}
    loaded = load_model(
        settings.model, tokenizer=settings.tokenizer, precision=settings.precision, device=settings.device
    )
    identity = _identity(loaded, settings)
    requests = {row: request_for(identity, _words(prompt), 1) for row, prompt in prompts.items()}
    started = time.monotonic()
    replies = _answer(loaded, {request.key: (prompts[row], request) for row, request in requests.items()}, settings)
    answers = {row: (prompts[row], replies[request.key]) for row, request in requests.items()}
    rows, flagged = _rows(examples, answers, settings)
    cut = sum(row.get("finish") == "length" for row in rows)
    notes = describe_problems(rows, flagged)
    if cut:
        notes.append(f"{cut:,} answers were cut at their greatest length.")
    details = {"seconds": round(time.monotonic() - started, 3), "cut": cut, "model": identity["model"]}
    return write_prepared(settings, KIND, rows, fingerprint=fingerprint, flagged=flagged, details=details, notes=notes)


def _is_asked(example: Example, settings: GenerateSettings) -> bool:
    if example.messages:
        answered = example.messages[-1].role == "assistant"
    elif example.prompt is not None:
        answered = bool(example.completion)
    else:
        raise DataError(
            f"Row {example.row} (id {example.id!r}) has no prompt to answer. Give `prompt`, `question`, `instruction` "
            "or `messages`."
        )
    return not (answered and settings.keep_answers)


def _prompt(example: Example) -> Example:
    """Return the row without its answer."""
    messages = example.messages
    while messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    if example.messages and not messages:
        raise DataError(f"Row {example.row} (id {example.id!r}) holds nothing but the assistant's turns.")
    return replace(example, messages=messages, completion=None)


def _words(prompt: Example) -> str:
    turns = [turn_record(turn) for turn in prompt.messages]
    beside = conversation_columns(prompt)
    return json.dumps([prompt.prompt, turns, *([beside] if beside else [])], ensure_ascii=False, default=str)


def _identity(loaded: LoadedModel, settings: GenerateSettings) -> dict[str, Any]:
    """Return everything beside the prompt that an answer follows from."""
    drawn = {"temperature": settings.temperature, "seed": settings.seed}
    return {
        "generate": drawn if settings.temperature else "greedy",
        "model": model_fingerprint(loaded.model),
        "template": str(getattr(loaded.tokenizer, "chat_template", None)),
        "vocabulary": len(loaded.tokenizer) if loaded.tokenizer is not None else None,
        "max_new_tokens": settings.max_new_tokens,
        "chat": settings.chat,
    }


def _answer(
    loaded: LoadedModel, asked: Mapping[str, tuple[Example, Request]], settings: GenerateSettings
) -> dict[str, Reply]:
    """Return the answer to every prompt by the key of its request: from before, or generated now."""
    cache = ReplyCache(settings.out / "replies")
    found = cache.find(asked)
    waiting = [asked[key] for key in asked if key not in found]
    announce(f"{len(asked):,} prompts, of which {len(found):,} have an answer from before.")

    def keep(number: int, answer: Answer) -> None:
        request, reply = waiting[number][1], _reply(answer)
        cache.put(request, reply)
        found[request.key] = reply

    if waiting:
        prompts = [prompt for prompt, _ in waiting]
        answer_prompts(
            loaded,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seeds=[seed_of(settings.seed, request) for _, request in waiting],
            chat=settings.chat,
            keep=keep,
        )
    return found


def _rows(
    examples: Sequence[Example], answers: Mapping[int, tuple[Example, Reply]], settings: GenerateSettings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows with answers, and those whose answer is empty."""
    rows: list[dict[str, Any]] = []
    flagged: list[dict[str, Any]] = []
    for number, example in enumerate(examples):
        if number not in answers:
            rows.append(row_of(example))
            continue
        prompt, reply = answers[number]
        answer = {"completion": reply.text}
        if prompt.messages:
            answer = {"messages": (*prompt.messages, Message("assistant", reply.text))}
        row = row_of(replace(prompt, **answer)) | {"finish": reply.finish}
        if reply.text.strip():
            rows.append(row)
        else:
            (rows if settings.keep_flagged else flagged).append(row | {"problem": "empty"})
    return rows, flagged


def _reply(answer: Answer) -> Reply:
    return Reply(text=answer.text, finish="stop" if answer.ended else "length", received=answer.tokens)


class LocalModel:
    """Asks a chat model in batches; a reply does not depend on its batch."""

    def __init__(self, settings: ParaphraseSettings) -> None:
        self._settings = settings
        self._loaded = load_model(
            settings.model, tokenizer=settings.tokenizer, precision=settings.precision, device=settings.device
        )
        if getattr(self._loaded.tokenizer, "chat_template", None) is None:
            raise ModelError(
                f"{self._loaded.name} has no chat template, so it cannot be instructed to paraphrase. Choose a model "
                "that was trained to follow instructions, --api-model, or --rules."
            )
        self.identity: Mapping[str, Any] = {
            "paraphraser": "local",
            "model": model_fingerprint(self._loaded.model),
            "template": str(getattr(self._loaded.tokenizer, "chat_template", None)),
            "instruction": settings.instruction,
            "temperature": settings.temperature,
            "seed": settings.seed if settings.temperature else None,
            "max_new_tokens": settings.max_new_tokens,
        }

    def ask(self, requests: Sequence[Request], keep: Keep) -> None:
        """Answer every request; replies are stored batch by batch."""
        if requests:
            answer_prompts(
                self._loaded,
                [self._question(row, request) for row, request in enumerate(requests)],
                max_new_tokens=[self._longest(request) for request in requests],
                temperature=self._settings.temperature,
                seeds=[seed_of(self._settings.seed, request) for request in requests],
                keep=lambda row, answer: keep(requests[row], _reply(answer)),
            )

    def _question(self, row: int, request: Request) -> Example:
        # Not every template knows a system's turn.
        asked = f"{self._settings.instruction}\n\n{request.text}"
        return Example(id=request.text[:40], row=row, messages=(Message("user", asked),))

    def _longest(self, request: Request) -> int:
        if self._settings.max_new_tokens is not None:
            return self._settings.max_new_tokens
        tokenizer: Any = self._loaded.tokenizer
        return 2 * len(tokenizer(request.text, add_special_tokens=False, verbose=False)["input_ids"]) + _SPARE


def seed_of(seed: int, request: Request) -> int:
    """Return the seed of one reply, which depends on nothing else that is requested."""
    digest = hashlib.sha256(f"{seed}:{request.number}:{request.text}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
