"""Attribution methods, interchangeable behind one small protocol."""

from vestige.methods._attribute import attribute as attribute
from vestige.methods._bm25 import Bm25 as Bm25, lexical_scores as lexical_scores, prompt_words as prompt_words
from vestige.methods._tracin import TracIn as TracIn
from vestige.methods._grad_dot import GradCos as GradCos, GradDot as GradDot
from vestige.methods._activations import (
    ActivationDot as ActivationDot,
    PooledOutputs as PooledOutputs,
    RepSim as RepSim,
    Tap as Tap,
    backbone as backbone,
    pooled as pooled,
    tapped as tapped,
    taps_of as taps_of,
)
from vestige.methods._influence import Influence as Influence
from vestige.methods._less import Less as Less
from vestige.methods._preconditioned import (
    Arnoldi as Arnoldi,
    ConjugateGradient as ConjugateGradient,
    DataInfMethod as DataInfMethod,
    Ekfac as Ekfac,
    Kfac as Kfac,
    Lissa as Lissa,
)
from vestige.methods._protocol import (
    METHODS as METHODS,
    ComponentBlock as ComponentBlock,
    Job as Job,
    Method as Method,
    Option as Option,
    describe_method as describe_method,
    get_method as get_method,
    method as method,
    method_table as method_table,
    options_of as options_of,
)
from vestige.methods._random import Random as Random
from vestige.methods._randomised import randomised as randomised
from vestige.methods._trak import Trak as Trak, doubt as doubt
