from vestige.reports import cut, read_tokens
from vestige.runs import Wording


def test_byte_level_tokens_become_text_and_a_split_character_goes_to_its_last_token():
    tokens = ("The", "Ġsky", "Ċ", "Ġcaf", "Ã", "©", "<|endoftext|>")
    assert read_tokens(tokens) == ("The", " sky", "\n", " caf", "", "é", "<|endoftext|>")


def test_sentencepiece_tokens_become_text():
    assert read_tokens(("▁The", "▁sky", "<0x0A>", "s")) == (" The", " sky", "\n", "s")


def test_decoded_tokens_pass_unchanged_even_with_a_letter_of_the_byte_alphabet():
    assert read_tokens(("Ġwan", " said")) == ("Ġwan", " said")


def test_chat_template_and_system_prompt_are_neither_prompt_nor_answer():
    tokens = ("<|im_start|>", "system", "\n", "Be", " kind", "<|im_end|>", "user", "\n", "Hi", "<|im_end|>", " Hello")
    pieces = cut(Wording(prompt="Hi", completion="Hello", tokens=tokens, targets=(False,) * 10 + (True,)))
    assert pieces.roles == "ttttttttpta"


def test_a_message_of_the_user_is_prompt_and_one_of_the_assistant_is_answer():
    wording = Wording(messages=(("user", "Who?"), ("assistant", "Me."), ("user", "Why?")))
    assert cut(wording).roles == "pap"
    tokens = ("<u>", "Who", "?", "<a>", " Me", ".", "<u>", "Why", "?")
    assert cut(Wording(messages=wording.messages, tokens=tokens)).roles == "tpptaatpp"


def test_a_text_cut_off_by_the_context_is_still_found():
    text = "one two three four five six seven eight nine ten"
    pieces = cut(Wording(text=text, tokens=("<s>", "one two three four five", " six", " seven")))
    assert pieces.roles == "taaa"


def test_where_the_tokenizer_rewrites_text_the_loss_mask_tells_prompt_from_answer():
    pieces = cut(
        Wording(prompt="HI", completion="HELLO", tokens=("<s>", "hi", "hel", "lo"), targets=(False, False, True, True))
    )
    assert pieces.roles == "tpaa"


def test_an_answer_that_ends_within_a_character_leaves_the_other_turns_as_they_are():
    messages = (("system", "Be kind."), ("user", "How so?"), ("assistant", "Da\ufffd\ufffd"))
    tokens = ("<s>", "Be", " kind", ".", "How", " so", "?", "Da", "\ufffd", "</s>")
    pieces = cut(Wording(messages=messages, tokens=tokens, targets=(False,) * 7 + (True,) * 3))
    assert pieces.roles == "tssspppaat"
    assert [turn.name for turn in pieces.turns] == ["System", "User", "Assistant"]


def test_without_tokens_words_are_the_pieces_and_nothing_is_lost():
    pieces = cut(Wording(prompt="Who  wrote\nit?", completion="I did."))
    assert "".join(pieces.texts) == "Who  wrote\nit?I did."
    assert (pieces.roles, pieces.from_tokens) == ("pppaa", False)


def test_system_user_and_assistant_are_turns_of_their_own_with_their_names():
    messages = (("system", "Be kind."), ("user", "How so?"), ("user", "Why?"), ("assistant", "Because."))
    names = ["System", "User", "User", "Assistant"]
    pieces = cut(Wording(messages=messages))
    assert pieces.roles == "sspppa"
    assert [turn.name for turn in pieces.turns] == names
    assert ["".join(pieces.texts[start:stop]) for start, stop, _ in pieces.turns] == [text for _, text in messages]
    # A template that writes nothing between the turns, so that only the contents tell them apart.
    tokens = ("<s>", "Be", " kind", ".", "How", " so", "?", "Why", "?", "Because", ".", "</s>")
    pieces = cut(Wording(messages=messages, tokens=tokens))
    assert pieces.roles == "tssspppppaat"
    assert [(turn.start, turn.stop) for turn in pieces.turns] == [(1, 4), (4, 7), (7, 9), (9, 11)]
    assert [turn.name for turn in pieces.turns] == names
