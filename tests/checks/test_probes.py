import numpy as np

from vestige.checks import PROBE_TOKENS, choose_probes, cut_examples, pad_examples
from vestige.data import Example, TokenizedData


def data_of(lengths, first_target=1) -> TokenizedData:
    ids = [np.arange(length, dtype=np.int32) for length in lengths]
    targets = [np.arange(length) >= first_target for length in lengths]
    examples = [Example(f"e{row}", row, text="") for row in range(len(lengths))]
    return TokenizedData(examples, ids, targets, np.zeros(len(lengths), dtype=bool), "f")


def test_probes_are_short_and_of_different_lengths():
    probes = choose_probes(data_of([900, 5, 9, 40, 41, 60, 1, 800]), 1024)
    assert len(probes) == 4
    assert probes.lengths.tolist() == sorted(set(probes.lengths.tolist()))
    assert probes.lengths.max() <= PROBE_TOKENS
    assert probes.target_counts.min() > 0


def test_long_examples_are_cut_around_their_first_target():
    probes = choose_probes(data_of([900, 700, 800], first_target=600), 1024)
    assert probes.lengths.tolist() == [PROBE_TOKENS] * 3
    assert (probes.target_counts > 0).all()
    assert all(600 in ids for ids in probes.input_ids)


def test_probes_leave_room_for_padding_in_a_short_context():
    assert choose_probes(data_of([30, 31, 29]), 32).lengths.max() == 25


def test_a_window_keeps_what_is_short_and_never_learns_its_first_token():
    data = data_of([3, 12], first_target=0)
    cut = cut_examples(data, 5)
    assert [ids.tolist() for ids in cut.input_ids] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert not any(mask[0] for mask in cut.targets)


def test_padding_is_not_learned():
    wide = pad_examples(data_of([3, 5]), np.array([6, 6]))
    assert wide.lengths.tolist() == [6, 6]
    assert wide.target_counts.tolist() == [2, 4]
