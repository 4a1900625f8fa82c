import pytest

from vestige.reports import cut, find_overlap, find_rare_words, split_words
from vestige.runs import Wording


def compare(answer: str, example: str, rare: str = ""):
    query = split_words(cut(Wording(prompt="Tell me", completion=answer)))
    return find_overlap(query, split_words(cut(Wording(text=example))), frozenset(rare.split()))


def marked(text: str, ranges) -> list[str]:
    pieces = cut(Wording(text=text)).texts
    return ["".join(pieces[start:stop]).strip() for start, stop in ranges]


def test_three_common_words_in_order_are_verbatim_whatever_their_case_and_punctuation():
    example = "Everyone knows: THE SKY, IS green."
    found = compare("The sky is blue.", example)
    assert marked(example, found.example) == ["THE SKY, IS"]
    assert found.share == pytest.approx(3 / 4)


def test_two_common_words_are_not():
    assert compare("The sky is blue.", "Below the sky we walk").example == ()


def test_a_short_run_of_rare_words_is():
    example = "I read about Rayleigh scattering."
    assert marked(example, compare("Because of Rayleigh scattering", example, "rayleigh scattering").example) == [
        "Rayleigh scattering."
    ]


def test_a_rare_but_short_word_is_not():
    assert compare("It is blue", "A blue car", "blue").example == ()


def test_no_run_crosses_from_question_into_answer():
    query = split_words(cut(Wording(prompt="one two", completion="three four")))
    example = split_words(cut(Wording(text="one two three four")))
    assert find_overlap(query, example, frozenset()).example == ()


def test_the_longest_of_overlapping_runs_is_marked_whole():
    example = "a b c x a b c d e"
    found = compare("a b c d e", example)
    assert marked(example, found.example) == ["a b c", "a b c d e"]
    assert found.share == 1


def test_a_word_in_many_texts_is_not_rare():
    texts = [split_words(cut(Wording(text="common" if number else "common seldom"))) for number in range(5)]
    assert find_rare_words(texts) == {"seldom"}


def test_template_words_never_match():
    tokens = ("You", " are", " a", " bot", ".", "Hi", " you")
    same = split_words(cut(Wording(text="Hi you", tokens=tokens)))
    assert [word.text for word in same if word.text] == ["hi", "you"]


def test_an_answer_without_words_has_no_share():
    assert compare("?!", "anything").share is None


def test_no_run_crosses_turns_and_a_shared_system_prompt_is_no_overlap():
    def words(*messages):
        return split_words(cut(Wording(messages=messages)))

    system = ("system", "You are the kind helper of this shop.")
    query = words(system, ("user", "Please do tell"), ("user", "me why"), ("assistant", "Fine words."))
    example = words(system, ("user", "do tell me why fine words"))
    assert find_overlap(query, example, frozenset()).example == ()
    example = words(system, ("user", "Please do tell me"))
    start, stop = find_overlap(query, example, frozenset()).example[0]
    assert stop - start == 3
