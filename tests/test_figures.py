"""What all figures share."""

from vestige.figures import COLOURS, choose_colours


def test_trap_no_colour_comes_twice_however_many_lines_there_are():
    """In a published figure of eight types and more, two had one colour."""
    assert choose_colours(3) == COLOURS[:3]
    for count in (8, 9, 20):
        found = choose_colours(count)
        assert len({colour.lower() for colour in found}) == count
        assert found[:8] == COLOURS
