"""Which examples a model has memorized: measures from one model or a bank of them, and how far they can be trusted."""

from vestige.measures._attack import (
    Attack as Attack,
    Interval as Interval,
    Rate as Rate,
    area as area,
    attack as attack,
    group_means as group_means,
    share as share,
)
from vestige.measures._blind import blind as blind, blind_attack as blind_attack
from vestige.measures._canaries import exposure as exposure
from vestige.measures._choices import accuracy as accuracy, brier as brier, logit_gap as logit_gap
from vestige.measures._counterfactual import counterfactual as counterfactual, simplicity as simplicity
from vestige.measures._extraction import (
    Extraction as Extraction,
    edit_distance as edit_distance,
    extraction as extraction,
    greedy as greedy,
)
from vestige.measures._from_bank import BankEvidence as BankEvidence, bank_evidence as bank_evidence
from vestige.measures._inputs import (
    BankValues as BankValues,
    Batch as Batch,
    ChoiceLogits as ChoiceLogits,
    Generation as Generation,
    Losses as Losses,
    States as States,
)
from vestige.measures._lira import (
    GlobalLira as GlobalLira,
    Lira as Lira,
    lira as lira,
    lira_global as lira_global,
    lira_in_sample as lira_in_sample,
    lira_of_members as lira_of_members,
    lira_offline as lira_offline,
)
from vestige.measures._loss import answer_loss as answer_loss, loss as loss, margin as margin
from vestige.measures._mahalanobis import mahalanobis as mahalanobis
from vestige.measures._min_k import min_k as min_k, min_k_plus_plus as min_k_plus_plus
from vestige.measures._psmi import Psmi as Psmi, Smi as Smi, choose_layer as choose_layer, psmi as psmi, smi as smi
from vestige.measures._ratios import perplexity_ratio as perplexity_ratio, zlib_ratio as zlib_ratio
from vestige.measures._registry import (
    MEASURES as MEASURES,
    Measure as Measure,
    Rule as Rule,
    describe_measure as describe_measure,
    measure as measure,
    measure_table as measure_table,
)
from vestige.measures._run import audit as audit
from vestige.measures._tokens import TokenScores as TokenScores, token_scores as token_scores
from vestige.measures._weights import WeightNorms as WeightNorms, weight_norms as weight_norms
from vestige.runs import (
    Audit as Audit,
    evidence_table as evidence_table,
    read_evidence as read_evidence,
    write_evidence as write_evidence,
)
