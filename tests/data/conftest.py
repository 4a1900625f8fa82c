"""Tiny tokenizers, trained here: byte-level BPE without and with a beginning token, chat templates, a slow one."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

LINES = [
    "What is the capital of France? The capital of France is Paris.",
    "Why is the sky blue? The sky is blue because of scattering.",
    "user assistant system question answer hello world, good morning!",
    "Grüße aus Köln, こんにちは世界, naïve café.",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Qwen3: only the last assistant turn keeps its empty thoughts, so a shorter conversation is no prefix.
REWRITING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Llama 2: the template writes the beginning token, has no generation prompt and takes turns strictly.
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def _byte_level(frame: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if frame is not None:
        named = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        framing = processors.TemplateProcessing(single=frame, special_tokens=named)
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), framing])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=64,
    )


@pytest.fixture
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE that adds nothing; offsets leave out leading spaces, as GPT-2's do."""
    return _byte_level()


@pytest.fixture
def with_beginning() -> PreTrainedTokenizerFast:
    """The same, but `<s>` is put in front of every text."""
    return _byte_level(frame="<s> $A")


@pytest.fixture
def with_both_ends() -> PreTrainedTokenizerFast:
    """The same, but with `<s>` in front of every text and `</s>` behind it."""
    return _byte_level(frame="<s> $A </s>")


@pytest.fixture
def chatml(with_beginning: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    with_beginning.chat_template = CHATML
    return with_beginning


@pytest.fixture
def chatml_marked(with_beginning: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    with_beginning.chat_template = CHATML_MARKED
    return with_beginning


@pytest.fixture
def rewriting(with_beginning: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    with_beginning.chat_template = REWRITING
    return with_beginning


@pytest.fixture
def instruct(with_beginning: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    with_beginning.chat_template = INSTRUCT
    return with_beginning


class Letters(PreTrainedTokenizer):
    """A slow tokenizer: one token per character, `^` in front."""

    def __init__(self, **settings):
        self._letters = ["^", "$", "?", *sorted(set("abcdefghijklmnopqrstuvwxyz ABCQ:.\n<>|_"))]
        super().__init__(bos_token="^", eos_token="$", unk_token="?", **settings)

    @property
    def vocab_size(self) -> int:
        return len(self._letters)

    def get_vocab(self) -> dict[str, int]:
        return {letter: number for number, letter in enumerate(self._letters)}

    def _tokenize(self, text: str) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._letters.index(token) if token in self._letters else 2

    def _convert_id_to_token(self, index: int) -> str:
        return self._letters[index]

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1=None) -> list[int]:
        return [0, *token_ids_0]


@pytest.fixture
def letters() -> Letters:
    return Letters()
