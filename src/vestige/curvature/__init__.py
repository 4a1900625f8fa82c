"""Curvature and its damped inverse: Fisher blocks of compressed gradients, Kronecker factors, products of matrices."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.curvature._adam import (
        Moments as Moments,
        adam_direction as adam_direction,
        component_moments as component_moments,
        read_adam as read_adam,
    )
    from vestige.curvature._fisher import (
        DAMPING as DAMPING,
        FisherBlock as FisherBlock,
        FisherBlocks as FisherBlocks,
        Measure as Measure,
        Measures as Measures,
        absolute_damping as absolute_damping,
        accumulate_fisher as accumulate_fisher,
        read_tensors as read_tensors,
        write_tensors as write_tensors,
    )
    from vestige.curvature._fit import (
        BatchSink as BatchSink,
        CurvatureData as CurvatureData,
        Labels as Labels,
        curvature_path as curvature_path,
        ekfac_of as ekfac_of,
        kfac_of as kfac_of,
        sample_labels as sample_labels,
    )
    from vestige.curvature._iterative import (
        CurvatureKind as CurvatureKind,
        CurvatureProduct as CurvatureProduct,
        DataInf as DataInf,
        arnoldi as arnoldi,
        conjugate_gradient as conjugate_gradient,
        largest_eigenvalue as largest_eigenvalue,
        lissa as lissa,
        mean_eigenvalues as mean_eigenvalues,
        neumann as neumann,
    )
    from vestige.curvature._kfac import (
        Block as Block,
        Eigenbasis as Eigenbasis,
        KroneckerCurvature as KroneckerCurvature,
        find_blocks as find_blocks,
    )
    from vestige.curvature._precondition import (
        fisher_of as fisher_of,
        fisher_path as fisher_path,
        plan_fisher as plan_fisher,
        precondition as precondition,
        preconditioned_layout as preconditioned_layout,
        read_preconditioned as read_preconditioned,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
