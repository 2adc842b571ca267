"""With rho = 0 a step is bit for bit a base step, with every layer of Keras.

Layers with the same kind of input are in one model, which is compiled once.
"""

import keras
import numpy as np
import pytest
from keras import layers as L
from tests.keras.scene import cross_entropy

from esam_keras import ESAM, Between

BACKEND = keras.backend.backend()

#: Layers that are not in any model below, with the reason.
LEFT_OUT = {
    "AugMix": "uses Python's random generator whenever it is called or traced",
    "Layer": "the base class",
    "Wrapper": "a base class, without a call",
    "FlaxLayer": "needs flax, which is not installed",
    "Equalization": "for use before the model: inside it fails even without ESAM",
    "Pipeline": "for use before the model: inside it fails even without ESAM",
    "TFSMLayer": "runs a saved function: it cannot be called in training",
    "TextVectorization": "its input is strings: for use before the model",
    "StringLookup": "its input is strings: for use before the model",
}

#: Layers that work in a model only on some backends.
BACKENDS = {
    "JaxLayer": ("jax",),
    "TorchModuleWrapper": ("torch",),
    "HashedCrossing": ("tensorflow",),
    "Hashing": ("tensorflow",),
    "IntegerLookup": ("tensorflow",),
}


def noise(rate=0.3):
    return {"rate": rate, "seed": 1}


def recurrent(cell):
    return lambda h: L.RNN(cell())(h)


def torch_module(h):
    import torch

    return L.TorchModuleWrapper(torch.nn.Linear(6, 2), output_shape=(None, 2))(h)


def mel_spectrogram(h):
    settings = {"sequence_stride": 16, "fft_length": 32, "num_mel_bins": 4}
    return L.MelSpectrogram(sampling_rate=64, min_freq=1, **settings)(h[:, :, 0])


def jax_function(h):
    import jax.numpy as jnp

    def call(params, inputs):
        return jnp.tanh(inputs @ params)

    return L.JaxLayer(call, params=np.linspace(-1, 1, 12).reshape(6, 2).astype("float32"))(h)


POOLING = {
    f"{kind}Pooling{n}D": (n, settings)
    for n in (1, 2, 3)
    for kind, settings in {
        "AdaptiveAverage": {"output_size": 2},
        "AdaptiveMax": {"output_size": 2},
        "Average": {"pool_size": 2},
        "Max": {"pool_size": 2},
        "GlobalAverage": {},
        "GlobalMax": {},
    }.items()
}
CONVOLUTIONS = {
    f"{kind}{n}D{suffix}": (n, settings)
    for n in (1, 2, 3)
    for kind, suffix, dimensions, settings in (
        ("Conv", "", (1, 2, 3), {"filters": 2, "kernel_size": 2}),
        ("Conv", "Transpose", (1, 2, 3), {"filters": 2, "kernel_size": 2}),
        ("DepthwiseConv", "", (1, 2), {"kernel_size": 2}),
        ("SeparableConv", "", (1, 2), {"filters": 2, "kernel_size": 2}),
        ("SpatialDropout", "", (1, 2, 3), noise()),
        ("Cropping", "", (1, 2, 3), {"cropping": 1}),
        ("ZeroPadding", "", (1, 2, 3), {"padding": 1}),
        ("UpSampling", "", (1, 2, 3), {"size": 2}),
    )
    if n in dimensions
}
SPATIAL = {
    dimensions: {n: s for n, (d, s) in {**POOLING, **CONVOLUTIONS}.items() if d == dimensions}
    for dimensions in (1, 2, 3)
}
IN_RANGE = {"value_range": (0, 1), "seed": 1}

