"""The report page: one offline HTML file made from a run directory, and the same page served live."""

from vestige.report._report import report as report
from vestige.report._serve import view as view
