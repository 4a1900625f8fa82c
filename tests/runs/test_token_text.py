import numpy as np

from vestige.runs import token_texts


class Bytes:
    """One token per byte, as in byte-level BPE without merges."""

    def decode(self, token_ids, **options) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


class Pieces:
    """SentencePiece style: a leading space of the first piece is dropped."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def decode(self, token_ids, **options) -> str:
        return "".join(self.words[number] for number in token_ids).removeprefix(" ")


def test_characters_over_several_tokens_go_to_the_last_one():
    text = "naïve 🙂!"
    ids = np.frombuffer(text.encode(), dtype=np.uint8)
    pieces = token_texts(ids, Bytes())
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert pieces[2:4] == ["", "ï"]


def test_dropped_spaces_come_back():
    pieces = token_texts(np.array([0, 1, 2, 1]), Pieces([" the", " cat", "s"]))
    assert pieces == ["the", " cat", "s", " cat"]


def test_a_text_cut_inside_a_character_still_has_one_piece_per_token():
    ids = np.frombuffer("ab🙂".encode(), dtype=np.uint8)[:-1]
    assert len(token_texts(ids, Bytes())) == len(ids)


def test_without_a_tokenizer_there_are_no_pieces():
    assert token_texts(np.array([1, 2]), None) == []
