"""Is the gradient of every component exact, on every causal architecture of the installed transformers?

Each model is tiny and random, its weights moved off their start, in float64. All components of three sequences of
uneven length in one batch are compared with autograd on one sequence at a time, component by component.

    python benchmarks/architectures.py [--only mamba2,phimoe] [--part 1/3]
"""

import argparse
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from tables import aligned
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vestige.data import Batch
from vestige.errors import UserError
from vestige.gradients import CausalLoss, GradientPass, GradientSink
from vestige.models import Component, parameter_view, select_components

TOLERANCE = 1e-9
MOST_PARAMETERS = 3_000_000
VOCABULARY = 67
LENGTHS = (5, 17, 9)
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "emb_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "linear_num_value_heads", "mamba_n_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_ff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("intermediate_size_mlp", "expert_ffn_hidden_size", "ffn_hidden_size"), 32),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "num_hash_layers"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "index_head_dim"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "num_mem_blocks", "num_nextn_predict_layers"), 1),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 0),
    "eos_token_id": 1,
    "pad_token_id": 2,
    "is_decoder": True,
    "use_cache": False,
}
"""What an architecture is given, where its configuration has an entry of that name."""
SETTINGS: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe", "mlp"], "mamba_num_heads": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "opt": {"word_embed_proj_dim": 32},
}


class Row(NamedTuple):
    """What one architecture gave."""

    kind: str
    verdict: str
    """exact, refused, WRONG or not built."""
    error: float | None
    """Largest difference of a component, relative to the largest gradient of the example."""
    components: int
    uncovered: str
    """Kinds of parameters that are listed as not covered."""
    note: str


class _Wide(TorchFunctionMode):
    """Float64 wherever a model asks for float32: its own rounding is no error of the gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        wide = {torch.float32: torch.float64}
        args = tuple(wide.get(one, one) if isinstance(one, torch.dtype) else one for one in args)
        named = {
            name: wide.get(one, one) if isinstance(one, torch.dtype) else one for name, one in (kwargs or {}).items()
        }
        return func(*args, **named)


def build(kind: str) -> nn.Module:
    """A tiny random model in float64; `ValueError` where it stays large."""
    config_class = CONFIG_MAPPING[kind]
    known = vars(config_class()).keys() | getattr(config_class, "attribute_map", {}).keys()
    settings = {name: value for name, value in TINY.items() if name in known} | SETTINGS.get(kind, {})
    config = config_class(**settings, experts_implementation="eager")
    with torch.device("meta"):
        size = sum(one.numel() for one in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def check(kind: str) -> Row:
    """Compare one architecture with autograd."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            model = build(kind)
            sequences = [torch.randint(3, VOCABULARY, (length,)) for length in LENGTHS]
            with _Wide(), torch.no_grad():
                model(input_ids=sequences[0][None], use_cache=False).logits  # noqa: B018
    except Exception as error:
        return Row(kind, "not built", None, 0, "", f"{type(error).__name__}: {error}".splitlines()[0][:90])
    selection = select_components(model, ("all",))
    uncovered = "; ".join(
        dict.fromkeys(row.reason.removeprefix("no rule for ") for row in selection.coverage if row.reason)
    )
    try:
        with _Wide():
            found = gradients(model, selection.components, sequences)
    except UserError as error:
        return Row(kind, "refused", None, len(selection.components), uncovered, str(error))
    with _Wide():
        worst, name = max(_errors(model, selection.components, sequences, found))
    verdict = "exact" if worst <= TOLERANCE else "WRONG"
    return Row(kind, verdict, worst, len(selection.components), uncovered, "" if verdict == "exact" else name)


def gradients(model: nn.Module, components: tuple[Component, ...], sequences: list[Tensor]) -> list[Tensor]:
    """Of all sequences in one batch, as Vestige computes them: `[example, out, in]` for each component."""
    tokens = torch.full((len(sequences), max(map(len, sequences))), 3)
    labels = torch.full_like(tokens, -100)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)] = ids
        labels[row, : len(ids)] = ids
    sink = GradientSink(components)
    sink.begin(len(sequences), "cpu", torch.float64)
    with GradientPass(model, components, CausalLoss()) as gradient_pass:
        gradient_pass.run(Batch(torch.arange(len(sequences)), tokens, labels), sink)
    return sink.gradients


def _errors(
    model: nn.Module, components: tuple[Component, ...], sequences: list[Tensor], found: list[Tensor]
) -> Iterator[tuple[float, str]]:
    for row, ids in enumerate(sequences):
        model.requires_grad_(True).zero_grad()
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
        true = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        scale = max(float(gradient.norm()) for gradient in true.values())
        for number, component in enumerate(components):
            expected = torch.zeros(component.shape, dtype=torch.float64)
            if component.parameter in true:
                expected = parameter_view(model, component, true[component.parameter])
            yield float((found[number][row] - expected).norm()) / scale, component.name


def kinds(part: str = "1/1") -> list[str]:
    """Names of causal architectures, or every n-th of them."""
    number, count = map(int, part.split("/"))
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)[number - 1 :: count]


def main() -> None:
    """Print the table; end with status 1 if a gradient is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="architectures, separated by commas")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th architecture")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    for kind in given.only.split(",") if given.only else kinds(given.part):
        rows.append(check(kind))
        print(rows[-1], file=sys.stderr, flush=True)
    built = [row for row in rows if row.verdict != "not built"]
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("exact", "refused", "WRONG")}
    print(f"{len(built)} of {len(rows)} architectures of transformers {transformers.__version__} compared: {counts}\n")
    lines = [["architecture", "gradients", "largest difference", "components", "listed as not covered"]]
    lines += [["---"] * 5]
    for row in built:
        error = "" if row.error is None else f"{row.error:.0e}"
        lines.append([row.kind, row.verdict, error, str(row.components), row.uncovered.replace("|", "/") or "nothing"])
    print(aligned(lines))
    for row in rows:
        if row.verdict != "exact":
            print(f"\n{row.kind}: {row.verdict}: {row.note}", end="")
    sys.exit(int(counts["WRONG"] > 0))


if __name__ == "__main__":
    main()
