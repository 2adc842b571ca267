"""Train a network of keras.applications with the base optimizer and with ESAM.

    KERAS_BACKEND=jax python examples/keras_applications.py --epochs 10

The network consists of MobileNet's blocks, without pretrained weights. The data are scikit-learn's
handwritten digits, enlarged to 32 x 32, or artificial patterns if scikit-learn is not installed.
ESAM perturbs only the last blocks, along the gradient of a quarter of each batch.
"""

import argparse
import os
import time

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

from esam_keras import ESAM, Part, Suffix

SIZE = 32
CLASSES = 10


def images(count=None):
    """Return training and test data as (x, y): x (n, 32, 32, 1) with mean 0, y (n,) labels."""
    rng = np.random.default_rng(0)
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        print("scikit-learn is not installed: using artificial images.")
        y = rng.integers(CLASSES, size=1800)
        x = rng.normal(size=(CLASSES, 8, 8))[y] + rng.normal(size=(len(y), 8, 8))
    else:
        x, y = load_digits(return_X_y=True)
        x = x.reshape(-1, 8, 8)
    order = rng.permutation(len(x))[:count]
    x, y = x[order], y[order]
    x = ((x - x.mean()) / x.std()).astype("float32")
    x = x.repeat(SIZE // 8, axis=1).repeat(SIZE // 8, axis=2)[..., None]
    tests = len(x) // 4
    return (x[tests:], y[tests:]), (x[:tests], y[:tests])


def network():
    """Return the first half of MobileNet at a quarter of its width, with a new head.

    The second half would halve the resolution twice more, which is too much for 32 x 32 images.
    """
    keras.utils.set_random_seed(0)
    whole = keras.applications.MobileNet(
        input_shape=(SIZE, SIZE, 1), alpha=0.25, include_top=False, weights=None
    )
    features = whole.get_layer("conv_pw_5_relu").output
    pooled = keras.layers.GlobalAveragePooling2D()(features)
    model = keras.Model(whole.input, keras.layers.Dense(CLASSES, name="logits")(pooled))
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9  # the default, 0.99, is meant for longer training
    return model


def base_optimizer(steps):
    """Return SGD with a learning rate that decreases to 0 over this many steps."""
    rate = keras.optimizers.schedules.CosineDecay(0.1, steps)
    return keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, weight_decay=1e-4)


class Clock(keras.callbacks.Callback):
    """Records the time of each epoch; the table omits the first, which compiles."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.begin = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.begin)


def train_row(optimizer, train, test, options):
    """Train with an optimizer and return its row of the table."""
    model = network()
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    clock = Clock()
    history = model.fit(
        *train,
        batch_size=options.batch_size,
        epochs=options.epochs,
        callbacks=[clock],
        verbose=options.verbose,
    ).history
    accuracy = model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]
    seconds = np.mean(clock.seconds[1:] or clock.seconds)
    return history["loss"][-1], accuracy, seconds


def main(arguments=None):
    """Train twice and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--start", default="conv_dw_5", help="the first layer that is perturbed")
    parser.add_argument("--rho", type=float, default=0.2)
    parser.add_argument("--verbose", type=int, default=0, help="what `fit` prints: 0, 1 or 2")
    parser.add_argument("--quick", action="store_true", help="one epoch on a few images")
    options = parser.parse_args(arguments)
    if options.quick:
        options.epochs, options.batch_size = 1, 16
    train, test = images(64 if options.quick else None)
    steps_an_epoch = len(train[0]) // options.batch_size
    # Whole batches only: a smaller last one would need another compilation.
    train = [array[: steps_an_epoch * options.batch_size] for array in train]
    steps = options.epochs * steps_an_epoch
    suffix = Suffix(options.start)
    base = base_optimizer(steps)
    esam = ESAM(base, rho=options.rho, perturb=suffix, gamma=1.0, ascend=Part(0.25))

    backend = keras.backend.backend()
    print(f"MobileNet's blocks on {backend}: {len(train[0])} images, {options.epochs} epochs")
    print(f"{'optimizer':12} {'loss':>8} {'accuracy':>9} {'s/epoch':>8}")
    for name, optimizer in {"base": base_optimizer(steps), "ESAM": esam}.items():
        loss, accuracy, seconds = train_row(optimizer, train, test, options)
        print(f"{name:12} {loss:8.4f} {accuracy:9.1%} {seconds:8.2f}")


if __name__ == "__main__":
    main()
