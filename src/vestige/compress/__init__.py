"""Compressors: linear maps that shrink a gradient while it is still two thin factors."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.compress._apply import (
        BlockSizes as BlockSizes,
        CompressingSink as CompressingSink,
        adjoint_gradient as adjoint_gradient,
        combine as combine,
        compress_factors as compress_factors,
        compress_gradient as compress_gradient,
        reduce_factor as reduce_factor,
    )
    from vestige.compress._cost import (
        FEWEST as FEWEST,
        MOST_SHARE as MOST_SHARE,
        RATES as RATES,
        Candidate as Candidate,
        choose_compressor as choose_compressor,
        cost_share as cost_share,
        list_candidates as list_candidates,
        price as price,
        work as work,
    )
    from vestige.compress._dense import (
        Dense as Dense,
        StreamedDense as StreamedDense,
        allocate as allocate,
        logra as logra,
        random_columns as random_columns,
    )
    from vestige.compress._hadamard import fjlt as fjlt, walsh_hadamard as walsh_hadamard
    from vestige.compress._mask import (
        Coordinates as Coordinates,
        MaskPart as MaskPart,
        mask as mask,
        read_masks as read_masks,
        write_masks as write_masks,
    )
    from vestige.compress._mask_training import (
        MaskTraining as MaskTraining,
        SelectiveMask as SelectiveMask,
        train_selective_mask as train_selective_mask,
    )
    from vestige.compress._registry import (
        COMPRESSORS as COMPRESSORS,
        Composed as Composed,
        Compressor as Compressor,
        Identity as Identity,
        LinearMap as LinearMap,
        Stream as Stream,
        Work as Work,
        bits as bits,
        chain as chain,
        compressor as compressor,
        gaussians as gaussians,
        integers as integers,
        list_compressors as list_compressors,
        permutation as permutation,
        permutation_head as permutation_head,
        signs as signs,
    )
    from vestige.compress._sjlt import Sjlt as Sjlt
    from vestige.compress._spec import (
        CompressionSpec as CompressionSpec,
        Stage as Stage,
        parse_spec as parse_spec,
    )
    from vestige.compress._tensorsketch import Fold as Fold, Wrap as Wrap, tensorsketch as tensorsketch

__getattr__, __dir__, __all__ = lazy_names(__name__)
