"""Loading models, choosing components, fine-tuning."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.models._components import (
        Component as Component,
        CoverageRow as CoverageRow,
        LayerKind as LayerKind,
        LoadedModel as LoadedModel,
        Selection as Selection,
        Use as Use,
        layer_kind as layer_kind,
        parameter_view as parameter_view,
    )
    from vestige.models._generate import (
        Answer as Answer,
        answer_prompts as answer_prompts,
        generate_answers as generate_answers,
    )
    from vestige.models._load import (
        DEVICE_MAPS as DEVICE_MAPS,
        Precision as Precision,
        context_length as context_length,
        everything_of as everything_of,
        leave_card as leave_card,
        load_model as load_model,
        load_tokenizer as load_tokenizer,
        own_gpu as own_gpu,
        own_part as own_part,
        write_own_part as write_own_part,
    )
    from vestige.models._pretrained import (
        acts_in_forward as acts_in_forward,
        adapter_kind as adapter_kind,
        adapter_parameters as adapter_parameters,
        batch_sharing as batch_sharing,
        quiet_transformers as quiet_transformers,
    )
    from vestige.models._selection import (
        WORDS as WORDS,
        layer_number as layer_number,
        parameter_words as parameter_words,
        select_components as select_components,
    )
    from vestige.models._source import (
        find_source as find_source,
        require_model as require_model,
        require_place as require_place,
    )
    from vestige.models._training import (
        Lora as Lora,
        save_trained as save_trained,
        trainable_copy as trainable_copy,
        write_model as write_model,
    )
    from vestige.models._weights import (
        Bits as Bits,
        model_fingerprint as model_fingerprint,
        quantized_bits as quantized_bits,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
