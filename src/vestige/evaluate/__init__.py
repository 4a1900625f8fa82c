"""How far scores, and what they are computed from, can be trusted: one function for each kind of evaluation."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.evaluate._component_files import (
        FULL as FULL,
        PARAMETERS as PARAMETERS,
        SIMILARITY as SIMILARITY,
        Drawing as Drawing,
        Part as Part,
        accuracy_of as accuracy_of,
        agreement_of as agreement_of,
        list_drawings as list_drawings,
        number_of as number_of,
    )
    from vestige.evaluate._component_findings import (
        backward_shares as backward_shares,
        component_type as component_type,
    )
    from vestige.evaluate._component_inputs import (
        Candidates as Candidates,
        ComponentInputs as ComponentInputs,
        Projection as Projection,
        find_candidates as find_candidates,
        projection_sizes as projection_sizes,
    )
    from vestige.evaluate._component_pass import OnePassResult as OnePassResult, one_pass_result as one_pass_result
    from vestige.evaluate._component_sets import (
        ComponentProducts as ComponentProducts,
        Path as Path,
        assign_folds as assign_folds,
        compute_agreement as compute_agreement,
        credit as credit,
        cross_validate as cross_validate,
        greedy_path as greedy_path,
    )
    from vestige.evaluate._components import (
        components as components,
        reopen_components as reopen_components,
        write_components as write_components,
    )
    from vestige.evaluate._lds import (
        Ceiling as Ceiling,
        Lds as Lds,
        ceiling as ceiling,
        choose_held_out as choose_held_out,
        datamodeling_score as datamodeling_score,
        judge_ladder as judge_ladder,
        lds as lds,
    )
    from vestige.evaluate._mislabel import (
        detection as detection,
        mislabel as mislabel,
        read_wrong_labels as read_wrong_labels,
        resample_areas as resample_areas,
    )
    from vestige.evaluate._overlap import (
        jaccard as jaccard,
        measure_overlap as measure_overlap,
        overlap as overlap,
        overlap_by_chance as overlap_by_chance,
    )
    from vestige.evaluate._products import (
        Products as Products,
        Rows as Rows,
        Samples as Samples,
        Source as Source,
        exact_products as exact_products,
        project_products as project_products,
        sketch_products as sketch_products,
    )
    from vestige.evaluate._randomisation import randomisation as randomisation
    from vestige.evaluate._removal import removal as removal
    from vestige.evaluate._result import (
        CONFIDENCE as CONFIDENCE,
        Estimate as Estimate,
        Evaluation as Evaluation,
        EvaluationRow as EvaluationRow,
        Line as Line,
        Mark as Mark,
        Value as Value,
        bootstrap as bootstrap,
        estimate_mean as estimate_mean,
        first_of_group as first_of_group,
        interval_figure as interval_figure,
        line_figure as line_figure,
        make_interval as make_interval,
        matrix_figure as matrix_figure,
        mean_by_group as mean_by_group,
        mean_of_known as mean_of_known,
        pearson as pearson,
        spearman as spearman,
        write_evaluation as write_evaluation,
    )
    from vestige.evaluate._retrieval import (
        Ties as Ties,
        count_ties as count_ties,
        find_right_examples as find_right_examples,
        rank_codes as rank_codes,
        recall_after as recall_after,
        reciprocal_rank as reciprocal_rank,
        retrieval as retrieval,
    )
    from vestige.evaluate._scored import (
        AlignedScores as AlignedScores,
        Scored as Scored,
        ScoredRuns as ScoredRuns,
        align_scores as align_scores,
        collect_scores as collect_scores,
        keep_run as keep_run,
        list_baselines as list_baselines,
        read_together as read_together,
        require_own_files as require_own_files,
        sum_over_sets as sum_over_sets,
    )
    from vestige.evaluate._selection import Gain as Gain, measure_gain as measure_gain, selection as selection
    from vestige.evaluate._sketch import PUBLISHED as PUBLISHED, Family as Family, sketch as sketch
    from vestige.evaluate._sketch_report import (
        Quality as Quality,
        SketchPoint as SketchPoint,
        SketchReport as SketchReport,
        quality as quality,
    )
    from vestige.evaluate._sources import (
        Agreement as Agreement,
        Effects as Effects,
        compute_effects as compute_effects,
        correlate_effects as correlate_effects,
        correlate_seeds as correlate_seeds,
        sources as sources,
    )
    from vestige.evaluate._tail_patch import tail_patch as tail_patch, train_temporarily as train_temporarily
    from vestige.evaluate._truth import (
        Truth as Truth,
        check_disjoint as check_disjoint,
        open_truth as open_truth,
        retrain as retrain,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
