"""ESAM's steps by hand, on any model: the ascent, the selection and the descent."""

import copy

import torch

from esam_torch import ESAM, Everything


def pick(tree, indices, b):
    """Return rows of a batch, as a user would write it for this batch."""
    if isinstance(tree, torch.Tensor):
        return tree[indices] if tree.dim() and len(tree) == b else tree
    if isinstance(tree, dict):
        return {key: pick(value, indices, b) for key, value in tree.items()}
    return tuple(pick(value, indices, b) for value in tree)


def by_hand(model, losses, data, rho, adaptive=False):
    """Run ESAM's passes literally (beta = 1, gamma = 1/2), and write gradients to `.grad`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    entry = torch.get_rng_state()
    at_entry = copy.deepcopy(dict(model.named_buffers()))
    before = losses(*data)
    left = torch.get_rng_state()
    statistics = copy.deepcopy(dict(model.named_buffers()))
    found = torch.autograd.grad(before.mean(), parameters, allow_unused=True)
    found = [None if g is None else g.to_dense() for g in found]
    pairs = [(p, g) for p, g in zip(parameters, found, strict=True) if g is not None]
    stretched = [p.detach().abs() * g if adaptive else g for p, g in pairs]
    length = torch.cat([g.flatten().abs() for g in stretched]).norm()
    theta = [p.detach().clone() for p, _ in pairs]
    with torch.no_grad():
        for (p, _), g in zip(pairs, stretched, strict=True):
            p += rho * (p.abs() * g if adaptive else g) / length
        for name, buffer in model.named_buffers():  # every pass reads the same state as the first
            buffer.copy_(at_entry[name])
        torch.set_rng_state(entry)
        after = losses(*data)
        for name, buffer in model.named_buffers():
            buffer.copy_(at_entry[name])
    b = len(before)
    k = -(-b // 2)
    order = torch.sort(after - before.detach(), descending=True, stable=True).indices
    selected = order[:k].sort().values
    torch.set_rng_state(entry)
    losses(*pick(data, selected, b)).mean().backward()
    torch.set_rng_state(left)
    with torch.no_grad():
        for (p, _), start in zip(pairs, theta, strict=True):
            p.copy_(start)
        for name, buffer in model.named_buffers():
            buffer.copy_(statistics[name])
    return before.detach(), after, selected, length


def close(name, found, wanted, **tolerance):
    """Require that two tensors are close; name them in the error."""
    torch.testing.assert_close(found, wanted, msg=lambda m: f"{name}: {m}", **tolerance)


def check(make, losses_for, data, *, rho=0.3, steps=3, dtype=torch.float64, **options):
    """Train a model with ESAM and by hand, and require equal results."""
    torch.manual_seed(0)
    model = make().to(dtype)
    twin = copy.deepcopy(model)
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    other = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    optimizer = ESAM(base, model, rho=rho, perturb=Everything(), gamma=0.5, **options)
    tolerance = {"rtol": 1e-7, "atol": 1e-9} if dtype == torch.float64 else {}
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        report = optimizer.backward(losses_for(model), *data)
        random = torch.get_rng_state()
        torch.manual_seed(step)
        other.zero_grad()
        before, after, selected, length = by_hand(
            twin, losses_for(twin), data, rho, options.get("adaptive", False)
        )
        assert torch.equal(random, torch.get_rng_state())
        assert report.indices.tolist() == selected.tolist()
        torch.testing.assert_close(report.losses, before, **tolerance)
        torch.testing.assert_close(report.perturbed_losses, after, **tolerance)
        torch.testing.assert_close(report.gradient_norm, length, **tolerance)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                close(name, p.grad, q.grad, **tolerance)
        base.step()
        other.step()
        for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
            close(name, a, b, **tolerance)
    return model
