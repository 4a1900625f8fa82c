"""Per-example gradients as factors: layer rules, taps, exact products. The heart; knows no files and no commands."""

from vestige.gradients._cost import Extent as Extent
from vestige.gradients._cost import cheapest_route as cheapest_route
from vestige.gradients._cost import ghost_is_cheaper as ghost_is_cheaper
from vestige.gradients._factors import cross_products as cross_products
from vestige.gradients._factors import cross_token_products as cross_token_products
from vestige.gradients._factors import dot_matrices as dot_matrices
from vestige.gradients._factors import inner_product as inner_product
from vestige.gradients._factors import materialise as materialise
from vestige.gradients._labelled import LabelledBatch as LabelledBatch
from vestige.gradients._labelled import MaskedLoss as MaskedLoss
from vestige.gradients._labelled import Seq2SeqLoss as Seq2SeqLoss
from vestige.gradients._objective import CausalLoss as CausalLoss
from vestige.gradients._objective import FunctionObjective as FunctionObjective
from vestige.gradients._objective import Objective as Objective
from vestige.gradients._objective import Reduction as Reduction
from vestige.gradients._objective import token_losses as token_losses
from vestige.gradients._pass import GradientPass as GradientPass
from vestige.gradients._sinks import BothSinks as BothSinks
from vestige.gradients._sinks import DotSink as DotSink
from vestige.gradients._sinks import GradientSink as GradientSink
from vestige.gradients._sinks import NormSink as NormSink
from vestige.gradients._types import FactorSink as FactorSink
from vestige.gradients._types import OneHot as OneHot
from vestige.gradients._types import Side as Side
