"""Which examples a model has memorized: measures from one model or a bank of them, and how far they can be trusted."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.measures._attack import (
        Attack as Attack,
        Interval as Interval,
        Rate as Rate,
        area as area,
        attack as attack,
        blind as blind,
        blind_attack as blind_attack,
        group_means as group_means,
        share as share,
    )
    from vestige.measures._audit import audit as audit
    from vestige.measures._bank_measures import (
        BankEvidence as BankEvidence,
        GlobalLira as GlobalLira,
        Lira as Lira,
        bank_evidence as bank_evidence,
        counterfactual as counterfactual,
        lira as lira,
        lira_global as lira_global,
        lira_in_sample as lira_in_sample,
        lira_of_members as lira_of_members,
        lira_offline as lira_offline,
        mean_over_models as mean_over_models,
        simplicity as simplicity,
    )
    from vestige.measures._benchmark import Match as Match, find_matches as find_matches, find_spans as find_spans
    from vestige.measures._canaries import (
        epsilon_from_guesses as epsilon_from_guesses,
        epsilon_from_ranks as epsilon_from_ranks,
        exposure as exposure,
        read_canaries as read_canaries,
    )
    from vestige.measures._choices import accuracy as accuracy, brier as brier, logit_gap as logit_gap
    from vestige.measures._evidence import Known as Known
    from vestige.measures._extraction import (
        Extraction as Extraction,
        chance_within as chance_within,
        continuation_log_probability as continuation_log_probability,
        edit_distance as edit_distance,
        extraction as extraction,
        greedy as greedy,
        predict as predict,
        recitation as recitation,
        sampling_log_probability as sampling_log_probability,
        tries_needed as tries_needed,
    )
    from vestige.measures._figures import (
        Drawn as Drawn,
        blind_area as blind_area,
        draw_agreement as draw_agreement,
        draw_dynamics as draw_dynamics,
        draw_exposure_by_copies as draw_exposure_by_copies,
        draw_exposure_over_time as draw_exposure_over_time,
        draw_files as draw_files,
        draw_layers as draw_layers,
        draw_roc as draw_roc,
    )
    from vestige.measures._hidden_states import (
        Psmi as Psmi,
        Smi as Smi,
        choose_layer as choose_layer,
        draw_directions as draw_directions,
        mahalanobis as mahalanobis,
        psmi as psmi,
        smi as smi,
    )
    from vestige.measures._losses import (
        answer_loss as answer_loss,
        loss as loss,
        loss_trajectory as loss_trajectory,
        margin as margin,
        min_k as min_k,
        min_k_plus_plus as min_k_plus_plus,
        perplexity_ratio as perplexity_ratio,
        zlib_ratio as zlib_ratio,
    )
    from vestige.measures._measure import (
        MEASURES as MEASURES,
        BankValues as BankValues,
        Batch as Batch,
        ChoiceLogits as ChoiceLogits,
        Continue as Continue,
        Generation as Generation,
        Losses as Losses,
        Measure as Measure,
        Predict as Predict,
        Rule as Rule,
        States as States,
        TokenScores as TokenScores,
        describe_measure as describe_measure,
        measure as measure,
        measure_table as measure_table,
        token_scores as token_scores,
    )
    from vestige.measures._memorized import measure_memorized as measure_memorized
    from vestige.measures._quantile import quantile_excess as quantile_excess, text_features as text_features
    from vestige.measures._rmia import fit_slope as fit_slope, rmia as rmia, rmia_offline as rmia_offline
    from vestige.measures._usage import Usage as Usage, infer_usage as infer_usage
    from vestige.measures._weights import WeightNorms as WeightNorms, weight_norms as weight_norms
    from vestige.runs import (
        Audit as Audit,
        evidence_table as evidence_table,
        read_evidence as read_evidence,
        write_evidence as write_evidence,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
