"""Attribution methods, interchangeable behind one small protocol."""

from vestige.methods._activation_dot import ActivationDot as ActivationDot
from vestige.methods._arnoldi import Arnoldi as Arnoldi
from vestige.methods._attribute import attribute as attribute
from vestige.methods._bm25 import Bm25 as Bm25
from vestige.methods._cg import ConjugateGradient as ConjugateGradient
from vestige.methods._datainf import DataInfMethod as DataInfMethod
from vestige.methods._ekfac import Ekfac as Ekfac
from vestige.methods._grad_cos import GradCos as GradCos
from vestige.methods._grad_dot import GradDot as GradDot
from vestige.methods._influence import Influence as Influence
from vestige.methods._kfac import Kfac as Kfac
from vestige.methods._lissa import Lissa as Lissa
from vestige.methods._options import Option as Option
from vestige.methods._options import options_of as options_of
from vestige.methods._protocol import ComponentBlock as ComponentBlock
from vestige.methods._protocol import Job as Job
from vestige.methods._protocol import Method as Method
from vestige.methods._protocol import SplitsByComponent as SplitsByComponent
from vestige.methods._random import Random as Random
from vestige.methods._registry import get_method as get_method
from vestige.methods._registry import method as method
from vestige.methods._registry import method_class as method_class
from vestige.methods._registry import method_names as method_names
from vestige.methods._rep_sim import RepSim as RepSim
