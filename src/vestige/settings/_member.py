"""How models are trained that are compared with each other: the members of a bank, and those of evaluations."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vestige.errors import SpecError
from vestige.settings._base import Settings, flag
from vestige.settings._shared import Patterns

Schedule = Literal["linear", "cosine", "constant"]
Optimizer = Literal["adamw", "adam", "sgd"]

_DEFAULT_EPOCHS = 3


class MemberSettings(Settings):
    """How each model is trained."""

    epochs: PositiveInt | None = Field(
        None,
        description="Length of the training: passes over a random subset, or, where something is left out, as many "
        "steps as passes over all data take. Not given: 3, or what --steps says.",
    )
    steps: PositiveInt | None = Field(None, description="Length of the training in optimizer steps.")
    from_scratch: bool = Field(False, description="Begin with random weights, drawn separately for each seed.")
    lora_rank: PositiveInt | None = Field(None, description="Train LoRA matrices of this rank instead of all weights.")
    lora_alpha: PositiveFloat | None = Field(None, description="Scale of LoRA. Not given: twice the rank.")
    lora_targets: Patterns = Field(
        ("all-linear",),
        description="Layers that get LoRA's matrices, by the end of their name, such as q_proj v_proj lm_head; "
        "all-linear is every linear layer but the head.",
    )
    learning_rate: PositiveFloat = Field(5e-5, description="Learning rate at its highest.")
    batch_size: PositiveInt = Field(8, description="Examples in each training step.")
    optimizer: Optimizer = Field("adamw", description="adamw, adam or sgd.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum of sgd.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Weight decay: decoupled for adamw, L2 for the others.")
    schedule: Schedule = Field("linear", description="How the learning rate falls to zero, or constant.")
    warmup: NonNegativeInt = Field(0, description="Steps in which the learning rate rises from zero.")
    clip: NonNegativeFloat = Field(1.0, description="Largest norm of a step's gradient; 0 does not clip.")

    @property
    def passes(self) -> int | None:
        """Epochs that decide the length, None if `steps` does."""
        return self.epochs or (_DEFAULT_EPOCHS if self.steps is None else None)

    @model_validator(mode="after")
    def _training_fits(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise SpecError("--epochs and --steps both say how long to train. Give one of them.")
        if self.momentum and self.optimizer != "sgd":
            raise SpecError(f"--momentum is for --optimizer sgd; {self.optimizer} has its own.")
        if self.from_scratch and self.lora_rank is not None:
            raise SpecError("--lora-rank adapts trained weights; with --from-scratch there are none.")
        fields = MemberSettings.model_fields
        given = [name for name in ("lora_alpha", "lora_targets") if getattr(self, name) != fields[name].default]
        if given and self.lora_rank is None:
            names = ", ".join(map(flag, given))
            raise SpecError(f"{names}: of LoRA, which --lora-rank turns on. Give a rank, or leave it out.")
        return self
