"""Per-example gradients as factors: layer rules, taps, exact products. The heart; knows no files and no commands."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.gradients._cards import (
        FEWEST_TOKENS as FEWEST_TOKENS,
        BatchMemory as BatchMemory,
        CardMemory as CardMemory,
        FittingBatches as FittingBatches,
        card_memory as card_memory,
        describe_device as describe_device,
        deterministic as deterministic,
        measure_batch_memory as measure_batch_memory,
    )
    from vestige.gradients._cross import (
        FormingBudget as FormingBudget,
        Gradients as Gradients,
        HeldGradients as HeldGradients,
        LowRank as LowRank,
        Piece as Piece,
        count_formed as count_formed,
        cross_products as cross_products,
        low_rank as low_rank,
        matrices_of as matrices_of,
        numbers as numbers,
        products as products,
        square_norms as square_norms,
    )
    from vestige.gradients._factors import (
        BlockSizes as BlockSizes,
        Extent as Extent,
        Factor as Factor,
        FactorSink as FactorSink,
        OneHot as OneHot,
        ReusedMemory as ReusedMemory,
        Side as Side,
        cheapest_route as cheapest_route,
        dot_matrices as dot_matrices,
        inner_product as inner_product,
        materialise as materialise,
        multiply_wide as multiply_wide,
    )
    from vestige.gradients._losses import (
        Knowledge as Knowledge,
        Second as Second,
        measure_knowledge as measure_knowledge,
        second_derivatives as second_derivatives,
        token_derivatives as token_derivatives,
    )
    from vestige.gradients._objective import (
        CausalLoss as CausalLoss,
        FunctionObjective as FunctionObjective,
        LabelledBatch as LabelledBatch,
        MaskedLoss as MaskedLoss,
        Objective as Objective,
        Reduction as Reduction,
        Seq2SeqLoss as Seq2SeqLoss,
        evaluating as evaluating,
        example_count as example_count,
        logit_bytes_on as logit_bytes_on,
        longest_and_shortest as longest_and_shortest,
        require_independence as require_independence,
        token_losses as token_losses,
    )
    from vestige.gradients._pass import GradientPass as GradientPass, pairwise_products as pairwise_products
    from vestige.gradients._rules import Handle as Handle, Receive as Receive
    from vestige.gradients._sinks import (
        BothSinks as BothSinks,
        DotSink as DotSink,
        GradientSink as GradientSink,
        KeepingSink as KeepingSink,
        NormSink as NormSink,
    )
    from vestige.gradients._taps import observable as observable, observe as observe

__getattr__, __dir__, __all__ = lazy_names(__name__)
