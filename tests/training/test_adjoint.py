"""Steps of optimizers, walked backward, against finite differences of training again with other weights, in float64."""

import pytest
import torch
from torch import nn

from vestige.online import read_rule
from vestige.training import Adjoints, Moved, unclip

EXAMPLES, STEP = 9, 1e-5
OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.9), eps=1e-6),
    "adam with a penalty": lambda groups: torch.optim.Adam(groups, lr=0.05, weight_decay=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.2),
    "sgd with momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.7, weight_decay=0.05),
    "sgd, dampened": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.7, dampening=0.3),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.7, nesterov=True, weight_decay=0.05),
}
BATCHES = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [2, 5, 8], [0, 0, 7], [4]]
"""With a ragged end, and one example twice in a batch."""


class Network(nn.Module):
    """Two layers that share a weight, and one that no loss reaches."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.idle = nn.Parameter(torch.ones(3))
        self.outer = nn.Linear(4, 2, bias=False)

    def forward(self, inputs):
        return self.outer(torch.tanh(self.inner(torch.tanh(self.inner(inputs)))))


@pytest.fixture
def task():
    torch.manual_seed(0)
    model = Network().double()
    inputs, labels = torch.randn(EXAMPLES, 4).double(), torch.randint(2, (EXAMPLES,))
    queries = torch.randn(3, 4).double(), torch.tensor([0, 1, 1])
    return model, inputs, labels, queries


def losses_of(model, inputs, labels):
    return nn.functional.cross_entropy(model(inputs), labels, reduction="none")


def train(task, kind, weights, *, clip=0.0, schedule=False, watch=lambda *_: None):
    """Train from the start with these weights of examples, and return the losses of the queries."""
    start, inputs, labels, queries = task
    model = Network().double()
    model.load_state_dict(start.state_dict())
    bias = [model.inner.bias]
    others = [model.inner.weight, model.outer.weight, model.idle]
    optimizer = OPTIMIZERS[kind]([{"params": others, "weight_decay": 0.2}, {"params": bias, "weight_decay": 0.0}])
    for number, rows in enumerate(BATCHES):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9 if schedule else 1.0
        loss = (losses_of(model, inputs[rows], labels[rows]) * weights[rows]).sum() / 3
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
        before = watch("before", number, model, optimizer, float(norm))
        optimizer.step()
        watch("after", number, model, optimizer, before)
        optimizer.zero_grad()
    return losses_of(model, *queries), model


def walk_back(task, kind, **given):
    """Return the derivative of every query's loss in every example's weight."""
    inputs, labels = task[1:3]
    tape = []

    def watch(moment, number, model, optimizer, extra):
        if moment == "before":
            named = {parameter: name for name, parameter in model.named_parameters()}
            return extra, {
                named[each]: (
                    read_rule(optimizer, group, optimizer.state[each], ""),
                    each.detach().clone(),
                    each.grad.clone(),
                )
                for group in optimizer.param_groups
                for each in group["params"]
                if each.grad is not None
            }
        norm, found = extra
        state = {name: optimizer.state[each] for name, each in model.named_parameters()}
        moved = {
            name: Moved(*each, state[name].get("exp_avg"), state[name].get("exp_avg_sq"))
            for name, each in found.items()
        }
        # The optimizer moves its moments in place.
        moved = {
            name: Moved(m.rule, m.weight, m.gradient, *(None if x is None else x.clone() for x in (m.first, m.second)))
            for name, m in moved.items()
        }
        tape.append((norm, moved))
        return None

    losses, model = train(task, kind, torch.ones(EXAMPLES).double(), watch=watch, **given)
    parameters = dict(model.named_parameters())
    rows = [torch.autograd.grad(loss, [*parameters.values()], retain_graph=True, allow_unused=True) for loss in losses]
    weights = {
        name: torch.stack([torch.zeros_like(each) if row[place] is None else row[place] for row in rows])
        for place, (name, each) in enumerate(parameters.items())
    }
    adjoints, found = Adjoints(weights), torch.zeros(len(losses), EXAMPLES).double()
    for (norm, moved), batch in zip(reversed(tape), reversed(BATCHES), strict=True):
        model.load_state_dict({name: each.weight for name, each in moved.items()}, strict=False)
        change = unclip(
            adjoints.step_back(moved), {name: each.gradient for name, each in moved.items()}, norm, given.get("clip", 0)
        )
        for query in range(len(losses)):
            for row in dict.fromkeys(batch):
                loss = losses_of(model, inputs[[row]], labels[[row]])[0] * batch.count(row) / 3
                names = [*change]
                slopes = torch.autograd.grad(loss, [parameters[name] for name in names], create_graph=True)
                product = sum((slope * change[name][query]).sum() for name, slope in zip(names, slopes, strict=True))
                found[query, row] += product.detach()
                curved = torch.autograd.grad(product, [parameters[name] for name in names])
                for name, each in zip(names, curved, strict=True):
                    adjoints.weights[name][query] += each
    return found


@pytest.mark.parametrize("clip", [0.0, 0.05], ids=["", "clipped"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_walk_back_is_the_derivative_of_training_again(task, kind, clip):
    found = walk_back(task, kind, clip=clip, schedule=True)
    for row in range(EXAMPLES):
        ends = []
        for sign in (1, -1):
            weights = torch.ones(EXAMPLES).double()
            weights[row] += sign * STEP
            ends.append(train(task, kind, weights, clip=clip, schedule=True)[0].detach())
        expected = (ends[0] - ends[1]) / (2 * STEP)
        torch.testing.assert_close(found[:, row], expected, rtol=1e-6, atol=1e-9)


def test_a_norm_that_is_just_clipped_and_one_that_is_not():
    gradients = {"a": torch.tensor([3.0, 4.0]).double()}
    adjoints = {"a": torch.tensor([[1.0, 2.0]]).double()}
    assert unclip(adjoints, gradients, 5.0, 0.0) is adjoints
    assert unclip(adjoints, gradients, 5.0, 6.0) is adjoints
    (along,) = unclip(adjoints, {"a": gradients["a"] / 5}, 5.0, 1.0).values()
    # A clipped gradient cannot grow longer: what is left of the adjoint is at right angles to it.
    assert float((along[0] * gradients["a"]).sum().abs()) < 1e-5


def test_optimizers_that_cannot_be_walked_backward_are_refused():
    weight = nn.Parameter(torch.ones(2))
    for optimizer, words in [
        (torch.optim.Adagrad([weight]), "Adagrad has steps .* Train with SGD."),
        (torch.optim.Adam([weight], amsgrad=True), "AMSGrad"),
    ]:
        with pytest.raises(Exception, match=words):
            read_rule(optimizer, optimizer.param_groups[0], {}, "Train with SGD.")
