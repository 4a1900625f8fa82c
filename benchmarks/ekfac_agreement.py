"""K-FAC and EK-FAC beside kronfluence's, with true labels, on an architecture that no test of Vestige has.

    python benchmarks/ekfac_agreement.py --peer-path FOLDER

FOLDER is where `pip install --no-deps --target FOLDER kronfluence einops einconv opt_einsum` put the peer. Rows are
uneven, and the first half of each has no label. Both tools get the same weights, tokens and damping (a tenth of the
mean eigenvalue). The scale is compared apart: kronfluence's K-FAC is `S (x) A`, Vestige's `T S (x) A`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tables import aligned
from transformers import StableLmConfig, StableLmForCausalLM

import vestige

VOCABULARY, TRAIN, QUERIES = 500, 64, 8


def main() -> None:
    """Make the model and the rows, ask both, print the table."""
    parser = argparse.ArgumentParser(description="Agreement with kronfluence.")
    parser.add_argument("--peer-path", required=True, help="Folder with kronfluence and what it needs.")
    options = parser.parse_args()
    os.environ["VESTIGE_QUIET"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = {name: draw_rows(count, seed) for name, count, seed in (("train", TRAIN, 0), ("queries", QUERIES, 1))}
        make_model(rows["train"]).save_pretrained(folder / "model")
        for part, drawn in rows.items():
            torch.save(padded(drawn), folder / f"{part}.pt")
        script = Path(__file__).parent / "peers" / "kronfluence_ekfac.py"
        environment = os.environ | {"PYTHONPATH": options.peer_path}
        subprocess.run([sys.executable, str(script), str(folder)], env=environment, check=True, capture_output=True)
        lines = [["", "counted by kronfluence", "Pearson", "largest difference, of the largest score", "scale"]]
        lines.append([":--", ":--", "--:", "--:", "--:"])
        for method in ("kfac", "ekfac"):
            ours = ask(folder, rows, method)
            for counted, words in (("attention_mask", "every token"), ("counted", "as Vestige does")):
                lines.append([method, words, *compare(ours, np.load(folder / f"{method}-{counted}.npy"))])
        print(aligned(lines))


def compare(ours: np.ndarray, theirs: np.ndarray) -> list[str]:
    """Pearson correlation, largest difference at the best common scale, and that scale, ours over theirs."""
    scale = float((ours * theirs).sum() / (theirs * theirs).sum())
    worst = float(np.abs(ours - scale * theirs).max() / np.abs(ours).max())
    return [f"{np.corrcoef(ours.ravel(), theirs.ravel())[0, 1]:.7f}", f"{worst:.1e}", f"{scale:.5f}"]


def ask(folder: Path, rows: dict[str, list[dict[str, list[int]]]], method: str) -> np.ndarray:
    """Our scores [query, example]."""
    scores = vestige.attribute(
        model=str(folder / "model"),
        data=rows["train"],
        queries=rows["queries"],
        method=method,
        components=("attention", "mlp"),
        damping=0.1,
        options={"labels": "data"},
        precision="float32",
        out=folder / f"run-{method}",
        dense=True,
        trust=False,
        answer="given",
        device="cpu",
    )
    return np.asarray(scores.dense())


def draw_rows(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Token rows of 6 to 40 tokens, of which the second half is labelled."""
    draw = np.random.default_rng(seed)
    rows = []
    for length in draw.integers(6, 41, size=count):
        ids = draw.zipf(1.3, size=length) % VOCABULARY
        labels = np.where(np.arange(length) >= length // 2, ids, -100)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def padded(rows: list[dict[str, list[int]]]) -> list[dict[str, torch.Tensor]]:
    """Every row at the longest length, with the masks of its tokens and of those up to the last that predicts."""
    width, found = 40, []
    for row in rows:
        length = len(row["input_ids"])
        place = torch.arange(width)
        fill = width - length
        found.append(
            {
                "input_ids": torch.tensor(row["input_ids"] + [0] * fill),
                "labels": torch.tensor(row["labels"] + [-100] * fill),
                "attention_mask": (place < length).long(),
                "counted": (place < length - 1).long(),
            }
        )
    return found


def make_model(rows: list[dict[str, list[int]]]) -> StableLmForCausalLM:
    """Two layers with biased query, key and value maps, trained for 40 steps."""
    torch.manual_seed(0)
    model = StableLmForCausalLM(
        StableLmConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_qkv_bias=True,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=None,
            attention_dropout=0.0,
        )
    )
    optimizer, batch = torch.optim.AdamW(model.parameters(), lr=3e-3), padded(rows)
    for step in range(40):
        some = [batch[row] for row in np.random.default_rng(step).choice(len(rows), 16, replace=False)]
        given = {name: torch.stack([one[name] for one in some]) for name in ("input_ids", "attention_mask", "labels")}
        optimizer.zero_grad()
        model(**given).loss.backward()
        optimizer.step()
    return model.eval()


if __name__ == "__main__":
    main()
