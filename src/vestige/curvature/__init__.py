"""Curvature and its damped inverse: Fisher blocks of compressed gradients, Kronecker factors, products of matrices."""

from vestige.curvature._adam import (
    Moments as Moments,
    adam_direction as adam_direction,
    component_moments as component_moments,
    read_adam as read_adam,
)
from vestige.curvature._cache import FisherPlan as FisherPlan, fisher_of as fisher_of
from vestige.curvature._datainf import (
    DataInf as DataInf,
    fit_datainf as fit_datainf,
    mean_eigenvalues as mean_eigenvalues,
)
from vestige.curvature._diagonal import absolute_damping as absolute_damping
from vestige.curvature._fisher import (
    DAMPING as DAMPING,
    FisherBlock as FisherBlock,
    FisherBlocks as FisherBlocks,
    Measure as Measure,
    Measures as Measures,
    accumulate_fisher as accumulate_fisher,
)
from vestige.curvature._fit import (
    BatchSink as BatchSink,
    CurvatureData as CurvatureData,
    fit_ekfac as fit_ekfac,
    fit_kfac as fit_kfac,
)
from vestige.curvature._ifvp import (
    PreconditionedBlock as PreconditionedBlock,
    PreconditionedPlan as PreconditionedPlan,
    read_preconditioned as read_preconditioned,
)
from vestige.curvature._iterative import (
    Eigenpairs as Eigenpairs,
    arnoldi as arnoldi,
    conjugate_gradient as conjugate_gradient,
    largest_eigenvalue as largest_eigenvalue,
    lissa as lissa,
)
from vestige.curvature._kfac import EigenCurvature as EigenCurvature, KroneckerFactors as KroneckerFactors
from vestige.curvature._kfac_files import (
    Work as Work,
    curvature_path as curvature_path,
    ekfac_of as ekfac_of,
    kfac_of as kfac_of,
)
from vestige.curvature._labels import Labels as Labels
from vestige.curvature._precondition import precondition as precondition
from vestige.curvature._products import CurvatureKind as CurvatureKind, CurvatureProduct as CurvatureProduct
from vestige.curvature._whole import whole_fisher as whole_fisher
