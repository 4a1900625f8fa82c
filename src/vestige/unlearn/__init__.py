"""Influence by intervention: gradient ascent on one set of examples, and what it does to the losses of others."""

from vestige.unlearn._ascent import Ascent as Ascent, ascend as ascend
from vestige.unlearn._curves import CURVES_FILE as CURVES_FILE
from vestige.unlearn._estimator import Influence as Influence, UnTrac as UnTrac, UnTracConfig as UnTracConfig
from vestige.unlearn._job import UntracJob as UntracJob, make_job as make_job
from vestige.unlearn._losses import Losses as Losses
from vestige.unlearn._recipe import AscentRecipe as AscentRecipe, backward as backward
from vestige.unlearn._retained import Retained as Retained
from vestige.unlearn._scaling import SizeReport as SizeReport, scaling_experiment as scaling_experiment
from vestige.unlearn._sets import Overlap as Overlap, overlaps as overlaps, training_sources as training_sources
from vestige.unlearn._untrac import Scored as Scored, untrac as untrac
from vestige.unlearn._weights import borrowed_weights as borrowed_weights
