"""Runs bergson in its own interpreter: one JSON request per line on stdin, one JSON answer per line on stdout.

Start-up and imports are over before the first request is read, so they are in no measurement.
"""

import json
import os
import sys
from pathlib import Path

from measure import measure, pin

PROJECTION = 16
BATCH_TOKENS = 2048


def main() -> None:
    """Answer requests until stdin closes. bergson prints to stdout: the answers keep the real one for themselves."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    pin(int(sys.argv[2]))
    session = _Session(Path(sys.argv[1]))
    print(json.dumps({"ready": session.version}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(session, request.pop("do"))(**request)
        print(json.dumps(answer), file=answers, flush=True)


class _Session:
    """bergson's Python API on the benchmark's model and data."""

    def __init__(self, folder: Path) -> None:
        import bergson
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(1)
        self.version, self._folder = bergson.__version__, folder
        self._model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
        # As bergson's own worker prepares a model.
        self._model.requires_grad_(False)
        self._model.get_input_embeddings().requires_grad_(True)
        self._queries = {}

    def build(self, workload: str, out: str, seed: int | None = None) -> dict:
        """An index on disk."""
        data = self._data(workload)
        path = Path(out)
        cost = measure(lambda: self._collect(data, path, PROJECTION, seed=seed), leaves=_part(path))
        return cost.to_dict()

    def gradients(self, workload: str, out: str, seed: int) -> dict:
        """An index, and where its rows are, in the order of the data."""
        from bergson.data import load_gradients

        cost = self.build(workload, out, seed)
        rows = load_gradients(_part(Path(out)))
        return {**cost, "file": str(rows.filename), "shape": list(rows.shape)}

    def score(self, workload: str, queries: str, out: str) -> dict:
        """Exact inner products with the gradients of queries, without an index of the training data."""
        import numpy as np
        import torch
        from bergson import Scorer
        from bergson.score.score_writer import InMemorySequenceScoreWriter

        if queries not in self._queries:
            self._queries[queries] = self._query_gradients(queries, Path(out))
        vectors = self._queries[queries]
        data = self._data(workload)
        count = len(next(iter(vectors.values())))
        writer = InMemorySequenceScoreWriter(len(data), count)
        scorer = Scorer(vectors, list(vectors), writer, torch.device("cpu"), torch.float32)
        cost = measure(lambda: self._collect(data, Path(out), 0, scorer=scorer))
        np.save(Path(out + ".npy"), writer.scores.numpy().T)
        return cost.to_dict()

    def _query_gradients(self, queries: str, out: Path) -> dict:
        import numpy as np
        import torch
        from bergson.data import load_gradients

        path = out.with_name(out.name + "-queries")
        self._collect(self._data(queries), path, 0)
        sizes = json.loads((_part(path) / "info.json").read_text())["grad_sizes"]
        rows, start, vectors = np.array(load_gradients(_part(path))), 0, {}
        for name, size in sizes.items():
            vectors[name] = torch.from_numpy(rows[:, start : start + size].copy())
            start += size
        return vectors

    def _collect(self, data, path: Path, projection: int, *, seed=None, scorer=None) -> None:
        from bergson import GradientProcessor, IndexConfig, collect_gradients
        from bergson.data import allocate_batches

        config = IndexConfig(run_path=str(path), projection_dim=projection, token_batch_size=BATCH_TOKENS)
        _part(path).mkdir(parents=True, exist_ok=True)
        processor = GradientProcessor(projection_dim=projection or None, projection_seed=seed)
        batches = allocate_batches(data["length"][:], BATCH_TOKENS)
        collect_gradients(self._model, data, processor, config, batches=batches, scorer=scorer)

    def _data(self, workload: str):
        from datasets import Dataset
        from workload import load

        content = load(self._folder, workload)
        columns = {"input_ids": content.tokens, "labels": content.labels, "length": content.lengths}
        return Dataset.from_dict(columns)


def _part(path: Path) -> Path:
    return Path(f"{path}.part")


if __name__ == "__main__":
    main()
