"""Loading models, choosing components, fine-tuning."""

from vestige.models._components import WORDS as WORDS
from vestige.models._components import layer_number as layer_number
from vestige.models._components import parameter_words as parameter_words
from vestige.models._components import select_components as select_components
from vestige.models._finetune import Lora as Lora
from vestige.models._finetune import finetune as finetune
from vestige.models._finetune import save_trained as save_trained
from vestige.models._finetune import trainable_copy as trainable_copy
from vestige.models._fingerprint import model_fingerprint as model_fingerprint
from vestige.models._generate import Answer as Answer
from vestige.models._generate import answer_prompts as answer_prompts
from vestige.models._generate import generate_answers as generate_answers
from vestige.models._layer_kinds import layer_kind as layer_kind
from vestige.models._layer_kinds import parameter_view as parameter_view
from vestige.models._load import Precision as Precision
from vestige.models._load import context_length as context_length
from vestige.models._load import load_model as load_model
from vestige.models._training import Recipe as Recipe
from vestige.models._training import Step as Step
from vestige.models._training import shuffled_batches as shuffled_batches
from vestige.models._training import train as train
from vestige.models._types import Component as Component
from vestige.models._types import CoverageRow as CoverageRow
from vestige.models._types import LoadedModel as LoadedModel
from vestige.models._types import Selection as Selection
from vestige.models._types import Use as Use