#: By the kind of input: the shape of a sample; and for each layer its settings, or a function that
#: calls it on the input.
GROUPS = {
    "vector": (
        (6,),
        {
            "Activation": {"activation": "tanh"},
            "ActivityRegularization": {"l1": 0.1, "l2": 0.1},
            "Add": lambda h: L.Add()([h, h]),
            "AlphaDropout": noise(),
            "Average": lambda h: L.Average()([h, h]),
            "BatchNormalization": {},
            "Concatenate": lambda h: L.Concatenate()([h, h]),
            "Dense": {"units": 3},
            "Dot": lambda h: L.Dot(axes=1)([h, h]),
            "Dropout": noise(),
            "ELU": {},
            "EinsumDense": {"equation": "ab,bc->ac", "output_shape": 3},
            "Flatten": {},
            "GaussianDropout": noise(),
            "GaussianNoise": {"stddev": 0.3, "seed": 1},
            "GroupNormalization": {"groups": 3},
            "Identity": {},
            "JaxLayer": jax_function,
            "Lambda": {"function": lambda x: x * x},
            "LayerNormalization": {},
            "LeakyReLU": {},
            "Maximum": lambda h: L.Maximum()([h, 2 * h]),
            "Minimum": lambda h: L.Minimum()([h, 2 * h]),
            "Multiply": lambda h: L.Multiply()([h, h]),
            "Normalization": {"mean": 0.5, "variance": 2.0},
            "PReLU": {},
            "RMSNormalization": {},
            "ReLU": {},
            "RepeatVector": {"n": 2},
            "Rescaling": {"scale": 0.5},
            "Reshape": {"target_shape": (2, 3)},
            "Softmax": {},
            "SpectralNormalization": lambda h: L.SpectralNormalization(L.Dense(3))(h),
            "Subtract": lambda h: L.Subtract()([h, h * h]),
            "TorchModuleWrapper": torch_module,
            "UnitNormalization": {},
        },
    ),
    "sequence": (
        (6, 4),
        {
            **SPATIAL[1],
            "AdditiveAttention": lambda h: L.AdditiveAttention()([h, h]),
            "Attention": lambda h: L.Attention(use_scale=True)([h, h]),
            "Bidirectional": lambda h: L.Bidirectional(L.LSTM(3))(h),
            "GRU": {"units": 3},
            "GRUCell": recurrent(lambda: L.GRUCell(3)),
            "GroupedQueryAttention": lambda h: L.GroupQueryAttention(4, 4, 2)(h, h),
            "LSTM": {"units": 3, "recurrent_dropout": 0.2, "seed": 1},
            "LSTMCell": recurrent(lambda: L.LSTMCell(3)),
            "Masking": lambda h: L.LSTM(2)(L.Masking()(h)),
            "MultiHeadAttention": lambda h: L.MultiHeadAttention(2, 4)(h, h),
            "Permute": {"dims": (2, 1)},
            "RNN": recurrent(lambda: L.GRUCell(2)),
            "SimpleRNN": {"units": 3},
            "SimpleRNNCell": recurrent(lambda: L.SimpleRNNCell(3)),
            "StackedRNNCells": recurrent(lambda: L.StackedRNNCells([L.LSTMCell(2), L.GRUCell(3)])),
            "TimeDistributed": lambda h: L.TimeDistributed(L.Dense(3))(h),
        },
    ),
    "image": (
        (6, 6, 3),
        {
            **SPATIAL[2],
            "CenterCrop": {"height": 4, "width": 4},
            "ConvLSTM1D": {"filters": 2, "kernel_size": 2},
            "Resizing": {"height": 4, "width": 4},
            "SpectralNormalization": lambda h: L.SpectralNormalization(L.Conv2D(3, 2))(h),
        },
    ),
    "volume": ((4, 4, 4, 2), {**SPATIAL[3], "ConvLSTM2D": {"filters": 2, "kernel_size": 2}}),
    "film": ((2, 3, 3, 3, 1), {"ConvLSTM3D": {"filters": 2, "kernel_size": 2}}),
    "signal": (
        (64, 1),
        {
            "MelSpectrogram": mel_spectrogram,
            "STFTSpectrogram": {"frame_length": 16, "frame_step": 16, "fft_length": 16},
        },
    ),
    "augmentation": (
        (6, 6, 3),
        {
            "AutoContrast": {"value_range": (0, 1)},
            "ContrastLimitedAdaptiveHistogramEqualization": {"value_range": (0, 1)},
            "CutMix": {"seed": 1},
            "MaxNumBoundingBoxes": {"max_number": 2},
            "MixUp": {"seed": 1},
            "RandAugment": IN_RANGE,
            "RandomBrightness": {"factor": 0.3, **IN_RANGE},
            "RandomColorDegeneration": {"factor": 0.5, **IN_RANGE},
            "RandomColorJitter": {"brightness_factor": 0.3, **IN_RANGE},
            "RandomContrast": {"factor": 0.3, **IN_RANGE},
            # It crops to its input's size: otherwise its output shape outside training is wrong.
            "RandomCrop": {"height": 6, "width": 6, "seed": 1},
            "RandomElasticTransform": IN_RANGE,
            "RandomErasing": IN_RANGE,
            "RandomFlip": {"seed": 1},
            "RandomGaussianBlur": {"sigma": 0.5, **IN_RANGE},
            "RandomGrayscale": {"factor": 0.5, "seed": 1},
            "RandomHue": {"factor": 0.3, **IN_RANGE},
            "RandomInvert": {"factor": 0.5, **IN_RANGE},
            "RandomPerspective": {"seed": 1},
            "RandomPosterization": {"factor": 4, **IN_RANGE},
            "RandomRotation": {"factor": 0.1, "seed": 1},
            "RandomSaturation": {"factor": 0.5, **IN_RANGE},
            "RandomSharpness": {"factor": 0.5, **IN_RANGE},
            "RandomShear": {"x_factor": 0.2, "seed": 1},
            "RandomTranslation": {"height_factor": 0.2, "width_factor": 0.2, "seed": 1},
            "RandomZoom": {"height_factor": 0.2, "seed": 1},
            "Solarization": IN_RANGE,
        },
    ),
    "tokens": (
        (5,),
        {
            "CategoryEncoding": {"num_tokens": 9},
            "Discretization": {"bin_boundaries": [2.0, 5.0]},
            "Embedding": {"input_dim": 9, "output_dim": 4},
            "HashedCrossing": lambda h: L.HashedCrossing(5)((h[:, :1], h[:, 1:2])),
            "Hashing": {"num_bins": 3},
            "InputLayer": lambda h: h,
            "IntegerLookup": {"vocabulary": list(range(1, 9))},
            "ReversibleEmbedding": {"input_dim": 9, "output_dim": 4},
        },
    ),
}

