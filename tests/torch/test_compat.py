"""The private names of torch that no other test uses directly."""

import pytest
import torch

from esam_torch import compat


def test_writes_in_an_uncounted_context_do_not_change_version_counters():
    tensors = [torch.nn.Parameter(torch.ones(3)), torch.zeros(2)]
    tensors[1].add_(1.0)
    with torch.no_grad(), compat.uncounted_writes(tensors):
        for tensor in tensors:
            tensor.mul_(2.0)
    assert [t._version for t in tensors] == [0, 1]
    assert all(torch.equal(t, torch.full_like(t, 2.0)) for t in tensors)
    with torch.no_grad():
        tensors[0].mul_(2.0)
    assert tensors[0]._version == 1  # outside, writes count again


@pytest.mark.parametrize("single_call", [True, False])
def test_clones_have_the_values_and_strides_but_no_graph_and_no_shared_memory(
    single_call, monkeypatch
):
    if not single_call:  # older versions of torch
        monkeypatch.setattr(compat, "_CLONE", lambda tensors: [t.clone() for t in tensors])
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors = [torch.nn.Parameter(torch.tensor([-0.0, 1e-40, torch.inf])), image]
    copies = compat.clone_all(tensors)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert copy.stride() == tensor.stride() and not copy.requires_grad
        assert copy.data_ptr() != tensor.data_ptr()
        assert torch.equal(copy.view(torch.int32), tensor.detach().view(torch.int32))


def test_writes_of_several_tensors_are_counted():
    with torch.inference_mode():
        uncounted = torch.ones(2)
    written, other = torch.ones(2), torch.ones(2)
    written.add_(1.0)
    assert compat.count_all_writes([written, other]) == [1, 0]
    assert compat.count_all_writes([written, uncounted, other]) == [1, 0, 0]
