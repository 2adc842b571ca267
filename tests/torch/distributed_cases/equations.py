"""The gradient of a step on several ranks that share one perturbation, from the equations."""

import torch

from esam_core.directions import climbing_indices
from esam_core.selectors import subset_size
from esam_torch import Part, Previous


def mean_gradient(losses, parameters):
    """Return the mean over the ranks of the gradients of their mean losses."""
    rows = [torch.autograd.grad(values.mean(), parameters) for values in losses]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def step_by_hand(
    model, losses, batches, *, ascend, select, radius, count=0, perturbed=None, previous=None
):
    """Return the gradient of a step, and each rank's selected samples.

    Args:
        model: a model that is not sharded.
        losses: the losses of a batch.
        batches: the batches of the ranks.
        ascend: the direction.
        select: `TopLoss` or `TopIncrease`.
        radius: the length of the perturbation.
        count: the step count, for the part.
        perturbed: the names of the perturbed parameters. Default all.
        previous: the gradient of the last step, for `Previous`; None in the first step.
    """
    parameters = list(model.parameters())
    hit = [perturbed is None or name in perturbed for name, _ in model.named_parameters()]
    before = [losses(*batch) for batch in batches]
    gradient = previous
    if isinstance(ascend, Part):
        parts = [climbing_indices(ascend, len(x), seed=0, count=count) for x, _ in batches]
        chosen = [values[i] for values, i in zip(before, parts, strict=True)]
        gradient = mean_gradient(chosen, parameters)
    elif not isinstance(ascend, Previous):
        gradient = mean_gradient(before, parameters)
    if gradient is None:  # a base step
        return mean_gradient(before, parameters), None
    norm = sum(g.square().sum() for g, m in zip(gradient, hit, strict=True) if m).sqrt()
    theta = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, g, m in zip(parameters, gradient, hit, strict=True):
            parameter.add_(g, alpha=m * radius / float(norm))
    after, selected = [losses(*batch) for batch in batches], []
    for old, values in zip(before, after, strict=True):
        scores = old if select.score == "loss" else values - old
        found = scores.topk(subset_size(select.gamma, len(values))).indices
        selected.append(sorted(found.tolist()))
    descent = mean_gradient(
        [values[i] for values, i in zip(after, selected, strict=True)], parameters
    )
    with torch.no_grad():
        for parameter, old in zip(parameters, theta, strict=True):
            parameter.copy_(old)
    return descent, selected
