"""WikiText-2 in blocks, as language models are fine-tuned on it: 4,656 blocks of 512 tokens, 481 to be asked about."""

from vestige.data import Example, load_examples
from vestige.models import load_model
from vestige_recipes.common.texts import Row

DATA = "Salesforce/wikitext:wikitext-2-raw-v1"
_ROWS = 1000
"""Rows that are joined before they are cut; what is left of them is dropped. Published counts follow from it."""


def wikitext(model: str, length: int) -> tuple[list[Row], list[Row]]:
    """Blocks of `length` tokens of the training and the validation split, as this model's tokenizer cuts them."""
    tokenizer = load_model(model).tokenizer
    assert tokenizer is not None, f"{model} has a tokenizer"

    def blocks(split: str) -> list[Row]:
        rows, examples = [], load_examples(DATA, split=split)
        for begin in range(0, len(examples), _ROWS):
            tokens = _joined(examples[begin : begin + _ROWS], tokenizer)
            for start in range(0, len(tokens) - length + 1, length):
                ids = tokens[start : start + length]
                row = {"id": f"{split}/{len(rows)}", "source": split, "text": tokenizer.decode(ids), "input_ids": ids}
                rows.append(row)
        return rows

    return blocks("train"), blocks("validation")


def _joined(examples: list[Example], tokenizer: object) -> list[int]:
    texts = [example.text or "" for example in examples]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[operator]
    return [token for tokens in encoded for token in tokens]
