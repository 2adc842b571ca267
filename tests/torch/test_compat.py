"""Each private name of torch that esam-torch uses."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.torch.distributed_cases.launch import SHARDS_ON_CPUS
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune

from esam_torch import compat
from esam_torch.devices import default_device
from esam_torch.dropout import WithoutDropout


@pytest.fixture
def one_rank():
    """Start a process group of this process alone."""
    if not dist.is_available():
        pytest.skip("torch has no distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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


def test_every_name_has_a_test():
    text = Path(__file__).read_text("utf-8")
    assert [name for name in compat.__all__ if f"compat.{name}" not in text] == []


def test_writes_of_one_tensor_are_counted():
    with torch.inference_mode():
        uncounted = torch.ones(2).add_(1.0)
    assert compat.count_writes(torch.ones(2).add_(1.0)) == 1
    assert compat.count_writes(uncounted) == 0


def test_batch_norm_layers_are_recognised():
    batch = [nn.BatchNorm1d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), nn.LazyBatchNorm2d()]
    assert all(isinstance(layer, compat.BATCH_NORM) for layer in batch)
    assert not isinstance(nn.InstanceNorm2d(2), compat.BATCH_NORM)
    assert not isinstance(nn.LayerNorm(2), compat.BATCH_NORM)


def test_layers_with_running_statistics_are_recognised():
    statistics = [nn.BatchNorm1d(2), nn.SyncBatchNorm(2), nn.InstanceNorm2d(2)]
    assert all(isinstance(layer, compat.NORM_LAYERS) for layer in statistics)
    assert not isinstance(nn.GroupNorm(1, 2), compat.NORM_LAYERS)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_buffers_can_be_replaced_by_name():
    layer = nn.BatchNorm1d(2)
    names = compat.buffers_by_name(layer)
    assert list(names) == ["running_mean", "running_var", "num_batches_tracked"]
    names["running_mean"] = torch.ones(2)
    assert torch.equal(layer.running_mean, torch.ones(2))
    assert list(compat.buffers_by_name(nn.Sequential(layer))) == []
    scripted = torch.jit.script(nn.BatchNorm1d(2))
    names = compat.buffers_by_name(scripted)
    assert names["running_mean"].data_ptr() == scripted.running_mean.data_ptr()
    assert compat.buffers_by_name(scripted) is names


def test_compiled_models_are_recognised():
    model = nn.Sequential(nn.Linear(2, 2))
    assert compat.compiled_original(model) is None and not compat.compiled_call(model)
    compiled = torch.compile(model, backend="eager")
    assert compat.compiled_original(compiled) is model
    assert not compat.compiled_call(compiled)
    model.compile(backend="eager")
    assert compat.compiled_call(model) and compat.compiled_original(model) is None


def test_names_in_compiled_models_are_those_without():
    inner = torch.compile(nn.Linear(2, 2), backend="eager")
    model = torch.compile(nn.Sequential(inner), backend="eager")
    found = [compat.original_name(name) for name, _ in model.named_parameters()]
    assert found == ["0.weight", "0.bias"]
    found = [compat.original_name(name) for name, _ in nn.Sequential(inner).named_modules()]
    assert found == ["", "0", "0"]


def test_compiled_functions_are_recognised():
    def function(x):
        return 2 * x

    assert not compat.is_compiled_function(function)
    assert compat.is_compiled_function(torch.compile(function, backend="eager"))
    assert not compat.is_compiled_function(torch.compiler.disable(function))


def test_whether_a_compiled_model_notices_what_is_trained():
    layer = nn.Linear(2, 2)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend)
    for trained in (True, False):
        layer.weight.requires_grad_(trained)
        compiled(torch.ones(1, 2))
    if compat.COMPILED_MODELS_SEE_REQUIRES_GRAD:
        assert len(graphs) == 2


def test_compiled_frames_are_counted():
    @torch.compile(backend="eager")
    def double(x):
        return 2 * x

    before = compat.count_compiled_frames()
    double(torch.ones(2))
    assert compat.count_compiled_frames() == before + 1
    double(torch.ones(2))
    assert compat.count_compiled_frames() == before + 1


def test_compiled_code_runs_as_it_is_written():
    @torch.compile(backend="eager")
    def double(x):
        return (3.0 if torch.compiler.is_compiling() else 2.0) * x

    before = compat.count_compiled_frames()
    for _ in range(2):
        eager = compat.eager_code()
        assert double(torch.ones(1)) == 2.0
        eager.__exit__(None, None, None)
        assert double(torch.ones(1)) == 3.0
        assert compat.count_compiled_frames() == before + 1


def test_active_modes():
    mode = WithoutDropout()
    assert not compat.is_active(mode)
    with mode, torch.device("cpu"):
        assert compat.is_active(mode) and not compat.is_active(WithoutDropout())
    assert not compat.is_active(mode)


def test_kernels_of_recurrent_layers_exist():
    """test_flops.py tests their arguments."""
    for kernel in compat.RECURRENT_KERNELS:
        assert kernel.default._schema.arguments[0].name == "input"


def test_kernels_of_attention_exist():
    for kernel in compat.ATTENTION_KERNELS:
        names = [argument.name for argument in kernel.default._schema.arguments]
        assert names[:3] == ["query", "key", "value"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize(
    "change",
    [
        *(nn.utils.weight_norm, nn.utils.spectral_norm),
        lambda layer: prune.l1_unstructured(layer, "weight", 2),
    ],
)
def test_weights_that_hooks_compute(change):
    layer = change(nn.Linear(3, 3))
    assert compat.is_computed_weight(vars(layer), "weight")
    assert not compat.is_computed_weight(vars(layer), "bias")
    assert not compat.is_computed_weight(vars(nn.Linear(3, 3)), "weight")
    assert not compat.is_computed_weight({}, "weight")  # as the attributes of another object


def test_compiled_code_in_a_graph_has_a_name():
    layer = nn.Linear(2, 2)
    assert layer(torch.ones(1, 2)).grad_fn.name() != compat.COMPILED_NODE
    compiled = torch.compile(layer, backend="aot_eager")
    assert compiled(torch.ones(1, 2)).grad_fn.name() == compat.COMPILED_NODE


def test_a_call_is_not_traced():
    def seen(x):
        return x + (1.0 if torch.compiler.is_compiling() else 0.0)

    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    @torch.compile(backend=backend)
    def compiled(x):
        return compat.call_untraced(seen, 2 * x) * 3

    assert compiled(torch.ones(())) == 6.0  # `seen` added nothing
    assert not any("add" in target for targets in graphs for target in targets)
    assert "torch._dynamo.eval_frame" in sys.modules
    assert compat.call_untraced(max, 1, 2) == 2


@pytest.mark.usefixtures("one_rank")
def test_the_running_replicas_are_found():
    found = []

    class Net(nn.Linear):
        def forward(self, x):
            found.append(compat.active_replicas())
            return super().forward(x)

    model = DistributedDataParallel(Net(2, 2))
    model(torch.ones(1, 2))
    model.module(torch.ones(1, 2))
    assert found == [model, None]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore:DTensor random operators")  # of torch 2.6
def test_a_tensor_that_every_rank_has_is_distributed():
    from torch.distributed.tensor import Shard

    mesh, whole = dist.device_mesh.init_device_mesh("cpu", (1,)), torch.arange(3.0)
    found = compat.distribute(whole, mesh, [Shard(0)])
    assert found.placements == (Shard(0),) and torch.equal(found.to_local(), whole)


@pytest.mark.skipif(not SHARDS_ON_CPUS, reason="this torch does not shard on CPUs")
@pytest.mark.usefixtures("one_rank")
def test_parameter_groups_of_sharded_modules():
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in (model, model[0]):
        (group,) = compat.fsdp_parameter_groups(module)
        assert group.reduce_grads
        assert compat.fsdp_process_groups(group) == [mesh.get_group()]
        assert compat.fsdp_gathered(group) == []
        assert compat.fsdp_reshards(group)
    model(torch.ones(1, 2))
    (group,) = compat.fsdp_parameter_groups(model[0])
    assert [t.shape for t in compat.fsdp_gathered(group)] == [(2, 2), (2,)]
    model.set_requires_gradient_sync(False)
    (group,) = compat.fsdp_parameter_groups(model[0])
    assert not group.reduce_grads
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "shards"))
    (group,) = compat.fsdp_parameter_groups(fully_shard(nn.Linear(2, 2), mesh=mesh))
    wanted = {mesh.get_group("replicas"), mesh.get_group("shards")}
    assert set(compat.fsdp_process_groups(group)) == wanted


@pytest.mark.parametrize("accumulating", [False, True])
def test_hooks_of_tensors_do_not_run_inside(accumulating):
    tensor, calls = nn.Parameter(torch.ones(2)), []
    tensor.register_hook(lambda _: calls.append("gradient"))
    tensor.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated"))
    with compat.without_hooks([tensor], accumulating=accumulating):
        tensor.sum().backward()
    assert calls == ([] if accumulating else ["accumulated"])
    calls.clear()
    tensor.sum().backward()
    assert calls == ["gradient", "accumulated"]


def test_hooks_of_all_optimizers_do_not_run_inside():
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    optimizer, calls = torch.optim.SGD([nn.Parameter(torch.ones(2))]), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("after")),
    ]
    try:
        with compat.without_global_step_hooks():
            optimizer.step()
        assert calls == []
        optimizer.step()
        assert calls == ["before", "after"]
    finally:
        for handle in handles:
            handle.remove()


def test_the_cache_of_parametrizations_is_noticed():
    layer = parametrizations.weight_norm(nn.Linear(2, 2))
    assert not compat.parametrizations_are_cached()
    with parametrize.cached():
        layer(torch.ones(1, 2))
        assert compat.parametrizations_are_cached()
    assert not compat.parametrizations_are_cached()


def test_hooks_of_state_dicts_are_found():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))])
    registered = {
        "before saving": optimizer.register_state_dict_pre_hook,
        "after saving": optimizer.register_state_dict_post_hook,
        "before loading": optimizer.register_load_state_dict_pre_hook,
        "after loading": optimizer.register_load_state_dict_post_hook,
    }
    assert compat.saves_state_dict_hooks(optimizer) == {name: [] for name in registered}
    hooks = {name: (lambda *_: None) for name in registered}
    for name, register in registered.items():
        register(hooks[name])
    assert compat.saves_state_dict_hooks(optimizer) == {n: [hook] for n, hook in hooks.items()}


def test_the_attributes_that_contain_hooks():
    module = nn.Linear(1, 1)
    register = (
        (module.register_forward_hook, {"with_kwargs": True, "always_call": True}),
        (module.register_forward_pre_hook, {"with_kwargs": True}),
        (module.register_full_backward_hook, {}),
        (module.register_full_backward_pre_hook, {}),
    )
    for method, options in register:
        before = {name: len(vars(module)[name]) for name in compat.HOOKS}
        handle = method(lambda *_: None, **options)
        assert {name: len(vars(module)[name]) for name in compat.HOOKS} != before
        handle.remove()
        assert {name: len(vars(module)[name]) for name in compat.HOOKS} == before
    assert compat.HOOKS < compat.MODULE_ATTRIBUTES and "training" in compat.MODULE_ATTRIBUTES


def test_submodules():
    model, other = torch.nn.Sequential(torch.nn.Linear(1, 1)), torch.nn.Identity()
    model[0] = other
    assert vars(model)[compat.SUBMODULES] == {"0": other}
    assert compat.SUBMODULES in compat.MODULE_ATTRIBUTES


def test_lightnings_modules_note_which_hook_is_running():
    lightning = pytest.importorskip("lightning")
    assert compat.LIGHTNINGS_HOOK in vars(lightning.LightningModule())


def test_the_default_device():
    assert default_device().type == "cpu"
    with torch.device("meta"):
        assert default_device().type == "meta"
        if compat.DEFAULT_DEVICE_IS_KNOWN:
            assert torch.get_default_device().type == "meta"
    for given, found in (("meta", "meta"), ("cpu", "cpu"), (None, "cpu")):
        torch.set_default_device(given)
        try:
            assert default_device().type == found
        finally:
            torch.set_default_device(None)


def test_registered_parameters():
    layer = nn.Linear(2, 3, bias=False)
    (places, name, found), _ = compat.registered_parameters([layer])  # and the missing bias
    layer.weight = nn.Parameter(torch.zeros(3, 2))
    assert places[name] is layer.weight is not found
