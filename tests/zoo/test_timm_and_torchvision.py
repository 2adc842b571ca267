"""Models and tools of timm and torchvision, which are installed only with the newest torch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, Proportional, Rows, Suffix

reason = "installed by `nox -s tests_torch_newest`"
timm = pytest.importorskip("timm", reason=reason)
for part in ("data", "loss", "optim", "scheduler", "utils"):
    pytest.importorskip(f"timm.{part}", reason=reason)
torchvision = pytest.importorskip("torchvision", reason=reason)

RHO = 0.05


def step_by_hand(model, loss):
    """Run one step of SAM with plain SGD, lr 0.1; the loss is a function without arguments."""
    weights = [p for p in model.parameters() if p.requires_grad]
    start = [w.detach().clone() for w in weights]
    climb = torch.autograd.grad(loss(), weights)
    length = torch.stack([g.norm() for g in climb]).norm()
    with torch.no_grad():
        for weight, gradient in zip(weights, climb, strict=True):
            weight += RHO * gradient / length
    descent = torch.autograd.grad(loss(), weights)
    with torch.no_grad():
        for weight, old, gradient in zip(weights, start, descent, strict=True):
            weight.copy_(old - 0.1 * gradient)


def classifier(name):
    torch.manual_seed(0)
    if name.startswith("timm/"):
        return timm.create_model(name.removeprefix("timm/"), num_classes=5)
    return torchvision.models.get_model(name, weights=None, num_classes=5)


@pytest.mark.parametrize(
    ("name", "size"),
    [("timm/resnet10t", 32), ("timm/vit_tiny_patch16_224", 224), ("resnet18", 32)],
)
def test_a_step_equals_sam(name, size):
    model = classifier(name).double()
    by_hand = copy.deepcopy(model)
    inputs, targets = torch.randn(4, 3, size, size).double(), torch.randint(5, (4,))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ESAM(base, model, rho=RHO, beta=1.0, gamma=1.0)

    def losses(inputs, targets):
        return F.cross_entropy(model(inputs), targets, reduction="none")

    optimizer.loss(losses, inputs, targets).backward()
    optimizer.step()
    step_by_hand(by_hand, lambda: F.cross_entropy(by_hand(inputs), targets))
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_tools_of_timm_s_training_script():
    """Mixup, soft targets, adaptive clipping, averaged weights and a schedule, as in train.py."""
    model = classifier("timm/resnet10t")
    mixup = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    base = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    optimizer = ESAM(base, model, rho=RHO, perturb=Suffix(0.5), select=Proportional(0.5))
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, sched="cosine", num_epochs=2)

    def losses(inputs, soft):
        return torch.sum(-soft * F.log_softmax(model(inputs), dim=-1), dim=-1)

    whole = timm.loss.SoftTargetCrossEntropy()
    for update in range(3):
        before = copy.deepcopy(model)
        inputs, soft = mixup(torch.randn(8, 3, 32, 32), torch.randint(5, (8,)))
        optimizer.zero_grad()
        loss = optimizer.loss(losses, inputs, soft)
        torch.testing.assert_close(loss.detach(), whole(before.train()(inputs), soft).detach())
        loss.backward()
        timm.utils.dispatch_clip_grad(model.parameters(), 0.01, mode="agc")
        optimizer.step()
        average.update(model, step=update)
        scheduler.step(update + 1)
    assert optimizer.count == 3
    assert len(optimizer.report.indices) == 4
    counts = [
        m.num_batches_tracked.item() for m in model.modules() if isinstance(m, nn.BatchNorm2d)
    ]
    assert set(counts) == {3}


def test_a_detector_of_torchvision_image_by_image():
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001)
    optimizer = ESAM(base, model, rho=RHO, perturb=Suffix(0.5), select=Proportional(0.5))
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64), torch.rand(3, 64, 56)]
    boxes = [[[4.0, 4.0, 40.0, 40.0]], [[8.0, 8.0, 30.0, 40.0], [1.0, 2.0, 20.0, 22.0]], []]
    targets = [
        {
            "boxes": torch.tensor(b).reshape(-1, 4),
            "labels": torch.ones(len(b), dtype=torch.int64),
        }
        for b in boxes
    ]
    seen = []

    def losses(images, targets):
        seen.append(
            [(tuple(i.shape), len(t["boxes"])) for i, t in zip(images, targets, strict=True)]
        )
        return torch.stack(
            [sum(model([i], [t]).values()) for i, t in zip(images, targets, strict=True)]
        )

    # Three images with three channels would be ambiguous.
    optimizer.loss(losses, Rows(images), targets).backward()
    optimizer.step()
    first, *later = seen
    assert len(first) == 3
    assert all(set(part) <= set(first) for part in later)
    assert len(later[-1]) == 2
