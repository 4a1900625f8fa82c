"""traker's scores with its own projector: `PEER/bin/python traker_peer.py FOLDER OUT DIMENSION DAMPING`.

The output is the log-odds of the example's mean token probability, as Vestige's `trak` takes it. The projector is the
pure torch one; the published fast one needs CUDA.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from scores import Sequences, load_model, report, run
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import BasicProjector, ProjectionType

BATCH = 8


class LogOdds(AbstractModelOutput):
    """log p - log(1 - p), p the exponential of minus the mean token loss."""

    def __init__(self) -> None:
        pass

    def get_output(self, model, weights, buffers, tokens):
        loss = self._loss(model, weights, buffers, tokens[None])[0]
        return -loss - torch.log(-torch.expm1(-loss))

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return (1 - torch.exp(-self._loss(model, weights, buffers, batch[0]))).detach()[:, None]

    def _loss(self, model, weights, buffers, tokens):
        logits = torch.func.functional_call(model, (weights, buffers), (tokens,)).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        return losses.mean(1)


def main() -> None:
    """Featurize, then score."""
    folder, out, dimension, damping = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    report(out, "traker", [run("trak", lambda: _scores(folder, out, dimension, damping))])


def _scores(folder: Path, out: Path, dimension: int, damping: float):
    train, queries = Sequences(folder, "train").tokens, Sequences(folder, "queries").tokens
    model = load_model(folder)
    names = [name for name, _ in model.named_parameters() if "proj" in name]
    size = sum(model.get_parameter(name).numel() for name in names)
    projector = BasicProjector(size, dimension, 0, ProjectionType.rademacher, torch.device("cpu"), block_size=128)
    tracker = TRAKer(
        model=model,
        task=LogOdds(),
        train_set_size=len(train),
        save_dir=str(out / "traker"),
        device="cpu",
        projector=projector,
        proj_dim=dimension,
        grad_wrt=names,
        use_half_precision=False,
    )
    tracker.load_checkpoint(model.state_dict(), model_id=0)
    for rows in train.split(BATCH):
        tracker.featurize(batch=[rows], num_samples=len(rows))
    features = torch.as_tensor(tracker.saver.current_store["grads"]).float()
    # traker's ridge is absolute: a share of the mean eigenvalue, as the others take it.
    tracker.score_computer.lambda_reg = damping * float(features.square().sum()) / dimension
    tracker.finalize_features()
    tracker.start_scoring_checkpoint("agreement", model.state_dict(), model_id=0, num_targets=len(queries))
    for rows in queries.split(BATCH):
        tracker.score(batch=[rows], num_samples=len(rows))
    return tracker.finalize_scores("agreement").T


main()
