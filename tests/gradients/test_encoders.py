"""Encoders and encoder-decoders: exact gradients, and padding that is masked out changes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.architectures import VOCABULARY, move_off_start
from tests.reference.gradients import loop_gradients
from vestige.data import NO_TARGET
from vestige.gradients import (
    FunctionObjective,
    GradientPass,
    GradientSink,
    LabelledBatch,
    MaskedLoss,
    NormSink,
    Objective,
    Seq2SeqLoss,
)
from vestige.models import select_components


def bert(kind: type[nn.Module], attention: str = "sdpa") -> nn.Module:
    return kind(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
            num_labels=3,
            attn_implementation=attention,
        )
    )


def t5(**given: Any) -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=2,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            decoder_start_token_id=0,
            **given,
        )
    )


def classification(model: nn.Module, batch: LabelledBatch) -> Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return nn.functional.cross_entropy(logits, batch.labels[:, 0], reduction="none")


MODELS: dict[str, tuple[Any, Objective]] = {
    "bert-classifier": (lambda: bert(BertForSequenceClassification), FunctionObjective(classification)),
    "bert-classifier-eager": (
        lambda: bert(BertForSequenceClassification, "eager"),
        FunctionObjective(classification),
    ),
    "bert-masked": (lambda: bert(BertForMaskedLM), MaskedLoss()),
    "bert-masked-mean": (lambda: bert(BertForMaskedLM), MaskedLoss("mean")),
    "t5": (t5, Seq2SeqLoss()),
    "t5-mean": (t5, Seq2SeqLoss("mean")),
    "t5-gated-eager": (
        lambda: t5(feed_forward_proj="gated-gelu", attn_implementation="eager"),
        Seq2SeqLoss(),
    ),
}


def build(name: str) -> tuple[nn.Module, Objective]:
    torch.manual_seed(0)
    make, objective = MODELS[name]
    return move_off_start(make()).eval().double(), objective


def batch_of(name: str, rows: list[int], extra_padding: int = 0) -> LabelledBatch:
    """Inputs of 3 to 11 tokens, answers of 2 to 5; with four rows the longest input has as many tokens as rows."""
    generator = torch.Generator().manual_seed(5)
    lengths, answers = [3, 4, 4, 11, 7], [2, 5, 3, 4, 2]
    inputs = [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in lengths]
    targets = [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in answers]
    width = max(lengths[row] for row in rows) + extra_padding
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    outputs = max(answers) + extra_padding if name.startswith("t5") else width
    labels = torch.full((len(rows), outputs), NO_TARGET)
    for place, row in enumerate(rows):
        ids[place, : lengths[row]], mask[place, : lengths[row]] = inputs[row], 1
        if name.startswith("t5"):
            labels[place, : answers[row]] = targets[row]
        else:
            labels[place, : answers[row] - 1] = targets[row][1:][: lengths[row]]
    if "classifier" in name:
        labels = torch.tensor(rows)[:, None] % 3
    return LabelledBatch(torch.tensor(rows), ids, mask, labels)


def gradients_of(
    model: nn.Module, objective: Objective, batch: LabelledBatch
) -> tuple[list[str], list[Tensor], Tensor]:
    components = select_components(model, ("all",)).components
    sink, norms = GradientSink(components), NormSink(components)
    sink.begin(len(batch.rows), "cpu", torch.float64)
    norms.begin(len(batch.rows))
    with GradientPass(model, components, objective) as gradient_pass:
        gradient_pass.run(batch, sink)
        gradient_pass.run(batch, norms)
    squared = torch.stack([gradient.flatten(1).square().sum(1) for gradient in sink.gradients])
    assert torch.allclose(norms.finish(), squared, rtol=1e-9, atol=1e-20)
    return [component.name for component in components], sink.gradients, squared


@pytest.mark.slow
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [0, 1, 2], [1, 2, 0, 1], [3]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_plain_autograd_whatever_the_padding(name: str, rows: list[int]) -> None:
    model, objective = build(name)
    expected = loop_gradients(model, objective.losses, [batch_of(name, [row]) for row in rows])
    for padding in (0, 6):
        names, gradients, _ = gradients_of(model, objective, batch_of(name, rows, padding))
        assert set(names) == set(expected[0])
        for component, gradient in zip(names, gradients, strict=True):
            for place in range(len(rows)):
                wanted = expected[place][component]
                error = float((gradient[place].reshape(wanted.shape) - wanted).norm())
                assert error <= 1e-10 * (1 + float(wanted.norm())), (component, padding)


def test_the_shared_embedding_of_t5_has_three_uses_in_one_component() -> None:
    model, _ = build("t5")
    selection = select_components(model, ("all",))
    shared = next(component for component in selection.components if component.name == "shared.weight")
    used = {use.module for use in shared.uses}
    assert {"encoder.embed_tokens", "decoder.embed_tokens", "lm_head"} <= used
    assert selection.fraction == 1


def test_a_relative_bias_of_another_make_is_listed_as_without_rule() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relative_attention_bias, self.head = nn.Embedding(8, 2), nn.Linear(2, 2)

    rows = {row.name: row.reason for row in select_components(Encoder(), ("all",)).coverage}
    assert "shared by the batch" in rows["relative_attention_bias.weight"]
