"""Attribution methods, interchangeable behind one small protocol."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.methods._activations import (
        ActivationDot as ActivationDot,
        RepSim as RepSim,
        backbone as backbone,
        pool_states as pool_states,
        pooling_weights as pooling_weights,
        tap_modules as tap_modules,
        taps_of as taps_of,
    )
    from vestige.methods._attribute import attribute as attribute
    from vestige.methods._bm25 import (
        Bm25 as Bm25,
        example_words as example_words,
        lexical_scores as lexical_scores,
        prompt_words as prompt_words,
    )
    from vestige.methods._checkpoints import (
        Checkpoint as Checkpoint,
        find_checkpoints as find_checkpoints,
        learning_rates as learning_rates,
    )
    from vestige.methods._ekfac_index import EkfacIndex as EkfacIndex
    from vestige.methods._grad_dot import GradCos as GradCos, GradDot as GradDot
    from vestige.methods._gradient_method import (
        HELPS as HELPS,
        GradientMethod as GradientMethod,
        Prepared as Prepared,
        prepare_queries as prepare_queries,
        unit_length as unit_length,
    )
    from vestige.methods._indexed import IndexedGradients as IndexedGradients, open_compressed as open_compressed
    from vestige.methods._influence import Influence as Influence
    from vestige.methods._iterative import Arnoldi as Arnoldi, ConjugateGradient as ConjugateGradient, Lissa as Lissa
    from vestige.methods._job import (
        EXACT_SHARE as EXACT_SHARE,
        build_temporary_index as build_temporary_index,
        gradients_fit as gradients_fit,
        open_job as open_job,
    )
    from vestige.methods._less import Less as Less
    from vestige.methods._plan import digest as digest, settings_key as settings_key
    from vestige.methods._preconditioned import (
        DataInfMethod as DataInfMethod,
        Ekfac as Ekfac,
        Kfac as Kfac,
        Preconditioned as Preconditioned,
        check_memory as check_memory,
    )
    from vestige.methods._protocol import (
        METHODS as METHODS,
        GradientStore as GradientStore,
        Job as Job,
        Method as Method,
        Products as Products,
        Vectors as Vectors,
        describe_method as describe_method,
        get_method as get_method,
        method as method,
        method_table as method_table,
        watch as watch,
    )
    from vestige.methods._queries import (
        Live as Live,
        OnAnswer as OnAnswer,
        OnAnswers as OnAnswers,
        compute_losses as compute_losses,
        query_loss as query_loss,
        read_batches as read_batches,
        read_queries as read_queries,
    )
    from vestige.methods._random import Random as Random
    from vestige.methods._randomise import check_randomised as check_randomised
    from vestige.methods._record import (
        split_over_components as split_over_components,
        split_over_tokens as split_over_tokens,
    )
    from vestige.methods._stores import (
        ExactGradients as ExactGradients,
        open_store as open_store,
    )
    from vestige.methods._tracin import (
        CheckpointMethod as CheckpointMethod,
        GradientTerm as GradientTerm,
        Lines as Lines,
        Term as Term,
        TracIn as TracIn,
        checkpoint_job as checkpoint_job,
        open_checkpoint_store as open_checkpoint_store,
    )
    from vestige.methods._trak import Trak as Trak, doubt as doubt
    from vestige.methods._trust import (
        check_bm25_overlap as check_bm25_overlap,
        check_coverage as check_coverage,
        check_duplicates as check_duplicates,
        check_finite as check_finite,
        check_hubs as check_hubs,
        check_memorized as check_memorized,
        check_overlap as check_overlap,
        find_lexical_tops as find_lexical_tops,
        find_proponents as find_proponents,
        run_free_checks as run_free_checks,
    )
    from vestige.methods._untrac import (
        TextInfluence as TextInfluence,
        UnTrac as UnTrac,
        UnTracConfig as UnTracConfig,
        check_unlearning as check_unlearning,
        untrac as untrac,
    )
    from vestige.methods._untrac_ascent import (
        AscentRecipe as AscentRecipe,
        Overlap as Overlap,
        Retained as Retained,
        ascend as ascend,
        find_overlaps as find_overlaps,
        first_order_identity as first_order_identity,
        training_sources as training_sources,
    )
    from vestige.methods._untrac_job import (
        CURVATURE_SHARE as CURVATURE_SHARE,
        RETAINED_STEPS as RETAINED_STEPS,
        Unlearning as Unlearning,
        UntracJob as UntracJob,
        make_job as make_job,
        run_ascents as run_ascents,
        settle_rate as settle_rate,
    )
    from vestige.methods._verbatim import Verbatim as Verbatim
    from vestige.methods._weights import (
        Rows as Rows,
        Vector as Vector,
        Weights as Weights,
        borrow_weights as borrow_weights,
        loss_weights as loss_weights,
        randomise as randomise,
        shuffle_batches as shuffle_batches,
    )
    from vestige.registry import Option as Option, options_of as options_of

__getattr__, __dir__, __all__ = lazy_names(__name__)
