"""Losses of models with a bidirectional encoder: masked language models and encoder-decoders."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vestige.data import NO_TARGET
from vestige.gradients._objective import HeadTap, Reduction


class LabelledBatch(NamedTuple):
    """Padded inputs with their mask, and labels: an encoder attends to the right, so padding has to be masked out."""

    rows: Int[Tensor, "example"]
    """Positions of the examples in their data set."""
    input_ids: Int[Tensor, "example token"]
    attention_mask: Int[Tensor, "example token"] | Bool[Tensor, "example token"]
    """One where there is a token, zero where there is padding."""
    labels: Int[Tensor, "example label"]
    """What is to be predicted at each position of the output, `NO_TARGET` where nothing is.

    Masked language model: the original token at masked positions of the input. Encoder-decoder: the answer, padded
    with `NO_TARGET`; the model shifts it itself to make the decoder's input.
    """


class MaskedLoss:
    """Cross-entropy in nats of the masked tokens, summed or averaged over the example's own."""

    def __init__(self, reduction: Reduction = "sum") -> None:
        self.reduction: Reduction = reduction

    def head_module(self, model: nn.Module) -> str | None:  # noqa: ARG002
        """Return None: every module is hooked."""
        return None

    def losses(
        self,
        model: nn.Module,
        batch: LabelledBatch,
        head_tap: HeadTap | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "example"]:
        """Return the loss of every example."""
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return _label_losses(logits, batch.labels, self.reduction)


class Seq2SeqLoss:
    """Cross-entropy in nats of the decoder's tokens, summed or averaged over the example's own.

    The decoder attends to the left only and its labels are padded on the right, so it needs no mask of its own.
    """

    def __init__(self, reduction: Reduction = "sum") -> None:
        self.reduction: Reduction = reduction

    def head_module(self, model: nn.Module) -> str | None:  # noqa: ARG002
        """Return None: every module is hooked."""
        return None

    def losses(
        self,
        model: nn.Module,
        batch: LabelledBatch,
        head_tap: HeadTap | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "example"]:
        """Return the loss of every example."""
        unwrap: Any = getattr(model, "get_base_model", lambda: model)
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            decoder_input_ids=unwrap().prepare_decoder_input_ids_from_labels(batch.labels),
            use_cache=False,
        ).logits
        return _label_losses(logits, batch.labels, self.reduction)


def _label_losses(
    logits: Float[Tensor, "example label word"], labels: Int[Tensor, "example label"], reduction: Reduction
) -> Float[Tensor, "example"]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
    losses = nn.functional.cross_entropy(wide, labels, ignore_index=NO_TARGET, reduction="none").sum(1)
    if reduction == "mean":
        losses = losses / (labels != NO_TARGET).sum(1).clamp(min=1)
    return losses
