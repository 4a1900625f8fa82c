"""The report page: one offline HTML file made from a run directory, and the same page served live."""

from vestige.reports._report import report as report
from vestige.reports._serve import view as view
