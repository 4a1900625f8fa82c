"""Compressors: linear maps that shrink a gradient while it is still two thin factors."""

from vestige.compress._apply import adjoint_gradient as adjoint_gradient
from vestige.compress._apply import combine as combine
from vestige.compress._apply import compress_factors as compress_factors
from vestige.compress._apply import compress_gradient as compress_gradient
from vestige.compress._apply import reduce_factor as reduce_factor
from vestige.compress._cost import RATES as RATES
from vestige.compress._cost import Work as Work
from vestige.compress._cost import cost_share as cost_share
from vestige.compress._cost import price as price
from vestige.compress._cost import work as work
from vestige.compress._mask_files import MaskPart as MaskPart
from vestige.compress._mask_files import read_masks as read_masks
from vestige.compress._mask_files import write_masks as write_masks
from vestige.compress._mask_training import MaskTraining as MaskTraining
from vestige.compress._mask_training import SelectiveMask as SelectiveMask
from vestige.compress._mask_training import train_selective_mask as train_selective_mask
from vestige.compress._random import Stream as Stream
from vestige.compress._registry import COMPRESSORS as COMPRESSORS
from vestige.compress._registry import compressor as compressor
from vestige.compress._registry import known_compressors as known_compressors
from vestige.compress._sink import CompressingSink as CompressingSink
from vestige.compress._spec import CompressionSpec as CompressionSpec
from vestige.compress._spec import parse_spec as parse_spec
from vestige.compress._types import Compressor as Compressor
from vestige.compress._types import LinearMap as LinearMap
