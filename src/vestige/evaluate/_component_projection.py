"""Random projections of gradients, tensor by tensor: as they should be, and as they were published.

Each tensor's gradient of n numbers is mapped to k numbers whose inner products are right on average. Published (Select
or Project, arXiv 2601.16651) is a map of entries +1 and -1 that is not divided by sqrt(k): the product of a tensor is
then k times too large, and tensors have different k, so what is estimated is a cosine weighted by parameter counts.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.compress import Compressor, combine, compress_gradient, parse_spec, reduce_factor
from vestige.errors import SpecError
from vestige.gradients import Gradients
from vestige.models import Component

Projector = Literal["tensorsketch", "sjlt", "rademacher", "gauss"]
GRANULE = 512
"""Published budgets are whole multiples of it, for the whole and for every tensor."""


class ProjectionPlan(NamedTuple):
    """How many numbers are kept of every component."""

    name: str
    """As it was requested: `256` numbers a component, or `1%` of all parameters."""
    sizes: tuple[int, ...]


def projection_sizes(parameters: Sequence[int], share: float, granule: int = GRANULE) -> tuple[int, ...]:
    """Return the numbers kept of each tensor when `share` of all parameters is kept, by the published rule.

    The budget is `share * N` rounded to a multiple of the granule, and a tensor of n parameters gets
    `max(granule, granule * round(n / N * budget / granule))`.
    """
    total = sum(parameters)
    budget = granule * round(share * total / granule)
    return tuple(max(granule, granule * round(count / total * budget / granule)) for count in parameters)


def projection_plan(asked: str, parameters: Sequence[int]) -> ProjectionPlan:
    """Return the plan that `256` or `1%` means for components of these sizes; never more numbers than a component has.

    Budgets are divided in steps of 512 as published, in steps of 1 where a component would get more than its share.

    Raises:
        SpecError: It is neither a whole number nor a percentage between 0 and 100.
    """
    text = asked.strip()
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if not 0 < share <= 1:
                raise ValueError
            granule = GRANULE if min(parameters) * share >= GRANULE / 2 else 1
            sizes = projection_sizes(parameters, share, granule)
        else:
            sizes = (int(text),) * len(parameters)
            if sizes[0] < 1:
                raise ValueError
    except ValueError:
        raise SpecError(
            f"--project {asked!r} is no projection. Give numbers for each component, such as 256, or a share of all "
            "parameters, such as 1%."
        ) from None
    return ProjectionPlan(text, tuple(min(pair) for pair in zip(sizes, parameters, strict=True)))


class Projection:
    """The random map of one plan over some components, the same for every process and batch."""

    def __init__(
        self,
        plan: ProjectionPlan,
        components: Sequence[Component],
        projector: Projector,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.plan, self.projector, self.seed = plan, projector, seed
        self._compressors: list[Compressor] = [
            parse_spec(f"{projector}:{size}").build(part.name, part.shape, seed, device)
            for part, size in zip(components, plan.sizes, strict=True)
        ]
        self.sizes = tuple(one.size for one in self._compressors)

    def apply(self, gradients: Sequence[Gradients]) -> Float[Tensor, "example k"]:
        """Return projected gradients of a batch, component after component, float32 on the CPU."""
        parts = [project(one, found) for one, found in zip(self._compressors, gradients, strict=True)]
        return torch.cat([part.float().cpu() for part in parts], dim=1)

    def published_weights(self) -> Float[Tensor, " k"]:
        """Return the factor of each component's numbers in the published form: the root of their count."""
        sizes = torch.tensor(self.sizes)
        return torch.repeat_interleave(sizes.double().sqrt(), sizes)


def project(compressor: Compressor, gradients: Gradients) -> Float[Tensor, "example k"]:
    """Compress gradients of one component, from its factors or from its matrices."""
    if gradients.zero:
        return torch.zeros(gradients.examples, compressor.size)
    if gradients.matrices is not None:
        return compress_gradient(compressor, gradients.matrices)
    total = torch.zeros(
        gradients.examples,
        compressor.size,
        dtype=torch.promote_types(gradients.pieces[0].right.dtype, torch.float32),
        device=gradients.pieces[0].right.device,
    )
    for piece in gradients.pieces:
        left = reduce_factor(compressor, "left", piece.left)
        right = reduce_factor(compressor, "right", piece.right)
        total[piece.examples] += combine(compressor, left, right).to(total.dtype)
    return total
