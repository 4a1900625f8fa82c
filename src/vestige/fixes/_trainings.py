"""The trainings of a fix: on all rows, without the removed ones and without random ones, and what each answers."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from vestige.data import Example, TokenizedData, tokenize
from vestige.errors import SpecError
from vestige.fixes._record import ARMS, Arm, Fix, Outcome
from vestige.indexes import batch_tokens, read_manifest, tokens_at_most
from vestige.jobs import Pieces, own_jobs, run_pieces, step_done, worker_command
from vestige.models import generate_answers, load_model
from vestige.parsing import parse_json
from vestige.progress import announce, format_seconds, quiet
from vestige.runs import RunRecord, environment
from vestige.settings import FixSettings, TrainSettings
from vestige.storage import remove_tree, write_durably
from vestige.training import ALARM_OFF, TrainingRun, measure, read_inputs, require_inputs, steps_per_epoch, train

MODELS = "models"
"""Folder of the trainings in the folder of a fix."""
_OWN = ("out", "overwrite")
"""Settings of a training that every fix sets."""


@dataclass(frozen=True)
class Recorded:
    """The training that is repeated."""

    settings: TrainSettings
    run: TrainingRun | None
    """Where it was recorded; None where its settings were typed."""
    changed: bool
    """Whether settings were typed in place of recorded ones."""

    @property
    def seconds(self) -> float | None:
        """The seconds that it took; None where they are not known."""
        return None if self.run is None or self.changed else self.run.record.get("seconds")

    @property
    def last(self) -> Path | None:
        """The model that it ended with, if repeating it here would give the same one."""
        if self.run is None or self.changed or "seconds" not in self.run.record:
            return None
        steps = self.run.record["identity"]["steps"]
        return self.run.checkpoints.get(steps) if self.run.record.get("versions") == environment() else None

    def members(self) -> set[str] | None:
        """Return the ids that were trained on; None where all were."""
        if self.settings.split_fraction == 1:
            return None
        assert self.run is not None, "a split that was typed is refused"
        return self.run.members


def find_training(settings: FixSettings, run: RunRecord) -> Recorded:
    """Return the training behind the model of a run, with the settings that were typed in place of recorded ones."""
    found, model = settings.training, run.model
    if found is None and model is not None:
        place = Path(model.name).expanduser()
        found = next((folder for folder in (place, place.parent) if _is_training(folder)), None)
    recorded = None if found is None else TrainingRun.open(found)
    config: Mapping[str, Any] = {} if recorded is None else recorded.record.get("config") or {}
    config = {name: value for name, value in config.items() if name not in _OWN} | settings.train
    if isinstance(config.get("data"), list) and all(isinstance(one, str) for one in config["data"]):
        config["data"] = [Path(one) for one in config["data"]]  # files: a list of strings is a list of texts in Python
    missing = [name for name in ("model", "data") if str(config.get(name, "<")).startswith("<")]
    if missing:
        what = "No model made the scores of" if model is None else f"No training was recorded of {model.name}, of"
        what = f"{what} {settings.run}." if found is None else f"{found} does not say what it was trained with."
        raise SpecError(
            f"{what} Type --training FOLDER, made by `vestige train`, or the settings of the training: "
            "--train model=BASE --train data=FILE --train epochs=3 --train lora_rank=16."
        )
    if "split_fraction" in settings.train:
        raise SpecError("--train split_fraction draws rows at random, and here rows are chosen. Leave it out.")
    assert settings.out is not None
    complete = TrainSettings(**{**config, "out": settings.out / MODELS})
    return Recorded(complete, recorded, bool(settings.train))


def _is_training(folder: Path) -> bool:
    try:
        found = parse_json((folder / "run.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("kind") == "training"


@dataclass(frozen=True)
class Questions:
    """What is asked after each training."""

    queries: Sequence[Example]
    """With the answers of the run."""
    expected: Mapping[str, str]
    """Right answers by id."""
    chat: bool
    """Whether prompts are put into the chat template."""
    max_new_tokens: int
    mean: bool
    """Whether losses are means over the tokens of an answer, and not their sums."""

    @classmethod
    def of(cls, run: RunRecord, queries: Sequence[Example], expected: Mapping[str, str], trained: TrainSettings):
        """Return the questions of a run, put as there."""
        config = run.config
        chat = config.get("chat")
        if chat is None:
            manifest = read_manifest(Path(config["index"])) if isinstance(config.get("index"), str) else None
            chat = trained.chat if manifest is None else manifest.chat
        return cls(queries, expected, bool(chat), config.get("max_new_tokens", 64), config.get("loss") == "mean")


@dataclass(frozen=True)
class Trainings:
    """All trainings of a fix, each in a folder of its own."""

    recorded: Recorded
    questions: Questions
    folder: Path
    arms: Sequence[Arm]
    seeds: int

    @property
    def plan(self) -> list[tuple[Arm, int]]:
        """Arm and number of every model; all kinds have the first seed before any has the second."""
        return [(arm, number) for number in range(self.seeds) for arm in self.arms]

    def _result(self, arm: Arm, number: int) -> Path:
        return self.folder / MODELS / f"{arm}-{number}.json"

    @property
    def missing(self) -> list[tuple[Arm, int]]:
        """Arm and number of the trainings that have not answered."""
        return [one for one in self.plan if not self._result(*one).is_file()]

    def _known(self, arm: Arm, number: int) -> Path | None:
        return self.recorded.last if arm == "before" and number == 0 else None

    def price(self) -> str:
        """Return how much there is to train, and how long that takes by the record."""
        repeated = sum(self._known(*one) is None for one in self.missing)  # the recorded one is there
        words = (
            f"{len(self.plan)} models ({', '.join(self.arms)}; {self.seeds} seeds), {repeated} of them to be trained"
        )
        each = self.recorded.seconds
        return words if each is None else f"{words}, {format_seconds(each)} each: {format_seconds(each * repeated)}"

    def run(
        self,
        rows: Mapping[Arm, Sequence[Int[np.ndarray, "row"]]],
        data: Mapping[Arm, Sequence[Any]],
        settings: FixSettings,
        finish: Callable[[list[Outcome]], Fix],
    ) -> Fix:
        """Train and ask what is missing, and return what `finish` makes of what all models answer; as `run_pieces`.

        Args:
            rows: Rows of the data of the recorded training that the training of each seed learns.
            data: The same as the setting of that training.
            settings: Where the trainings run.
            finish: Writes the result.
        """
        plan = self.plan
        # Once the last training is done its base model and data may be gone.
        epochs, steps = self._check(rows) if self.missing else ({}, 1)

        def compute(piece: int) -> None:
            arm, number = plan[piece]
            announce(f"Model {piece + 1} of {len(plan)}: {ARMS[arm]}, seed {self._seed(number)}.")
            # One bar shows all trainings; each is a command of its own.
            with own_jobs(), quiet():
                model = self._known(arm, number) or self._train(arm, number, data[arm][number], epochs[arm][number])
                found = self._ask(model, arm, number)
            content = json.dumps([one.model_dump() for one in found], ensure_ascii=False, indent=1)
            write_durably(self._result(arm, number), [content.encode()])
            self._discard(arm, number)

        def collect() -> list[Outcome]:
            for one in plan:  # a kill may have come before
                self._discard(*one)
            return [Outcome(**one) for each in plan for one in parse_json(self._result(*each).read_bytes())]

        pieces = Pieces(
            name="Fixing",
            unit="steps",
            folder=self.folder,
            weights=[steps if self._known(*one) is None else 1 for one in plan],
            is_done=lambda piece: self._result(*plan[piece]).is_file(),
            open=lambda: nullcontext(compute),
            reduce=lambda: finish(collect()),
        )
        return run_pieces(pieces, settings, worker_command(settings, "fix"))

    def _seed(self, number: int) -> int:
        return self.recorded.settings.seed + number

    def _check(self, rows: Mapping[Arm, Sequence[Int[np.ndarray, "row"]]]) -> tuple[dict[Arm, list[float]], int]:
        """Return the epochs of each training, which make it as long as the recorded one, and the steps of all."""
        settings, run = self.recorded.settings, self.recorded.run
        loaded, data, weights, _ = read_inputs(settings)
        if run is not None and not self.recorded.changed:
            require_inputs(run, loaded, data)
        useful = (data.target_counts > 0) & (np.ones(len(data), dtype=bool) if weights is None else weights > 0)
        whole = steps_per_epoch(int(useful[rows["before"][0]].sum()), settings)
        steps = settings.count_steps(whole)

        def epochs(kept: Int[np.ndarray, "row"]) -> float:
            per_epoch = steps_per_epoch(int(useful[kept].sum()), settings)
            return settings.passes if settings.passes and per_epoch == whole else steps / per_epoch

        return {arm: [epochs(kept) for kept in each] for arm, each in rows.items()}, steps

    def _train(self, arm: Arm, number: int, data: Any, epochs: float) -> Path:
        """Train one model, unless it is there, and return its folder."""
        own = {
            "out": self._result(arm, number).with_suffix(""),
            "data": data,
            "seed": self._seed(number),
            "steps": None,
            "epochs": epochs,
            "checkpoints": str(epochs),
            "split_fraction": 1.0,
            "validation": self.recorded.settings.validation if self.recorded.settings.select else None,
            "losses": False,
            "keep_optimizer": False,
            **ALARM_OFF,
        }
        if data != self.recorded.settings.data:
            own |= {"limit": None, "where": {}}
        whole = TrainSettings(**{**self.recorded.settings.arguments(), **own})
        # What decorates a command's function gives it this attribute, of which types know nothing.
        run: Any = vars(train)["run"]
        done = run(whole, on_step=lambda: step_done(1), group=self.folder.name)
        return list(done.checkpoints.values())[-1]

    def _ask(self, folder: Path, arm: Arm, number: int) -> list[Outcome]:
        """Return what a model answers, and its losses of the old and of the right answers."""
        settings, asked = self.recorded.settings, self.questions
        loaded = load_model(str(folder), precision=settings.precision, device=settings.device)
        bare = [query.without_answer() for query in asked.queries]
        answered = generate_answers(loaded, bare, max_new_tokens=asked.max_new_tokens, chat=asked.chat)
        right = [
            one.with_answer(asked.expected[one.id]) for one in bare if one.id in asked.expected and one.lacks_answer
        ]

        def losses(queries: Sequence[Example]) -> dict[str, float]:
            texts: TokenizedData = tokenize(
                list(queries),
                loaded.tokenizer,
                max_length=tokens_at_most(settings, loaded),
                name="answers",
                chat=asked.chat,
                vocabulary=loaded.vocabulary,
            )
            found = measure(loaded.model, texts, batch_tokens(settings, loaded), mean=asked.mean)["loss"]
            return dict(zip((one.id for one in queries), found.tolist(), strict=True))

        old, wanted = losses(asked.queries), losses(right) if right else {}
        return [
            Outcome(
                arm=arm,
                seed=self._seed(number),
                query=one.id,
                answer=one.answer,
                old_loss=old[one.id],
                expected_loss=wanted.get(one.id),
            )
            for one in answered
        ]

    def _discard(self, arm: Arm, number: int) -> None:
        """Remove the weights of a model that only had to be compared; those of the fixed ones stay."""
        folder = self._result(arm, number).with_suffix("")
        if arm != "after" and folder.is_dir():
            for path in TrainingRun.open(folder).checkpoints.values():
                remove_tree(path)
