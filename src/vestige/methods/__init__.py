"""Attribution methods, interchangeable behind one small protocol."""

from vestige.methods._activation_dot import (
    ActivationDot as ActivationDot,
    PooledOutputs as PooledOutputs,
    Tap as Tap,
    tapped as tapped,
    taps_of as taps_of,
)
from vestige.methods._arnoldi import Arnoldi as Arnoldi
from vestige.methods._attribute import attribute as attribute
from vestige.methods._bm25 import Bm25 as Bm25, lexical_scores as lexical_scores, prompt_words as prompt_words
from vestige.methods._cg import ConjugateGradient as ConjugateGradient
from vestige.methods._datainf import DataInfMethod as DataInfMethod
from vestige.methods._ekfac import Ekfac as Ekfac
from vestige.methods._grad_cos import GradCos as GradCos
from vestige.methods._grad_dot import GradDot as GradDot
from vestige.methods._hidden import backbone as backbone, pooled as pooled
from vestige.methods._influence import Influence as Influence
from vestige.methods._kfac import Kfac as Kfac
from vestige.methods._less import Less as Less
from vestige.methods._lissa import Lissa as Lissa
from vestige.methods._options import Option as Option, options_of as options_of
from vestige.methods._protocol import ComponentBlock as ComponentBlock, Job as Job, Method as Method
from vestige.methods._random import Random as Random
from vestige.methods._randomised import randomised as randomised
from vestige.methods._registry import (
    METHODS as METHODS,
    describe_method as describe_method,
    get_method as get_method,
    method as method,
    method_table as method_table,
)
from vestige.methods._rep_sim import RepSim as RepSim
from vestige.methods._tracin import TracIn as TracIn
from vestige.methods._trak import Trak as Trak, doubt as doubt
