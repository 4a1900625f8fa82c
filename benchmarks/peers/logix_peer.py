"""LogIX's scores: `PEER/bin/python logix_peer.py FOLDER OUT RANK`.

Inner products of whole gradients, and influence with its random LoRA projection and the covariance of projected
gradients, damped by its default (a tenth of the mean eigenvalue). Its encoders and decoders are left beside the scores,
so that a reference can use the same maps.
"""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from logix import LogIX, LogIXScheduler
from logix.config import LoRAConfig
from logix.statistic import Log
from scores import Sequences, load_model, report, run

BATCH = 16


def main() -> None:
    """Whole, then projected."""
    folder, out, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    os.chdir(out)  # LogIX writes below the current folder.
    train, queries = Sequences(folder, "train"), Sequences(folder, "queries")
    report(out, "logix", [run("identity", lambda: _scores(folder, train, queries, "whole", "none", "none", rank))])
    projected = run("lora", lambda: _scores(folder, train, queries, "lora", "random", "raw", rank))
    report(out, "logix", [projected])


def _scores(folder, train, queries, project, lora, hessian, rank):
    torch.manual_seed(0)
    logix, model = LogIX(project=project), load_model(folder)
    logix.set_lora_config(LoRAConfig(init="random", rank=rank))
    logix.watch(model, name_filter=["self_attn", "mlp"], type_filter=[torch.nn.Linear])
    for _ in LogIXScheduler(logix, lora=lora, hessian=hessian, save="grad"):
        for start in range(0, len(train), BATCH):
            rows = range(start, min(start + BATCH, len(train)))
            _log(logix, model, train.tokens[list(rows)], [str(row) for row in rows])
        logix.finalize()
    loader = logix.build_log_dataloader(batch_size=BATCH)
    # Without this the queries' gradients would be added to the covariance.
    logix.setup({"grad": [Log]})
    logix.eval()
    _log(logix, model, queries.tokens, [f"query{row}" for row in range(len(queries))])
    log = logix.get_log()
    found = logix.compute_influence_all(log, loader, mode="dot", precondition=hessian != "none")
    order = [found["tgt_ids"].index(str(row)) for row in range(len(train))]
    if lora != "none":
        torch.save({name: part for name, part in model.state_dict().items() if "logix_lora" in name}, "maps.pt")
    return found["influence"][:, order]


def _log(logix, model, tokens, names) -> None:
    with logix(data_id=names):
        model.zero_grad()
        logits = model(input_ids=tokens).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()


main()
