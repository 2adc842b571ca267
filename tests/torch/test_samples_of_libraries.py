"""Batches and outputs of other libraries: their containers and sequences."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BatchEncoding, BatchFeature
from transformers.modeling_outputs import CausalLMOutput

from esam_core import ESAMRuntimeError, ESAMTypeError
from esam_torch import ESAM, Everything, Suffix
from esam_torch.batch import Samples
from esam_torch.containers import detach_tree

for library in ("tensordict", "torch_geometric"):
    pytest.importorskip(library, reason=f"{library} is not installed with the lowest versions")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # both use features that this torch deprecates
    from tensordict import NonTensorStack, TensorDict, lazy_stack, tensorclass
    from torch_geometric.data import Batch, Data

CHOSEN = torch.tensor([1, 3])


def taken(x, b=5):
    samples = Samples()
    samples.check(((x,), {}), b)
    return samples.take(((x,), {}), CHOSEN, b)[0][0]


def columns(b=5):
    return {"x": torch.arange(b * 2.0).reshape(b, 2), "y": torch.arange(b)}


# -- tensordict ----------------------------------------------------------------------------------


@tensorclass
class Observations:
    x: torch.Tensor
    name: str


def test_tensordict():
    data = TensorDict({**columns(), "deep": {"z": torch.arange(5)}}, batch_size=[5])
    part = taken(data)
    assert isinstance(part, TensorDict) and part.batch_size == (2,)
    assert part["x"].tolist() == [[2, 3], [6, 7]] and part["deep", "z"].tolist() == [1, 3]
    assert data.batch_size == (5,)


def test_tensordict_with_texts():
    data = TensorDict({"x": torch.arange(5), "t": NonTensorStack(*"abcde")}, batch_size=[5])
    part = taken(data)
    assert part["x"].tolist() == [1, 3] and part["t"] == ["b", "d"]


def test_tensordicts_of_several_lengths():
    data = lazy_stack([TensorDict({"x": torch.full((n + 1,), n)}) for n in range(5)])
    assert [row["x"].tolist() for row in taken(data).unbind(0)] == [[1, 1], [3, 3, 3, 3]]


def test_tensordict_in_a_dictionary_beside_a_tensor():
    part = taken({"td": TensorDict(columns(), batch_size=[5]), "w": torch.ones(3)})
    assert part["td"]["y"].tolist() == [1, 3] and part["w"].shape == (3,)


def test_tensordict_without_a_batch_size_is_refused_by_name():
    with pytest.raises(ESAMTypeError, match=r"`batch\[0\]`.*batch_size=\[5\].*batch_size=\[\]"):
        taken(TensorDict(columns()))


def test_tensordict_of_another_batch_size_is_whole():
    table = TensorDict({"x": torch.arange(7)}, batch_size=[7])
    assert taken((torch.arange(5), table))[1]["x"] is table["x"]


def test_tensorclass():
    part = taken(Observations(x=torch.arange(5), name="one", batch_size=[5]))
    assert isinstance(part, Observations)
    assert part.x.tolist() == [1, 3] and part.name == "one"


def test_a_step_with_a_tensordict():
    def step(wrap):
        torch.manual_seed(0)
        net = nn.Linear(4, 3)
        optimizer = ESAM(
            torch.optim.SGD(net.parameters(), lr=0.1), net, perturb=Everything(), gamma=0.5
        )
        data = {"x": torch.randn(8, 4), "y": torch.arange(8) % 3}

        def losses(batch):
            out = TensorDict({"logits": net(batch["x"])}, batch_size=[len(batch["y"])])
            return F.cross_entropy(out["logits"], batch["y"], reduction="none"), out

        report = optimizer.step(losses, wrap(data))
        assert not report.outputs["logits"].requires_grad
        return net.weight.detach()

    assert torch.equal(step(lambda d: TensorDict(d, batch_size=[8])), step(dict))


# -- torch_geometric -----------------------------------------------------------------------------


def graphs():
    """Return five graphs; the fifth one has five nodes."""
    return [
        Data(x=torch.full((n, 2), float(n)), edge_index=torch.zeros(2, n, dtype=torch.long), y=n)
        for n in (2, 3, 4, 1, 5)
    ]


def test_a_batch_of_graphs():
    part = taken(Batch.from_data_list(graphs()))
    assert isinstance(part, Batch) and part.num_graphs == 2
    assert part.y.tolist() == [3, 1] and part.batch.tolist() == [0, 0, 0, 1]


def test_a_batch_of_graphs_keeps_its_follow_batch():
    made = Batch.from_data_list(graphs(), follow_batch=["edge_index"])
    assert taken(made).edge_index_batch.tolist() == [0, 0, 0, 1]


def graph_losses(model, change):
    """Return losses that change their batch of graphs before they use it."""

    def losses(d):
        change(d)
        values = torch.zeros(len(d), 1).index_add(0, d.batch, model(d.x))
        return (values[:, 0] - d.y.float()).square()

    return losses


def assign(d):
    d.x = (d.x - 1.0) / 2.0


def subtract(d):
    d.x.sub_(1.0)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_each_pass_gets_its_own_copy_of_a_batch_of_graphs(gamma):
    def train(make, change):
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, gamma=gamma)
        data = make()
        for _ in range(2):
            optimizer.step(graph_losses(model, change), data)
        assert torch.equal(data.x, make().x)
        return model.weight.detach()

    def changed_before():
        made = Batch.from_data_list(graphs())
        assign(made)
        return made

    before = train(changed_before, lambda d: None)
    assert torch.equal(train(lambda: Batch.from_data_list(graphs()), assign), before)


def test_a_batch_of_graphs_that_is_written_in_place_is_refused():
    model = nn.Linear(2, 1)
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, gamma=1.0)
    with pytest.raises(ESAMRuntimeError, match="must not change its batch in place"):
        optimizer.step(graph_losses(model, subtract), Batch.from_data_list(graphs()))


def test_finding_the_blocks_does_not_write_to_a_batch_of_graphs():
    """Its forward is not a pass of a step, whose second writes would be noticed."""
    model = nn.Sequential(nn.Linear(2, 1), nn.Tanh())
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ESAM(base, model, perturb=Suffix(0.5), gamma=1.0)
    data = Batch.from_data_list(graphs())
    optimizer.measured_units(graph_losses(model, subtract), data)
    assert torch.equal(data.x, Batch.from_data_list(graphs()).x)


def test_a_list_of_graphs():
    assert [g.y for g in taken(graphs())] == [3, 1]


@pytest.mark.parametrize("nodes", [5, 3])
def test_a_single_graph_is_not_split(nodes):
    """A graph's length is the number of its attributes, here three."""
    with pytest.raises(ESAMTypeError, match=r"`batch\[0\]`.*take=function"):
        taken(
            Data(x=torch.ones(nodes, 2), edge_index=torch.zeros(2, 4).long(), y=torch.ones(nodes)),
            nodes,
        )


