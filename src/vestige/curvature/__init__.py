"""Curvature in the compressed space: Fisher blocks, their damping, and what they make of a query."""

from vestige.curvature._cache import fisher_of as fisher_of
from vestige.curvature._fisher import DAMPING as DAMPING
from vestige.curvature._fisher import FisherBlock as FisherBlock
from vestige.curvature._fisher import FisherBlocks as FisherBlocks
from vestige.curvature._fisher import accumulate_fisher as accumulate_fisher
