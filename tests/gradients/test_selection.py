"""What has no rule is listed with the reason; a pattern names what it says and no more."""

import torch
from torch import nn

from vestige.models import select_components


def test_packed_weights_are_listed_with_the_reason() -> None:
    """What bitsandbytes leaves of a Linear in 4 and in 8 bits; the bias is a plain vector and stays exact."""

    class Linear4bit(nn.Linear):
        pass

    four, eight = Linear4bit(8, 6), nn.Linear(8, 6, bias=False)
    four.weight = nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)
    eight.weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.int8), requires_grad=False)
    selection = select_components(nn.ModuleDict({"four": four, "eight": eight}), ("all",))
    rows = {row.name: row.reason for row in selection.coverage}
    assert "'weight' of Linear4bit: packed as torch.uint8; select a LoRA adapter" in rows["four.weight"]
    assert "packed as torch.int8" in rows["eight.weight"]
    assert [component.name for component in selection.components] == ["four.bias"]


def test_block_1_is_not_block_10() -> None:

    blocks = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(2, 2) for _ in range(12)])})
    names = {component.name for component in select_components(blocks, ("h.1.*",)).components}
    assert names == {"h.1.weight", "h.1.bias"}
    assert {component.name for component in select_components(blocks, ("all", "layers 1")).components} == names