# -- transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [5, 2])
def test_encodings(b):
    """Two samples and two entries: the length of a mapping is not the number of samples."""
    entries = {"input_ids": torch.arange(b * 3).reshape(b, 3), "texts": [str(i) for i in range(b)]}
    encoding = BatchEncoding(entries)
    encoding._encodings = [f"encoding {i}" for i in range(b)]
    samples = Samples()
    samples.check(((encoding,), {}), b)
    (part,), _ = samples.take(((encoding,), {}), torch.tensor([1]), b)
    assert isinstance(part, BatchEncoding)
    assert part["input_ids"].tolist() == [[3, 4, 5]] and part["texts"] == ["1"]
    assert part.encodings == ["encoding 1"] and len(encoding["texts"]) == b


def test_features():
    part = taken(BatchFeature({"pixels": torch.arange(5), "sizes": [(2, i) for i in range(5)]}))
    assert isinstance(part, BatchFeature)
    assert part["pixels"].tolist() == [1, 3] and part["sizes"] == [(2, 1), (2, 3)]


def test_a_model_output_in_the_batch():
    output = CausalLMOutput(logits=torch.arange(5), hidden_states=(torch.arange(5),))
    part = taken(output)
    assert isinstance(part, CausalLMOutput) and part.loss is None
    assert part.logits.tolist() == part["logits"].tolist() == part[0].tolist() == [1, 3]
    assert part.hidden_states[0].tolist() == [1, 3] and len(output.logits) == 5


def test_a_model_output_returned_with_the_losses_is_detached():
    grown = torch.ones(5, requires_grad=True) * 2
    output = detach_tree(CausalLMOutput(logits=grown, hidden_states=(grown,)))
    assert isinstance(output, CausalLMOutput)
    assert not output.logits.requires_grad and not output["logits"].requires_grad
    assert not output.hidden_states[0].requires_grad and grown.requires_grad


# -- data frames ---------------------------------------------------------------------------------


class Frame:
    """Represents pandas: [] looks up labels, and `iloc` positions."""

    def __init__(self, labels):
        self.labels = list(labels)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, wanted):
        return Frame(label for label in self.labels if label in list(wanted))

    @property
    def iloc(self):
        frame = self

        class At:
            def __getitem__(self, places):
                return Frame(frame.labels[i] for i in places)

        return At()


def test_data_frames_are_indexed_by_position():
    assert taken(Frame([3, 4, 1, 0, 2])).labels == [4, 0]