#: Groups that run on each backend in every test run; the others run only on torch.
QUICK = ("vector", "image")


def built_in():
    """Return the names of Keras's layers, without aliases."""
    found = (getattr(L, name) for name in dir(L))
    return {c.__name__ for c in found if isinstance(c, type) and issubclass(c, L.Layer)}


def test_every_layer_is_in_a_group_or_left_out():
    """A new layer must be added to a group, or left out with a reason."""
    tried = {name for _, group in GROUPS.values() for name in group}
    assert built_in() - tried == built_in() & set(LEFT_OUT)  # an older Keras has fewer


def model_of(group):
    """Return a model with a group's layers on one input, followed by a dense layer."""
    shape, members = GROUPS[group]
    x = keras.Input(shape, dtype="int32" if group == "tokens" else "float32")
    h = x
    if group not in ("tokens", "augmentation"):  # so that the layers' input has a gradient
        h = L.Dense(shape[-1], name="before")(x)
    outputs = []
    for name, member in members.items():
        if name not in built_in() or BACKEND not in BACKENDS.get(name, (BACKEND,)):
            continue
        if group == "augmentation":  # some write to their input, on torch
            h = x * 1.0
        y = member(h) if callable(member) else getattr(L, name)(**member, name=f"of_{name}")(h)
        y = keras.ops.cast(y, "float32")
        outputs.append(L.Flatten()(y) if len(y.shape) > 2 else y)
    return keras.Model(x, L.Dense(3, name="head")(L.Concatenate()(outputs)))


def trained(group, optimizer):
    """Train for two steps of `fit` and return all weights by name."""
    shape, _ = GROUPS[group]
    generator = np.random.default_rng(0)
    x = generator.uniform(size=(8, *shape)).astype("float32")
    if group == "tokens":
        x = generator.integers(1, 9, (8, *shape)).astype("int32")
    keras.utils.set_random_seed(3)
    keras.backend.clear_session()
    model = model_of(group)
    # XLA would take most of the time, but JAX always uses it.
    model.compile(optimizer, cross_entropy(), jit_compile="auto" if BACKEND == "jax" else False)
    model.fit(x, np.arange(8) % 3, batch_size=4, verbose=0, shuffle=False)
    return {v.path: np.array(keras.ops.convert_to_numpy(v.value)) for v in model.variables}


@pytest.mark.filterwarnings("ignore:To copy construct")  # Keras's RandomPerspective, on torch
@pytest.mark.filterwarnings("ignore:Tensor.T is deprecated")  # Keras's RandAugment, on torch
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64")  # Keras's MixUp, on JAX
@pytest.mark.parametrize(
    "group",
    [pytest.param(group, marks=() if group in QUICK else pytest.mark.slow) for group in GROUPS],
)
def test_a_step_with_rho_0_is_a_base_step_bit_for_bit(group):
    base = {"learning_rate": 0.1, "momentum": 0.9}
    plain = trained(group, keras.optimizers.SGD(**base))
    for settings in ({"rho": 0.0}, {"perturb": Between(50)}):
        ours = trained(group, ESAM(keras.optimizers.SGD(**base), **settings))
        assert ours.keys() == plain.keys()
        for name, value in plain.items():
            assert np.isfinite(value).all(), name
            np.testing.assert_array_equal(ours[name], value, err_msg=name)
