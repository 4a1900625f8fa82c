"""The course project that reproduced UnTrac: its classes by their names, its experiments and their files."""

from vestige_recipes.untrac_reproduction.estimators import (
    MemoryEfficientUnTracEstimator as MemoryEfficientUnTracEstimator,
    TracInBaseline as TracInBaseline,
    UnTracConfig as UnTracConfig,
    UnTracInfluenceEstimator as UnTracInfluenceEstimator,
)
from vestige_recipes.untrac_reproduction.toxicity import ToxicityAttributionExperiment as ToxicityAttributionExperiment
