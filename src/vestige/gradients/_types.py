"""The canonical layout of a per-example gradient, and the seam through which everything else receives it.

The gradient of one component for one example is a sum over token positions of outer products,

    G[out, in] = sum over t of  left[t, out] * right[t, in],

with `left` of shape `[example, token, out]` and `right` of shape `[example, token, in]`:

| layer                | left                   | right              |
|----------------------|------------------------|--------------------|
| Linear, Conv1D       | output gradient        | input activation   |
| router, one expert   | output gradient        | input activation, of the tokens routed to it |
| convolution          | output gradient        | unfolded input     |
| ... transposed       | input activation       | unfolded output gradient |
| ... with groups      | one-hot of the row     | the row's gradient |
| relative bias (T5)   | one-hot of the bucket  | gradient of the bias |
| output head          | logit gradient         | hidden state       |
| Embedding            | one-hot of the token   | output gradient    |
| bias (one position)  | output gradient, summed over tokens | one    |
| norm weight (ditto)  | output gradient times normalised input, summed over tokens | one |

GPT-2's Conv1D stores its weight as `[in, out]`; here it is `[out, in]` like every other matrix. Nothing outside
`gradients/` knows that layers differ.
"""

from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

Side = Literal["left", "right"]


class OneHot(NamedTuple):
    """The left factor of an embedding: row `ids[e, t]` of an identity of `size` rows, stored as the index alone."""

    ids: Int[Tensor, "example token"]
    size: int


Factor = Float[Tensor, "example token side"] | OneHot


@runtime_checkable
class FactorSink(Protocol):
    """Receives the factors of every use of every component while forward and backward run.

    `reduce` is called as soon as a factor is known (activations during the forward pass), so that a compressor can
    shrink it before it has to be kept; what it returns is handed to `accumulate` unchanged. `accumulate` may be called
    several times for one component and one example (tied weights, a loss computed in chunks): contributions add up.
    """

    def reduce(self, component: int, side: Side, factor: Factor) -> Any:
        """Return what to keep of one factor of component number `component`."""
        ...

    def accumulate(self, component: int, examples: slice, left: Any, right: Any) -> None:
        """Add the gradient `sum_t left[t] (x) right[t]` of the batch's examples in `examples`."""
        ...


@runtime_checkable
class PositionSink(FactorSink, Protocol):
    """A sink that counts tokens, and needs those of the layers that receive only some of the batch's tokens.

    Such layers are experts and the output head. The factors of every other layer have the batch's own token axis.
    """

    def locate(self, positions: Int[Tensor, "example row"]) -> None:
        """Receive the token of each row of the factors that come next, -1 for a row that only fills the tensor."""
        ...
