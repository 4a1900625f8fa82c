"""dattri's EK-FAC, DataInf and LoGra; `common.py` says how."""

import os

import torch
from common import BATCH, Job, run, sum_loss
from dattri.algorithm import IFAttributorDataInf, IFAttributorEKFAC, LoGraAttributor
from dattri.task import AttributionTask
from torch.utils.data import DataLoader, TensorDataset


def _prepare(job: Job):
    model, maps = job.load_linear()

    def loss(weights, batch):
        tokens = batch[0].flatten(0, -2)
        return sum_loss(torch.func.functional_call(model, weights, (tokens,)).logits, tokens)

    train, queries = map(TensorDataset, job.load_rows())
    return AttributionTask(loss, model, model.state_dict()), maps, train, queries


def ekfac(job: Job):
    """Its defaults, damped as kronfluence is."""
    task, maps, train, queries = _prepare(job)
    attributor = IFAttributorEKFAC(task, module_name=maps, damping=1e-8)
    attributor.cache(DataLoader(train, BATCH))
    return attributor.attribute(DataLoader(train, BATCH), DataLoader(queries, BATCH)).T.detach()


def datainf(job: Job):
    """In one batch: what is done with the queries is done again for every batch of the training data."""
    task, maps, train, queries = _prepare(job)
    layers = [f"{name}.{part}" for name in maps for part in ("weight", "bias")]
    attributor = IFAttributorDataInf(task, layer_name=layers, regularization=0.1)
    attributor.cache(DataLoader(train, len(train)))
    return attributor.attribute(DataLoader(train, len(train)), DataLoader(queries, len(queries))).T.detach()


def logra(job: Job):
    """As many numbers of each map as Vestige's logra:32x32 has, damped by a tenth of the mean eigenvalue."""
    os.chdir(job.out)  # It writes into the current folder.
    model, maps = job.load_linear()

    def loss(model, batch, _):
        return sum_loss(model(batch["input_ids"]).logits, batch["input_ids"])

    task = AttributionTask(loss, model, model.state_dict())
    rows = [[{"input_ids": row, "labels": row} for row in each] for each in job.load_rows()]
    train, queries = (DataLoader(each, BATCH) for each in rows)
    attributor = LoGraAttributor(task, layer_names=maps, proj_dim=1024, damping=0.1)
    attributor.cache(train)
    return attributor.attribute(train, queries).T.detach()


if __name__ == "__main__":
    run({"ekfac": ekfac, "datainf regularization=0.1": datainf, "logra proj_dim=1024 damping=0.1": logra})
