"""Settings of every command, defined once for the Python functions, the command line and the config files.

A field is the argument of the Python function, the key in `--config run.yaml` and, with dashes, the flag of the
command; its description is the help text. The lowest package but for the errors; nothing in it imports torch, so that
help and mistakes answer at once.
"""

from vestige.settings._attribute import AttributeSettings as AttributeSettings
from vestige.settings._audit import AuditSettings as AuditSettings
from vestige.settings._bank import BankSettings as BankSettings
from vestige.settings._base import BAD_TEXT as BAD_TEXT
from vestige.settings._base import OnBadText as OnBadText
from vestige.settings._base import OnlyWith as OnlyWith
from vestige.settings._base import Settings as Settings
from vestige.settings._base import flag as flag
from vestige.settings._base import nearest as nearest
from vestige.settings._base import parse_bytes as parse_bytes
from vestige.settings._data import PreparationSettings as PreparationSettings
from vestige.settings._data import SplitSettings as SplitSettings
from vestige.settings._data import TokenizeSettings as TokenizeSettings
from vestige.settings._evaluate_components import ComponentsSettings as ComponentsSettings
from vestige.settings._evaluate_scores import LdsSettings as LdsSettings
from vestige.settings._evaluate_scores import MislabelSettings as MislabelSettings
from vestige.settings._evaluate_scores import OverlapSettings as OverlapSettings
from vestige.settings._evaluate_scores import RandomisationSettings as RandomisationSettings
from vestige.settings._evaluate_scores import RemovalSettings as RemovalSettings
from vestige.settings._evaluate_scores import RetrievalSettings as RetrievalSettings
from vestige.settings._evaluate_scores import ScoredSettings as ScoredSettings
from vestige.settings._evaluate_scores import SourcesSettings as SourcesSettings
from vestige.settings._evaluate_scores import TailPatchSettings as TailPatchSettings
from vestige.settings._evaluate_scores import TruthValue as TruthValue
from vestige.settings._evaluate_selection import SelectionSettings as SelectionSettings
from vestige.settings._evaluate_sketch import SketchSettings as SketchSettings
from vestige.settings._index import DoctorSettings as DoctorSettings
from vestige.settings._index import IndexSettings as IndexSettings
from vestige.settings._launch import LaunchSettings as LaunchSettings
from vestige.settings._member import MemberSettings as MemberSettings
from vestige.settings._precondition import PreconditionSettings as PreconditionSettings
from vestige.settings._results import CancelSettings as CancelSettings
from vestige.settings._results import ExportSettings as ExportSettings
from vestige.settings._results import MeasuresSettings as MeasuresSettings
from vestige.settings._results import MethodsSettings as MethodsSettings
from vestige.settings._results import ReportSettings as ReportSettings
from vestige.settings._results import StatusSettings as StatusSettings
from vestige.settings._results import ViewSettings as ViewSettings
from vestige.settings._select import SelectSettings as SelectSettings
from vestige.settings._shared import SHARED_COMPRESSION as SHARED_COMPRESSION
from vestige.settings._shared import CompressionSettings as CompressionSettings
from vestige.settings._shared import Precision as Precision
from vestige.settings._shared import QuestionSettings as QuestionSettings
from vestige.settings._shared import ReadingSettings as ReadingSettings
from vestige.settings._shared import Scope as Scope
from vestige.settings._train import TrainSettings as TrainSettings
from vestige.settings._train import listed_epochs as listed_epochs
from vestige.settings._untrac import AscentOptimizer as AscentOptimizer
from vestige.settings._untrac import UntracSettings as UntracSettings
from vestige.settings._verb import verb as verb
