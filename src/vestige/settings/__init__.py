"""Settings of the verbs: what the Python functions, the command line and `--config` files have in common.

The lowest room but for the errors; nothing in it imports torch, so that help and mistakes answer at once.
"""

from vestige.settings._base import Settings as Settings
from vestige.settings._base import flag as flag
from vestige.settings._base import nearest as nearest
from vestige.settings._base import parse_bytes as parse_bytes
from vestige.settings._verb import verb as verb
from vestige.settings._verbs import AttributeSettings as AttributeSettings
from vestige.settings._verbs import CompressionSettings as CompressionSettings
from vestige.settings._verbs import DoctorSettings as DoctorSettings
from vestige.settings._verbs import ExportSettings as ExportSettings
from vestige.settings._verbs import IndexSettings as IndexSettings
from vestige.settings._verbs import ReadingSettings as ReadingSettings
from vestige.settings._verbs import ReportSettings as ReportSettings
from vestige.settings._verbs import StatusSettings as StatusSettings
from vestige.settings._verbs import ViewSettings as ViewSettings
