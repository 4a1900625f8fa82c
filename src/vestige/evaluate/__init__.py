"""How far scores, and what they are computed from, can be trusted: one function for each kind of evaluation."""

from vestige.evaluate._component_products import ComponentProducts as ComponentProducts, credit as credit
from vestige.evaluate._component_projection import (
    Projection as Projection,
    projection_plan as projection_plan,
    projection_sizes as projection_sizes,
)
from vestige.evaluate._component_run import OnePassResult as OnePassResult, one_pass_result as one_pass_result
from vestige.evaluate._component_search import greedy_path as greedy_path, held_out as held_out
from vestige.evaluate._components import components as components
from vestige.evaluate._families import PUBLISHED as PUBLISHED, Family as Family
from vestige.evaluate._figures import Mark as Mark, interval_figure as interval_figure
from vestige.evaluate._group_measure import (
    Agreement as Agreement,
    Effects as Effects,
    agreement as agreement,
    effects as effects,
)
from vestige.evaluate._lds import lds as lds
from vestige.evaluate._lds_measure import (
    Ceiling as Ceiling,
    Lds as Lds,
    ceiling as ceiling,
    datamodeling_score as datamodeling_score,
    held_out_choice as held_out_choice,
)
from vestige.evaluate._measures import Quality as Quality, quality as quality
from vestige.evaluate._mislabel import mislabel as mislabel
from vestige.evaluate._overlap import overlap as overlap
from vestige.evaluate._products import (
    Products as Products,
    Rows as Rows,
    Samples as Samples,
    Source as Source,
    exact_products as exact_products,
    projected_products as projected_products,
    sketched_products as sketched_products,
)
from vestige.evaluate._randomisation import randomisation as randomisation
from vestige.evaluate._removal import removal as removal
from vestige.evaluate._result import (
    Evaluation as Evaluation,
    EvaluationRow as EvaluationRow,
    write_evaluation as write_evaluation,
)
from vestige.evaluate._retrieval import retrieval as retrieval
from vestige.evaluate._selection import Gain as Gain, gain_over as gain_over, selection as selection
from vestige.evaluate._sketch import sketch as sketch
from vestige.evaluate._sketch_report import SketchPoint as SketchPoint, SketchReport as SketchReport
from vestige.evaluate._sources import sources as sources
from vestige.evaluate._statistics import Estimate as Estimate
from vestige.evaluate._tail_patch import tail_patch as tail_patch
