"""Per-example gradients as factors: layer rules, taps, exact products. The heart; knows no files and no commands."""

from vestige.gradients._cost import (
    Extent as Extent,
    cheapest_route as cheapest_route,
    ghost_is_cheaper as ghost_is_cheaper,
)
from vestige.gradients._cross import (
    Gradients as Gradients,
    Piece as Piece,
    cross_products as cross_products,
    cross_token_products as cross_token_products,
    formed_numbers as formed_numbers,
    matrices_of as matrices_of,
    numbers as numbers,
    products as products,
    squared_norms as squared_norms,
)
from vestige.gradients._factors import (
    ReusedMemory as ReusedMemory,
    dot_matrices as dot_matrices,
    inner_product as inner_product,
    materialise as materialise,
)
from vestige.gradients._held import (
    HeldGradients as HeldGradients,
    LowRank as LowRank,
    Room as Room,
    low_rank as low_rank,
)
from vestige.gradients._knowledge import Knowledge as Knowledge, measure_knowledge as measure_knowledge
from vestige.gradients._labelled import (
    LabelledBatch as LabelledBatch,
    MaskedLoss as MaskedLoss,
    Seq2SeqLoss as Seq2SeqLoss,
)
from vestige.gradients._objective import (
    CausalLoss as CausalLoss,
    FunctionObjective as FunctionObjective,
    Objective as Objective,
    Reduction as Reduction,
    example_count as example_count,
    token_losses as token_losses,
)
from vestige.gradients._observe import observable as observable, observe as observe
from vestige.gradients._pairs import pairwise_products as pairwise_products
from vestige.gradients._pass import GradientPass as GradientPass
from vestige.gradients._rules import Handle as Handle, Receive as Receive
from vestige.gradients._sinks import (
    BothSinks as BothSinks,
    DotSink as DotSink,
    GradientSink as GradientSink,
    KeepingSink as KeepingSink,
    NormSink as NormSink,
)
from vestige.gradients._types import Factor as Factor, FactorSink as FactorSink, OneHot as OneHot, Side as Side
