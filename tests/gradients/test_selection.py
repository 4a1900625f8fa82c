"""What has no rule is listed with the reason; a pattern names what it says and no more."""

import pytest
import torch
from torch import nn

from tests.architectures import llama
from vestige.errors import SpecError
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


def test_whole_parts_of_a_name_select_as_the_published_spellings_do() -> None:
    """GhostSuite's `--proj_layers` match parts of names; there `h.1` also matched `h.10`."""
    parts = {"mlp": "c_fc", "attn": "c_attn"}
    blocks = [
        nn.ModuleDict({name: nn.ModuleDict({part: nn.Linear(2, 2)}) for name, part in parts.items()}) for _ in range(12)
    ]
    model = nn.ModuleDict({"transformer": nn.ModuleDict({"h": nn.ModuleList(blocks)})})

    def named(*patterns: str) -> set[str]:
        return {component.name.removesuffix(".weight") for component in select_components(model, patterns).components}

    assert {"transformer.h.1.mlp.c_fc", "transformer.h.1.attn.c_attn"} <= named("transformer.h.1", "!*.bias")
    assert not any(".10." in name for name in named("transformer.h.1,transformer.h.11"))
    assert named("mlp.c_fc", "!*.bias") == {f"transformer.h.{number}.mlp.c_fc" for number in range(12)}
    assert len(named("attn", "mlp.c_fc", "!*.bias")) == 24
    with pytest.raises(SpecError, match="matches no parameter"):
        named("mlp.c_f")


def test_a_file_of_parameters_is_a_selection(tmp_path) -> None:
    model = llama()
    chosen = tmp_path / "chosen.components"
    chosen.write_text("# what was found\nmodel.layers.0.mlp.up_proj.weight\n\nmodel.layers.1.*.v_proj.weight\n")
    found = [component.name for component in select_components(model, (f"@{chosen}",)).components]
    assert found == ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight"]
    found = [component.name for component in select_components(model, (f"@{chosen}", "!mlp")).components]
    assert found == ["model.layers.1.self_attn.v_proj.weight"]


def test_a_file_that_is_absent_or_empty_says_so(tmp_path) -> None:
    model = llama()
    with pytest.raises(SpecError, match="absent does not read as text"):
        select_components(model, (f"@{tmp_path / 'absent'}",))
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(SpecError, match="names no parameter"):
        select_components(model, (f"@{tmp_path / 'empty'}",))
