"""Curvature and its damped inverse: Fisher blocks of compressed gradients, Kronecker factors, products of matrices."""

from vestige.curvature._cache import fisher_of as fisher_of
from vestige.curvature._datainf import DataInf as DataInf
from vestige.curvature._datainf import fit_datainf as fit_datainf
from vestige.curvature._diagonal import absolute_damping as absolute_damping
from vestige.curvature._fisher import DAMPING as DAMPING
from vestige.curvature._fisher import FisherBlock as FisherBlock
from vestige.curvature._fisher import FisherBlocks as FisherBlocks
from vestige.curvature._fisher import accumulate_fisher as accumulate_fisher
from vestige.curvature._fit import CurvatureData as CurvatureData
from vestige.curvature._fit import fit_ekfac as fit_ekfac
from vestige.curvature._fit import fit_kfac as fit_kfac
from vestige.curvature._iterative import Eigenpairs as Eigenpairs
from vestige.curvature._iterative import arnoldi as arnoldi
from vestige.curvature._iterative import conjugate_gradient as conjugate_gradient
from vestige.curvature._iterative import largest_eigenvalue as largest_eigenvalue
from vestige.curvature._iterative import lissa as lissa
from vestige.curvature._kfac import EigenCurvature as EigenCurvature
from vestige.curvature._kfac import KroneckerFactors as KroneckerFactors
from vestige.curvature._kfac_files import curvature_path as curvature_path
from vestige.curvature._kfac_files import ekfac_of as ekfac_of
from vestige.curvature._kfac_files import kfac_of as kfac_of
from vestige.curvature._labels import Labels as Labels
from vestige.curvature._products import CurvatureKind as CurvatureKind
from vestige.curvature._products import CurvatureProduct as CurvatureProduct
from vestige.curvature._whole import whole_fisher as whole_fisher
