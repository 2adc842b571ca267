"""Run Keras's own tests with ESAM at rho = 0 as the optimizer.

    KERAS_BACKEND=jax python tests/keras_suites/compare.py [FILE ...]

The tests are in Keras's wheel. Those that fail with ESAM run again without it. A test that passes
only without it must be listed in `DIFFERENCES` with its cause; listed tests must differ.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import keras

SOURCE = Path(keras.__file__).parent / "src"

#: The tests to run, in folders of `keras/src`. Orbax is not installed, so its tests are left out.
SUITES = (
    "trainers/trainer_test.py",
    "optimizers/loss_scale_optimizer_test.py",
    "callbacks/*_test.py",
    "saving/*_test.py",
    "models/*_test.py",
)
LEFT_OUT = ("orbax_checkpoint_test.py",)

#: Why a test passes with Keras's optimizers but not with ESAM, by the end of its name.
DIFFERENCES = {
    "::TestTrainer::test_adds_loss_scaling_optimizer": "checks the optimizer's class",
    "::SavingTest::test_saved_module_paths_and_class_names": "checks the optimizer's class",
    "::SavingTest::test_scalar_weight": "counts saved variables, and ESAM has its own",
    "::SwapEMAWeightsTest::test_swap_ema_weights_with_tf_distribute": ("tf.distribute is an error"),
}


def files(patterns):
    """Return the paths of test files, given as patterns in `keras/src`."""
    found = [path for pattern in patterns for path in sorted(SOURCE.glob(pattern))]
    return [path for path in found if path.name not in LEFT_OUT]


def run(tests, folder, *options):
    """Run tests in a separate process; return their outcomes, and how often ESAM was used."""
    outcomes = Path(folder) / "outcomes.json"
    here = str(Path(__file__).parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = (
        *(sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(SOURCE.parents[1])),
        *("-p", "plugin", "-p", "no:cacheprovider", "-q", "--tb=no", "-rN", "-W", "ignore"),
        *("--outcomes", str(outcomes), *options, *map(str, tests)),
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run(command, env=env, check=False)
    found = json.loads(outcomes.read_text("utf-8"))
    return found["outcomes"], found["used"]


def failed(outcomes):
    """Return the names of the tests that failed."""
    return [name for name, (outcome, _) in outcomes.items() if outcome == "failed"]


def main():
    """Return the exit status: 0 if all differences are explained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", default=SUITES, help="files in keras/src")
    suites = parser.parse_args().suites
    with tempfile.TemporaryDirectory() as folder:
        with_esam, used = run(files(suites), folder, "--esam")
        again = [SOURCE.parent.parent / name for name in failed(with_esam)]
        plain = run(again, folder)[0] if again else {}
    passed = sum(outcome == "passed" for outcome, _ in with_esam.values())
    print(f"{passed} of {len(with_esam)} tests pass with ESAM on {keras.backend.backend()}.")
    print(f"It replaced {used['optimizers']} optimizers and ran {used['steps']} steps.")
    broken = failed(plain)
    different = [name for name in failed(with_esam) if name not in broken]
    unexplained = 0
    for name in broken:
        print(f"also fails without ESAM: {name}")
    for name in different:
        causes = [cause for end, cause in DIFFERENCES.items() if name.endswith(end)]
        unexplained += not causes
        kind, why = ("explained", causes[0]) if causes else ("DIFFERENT", with_esam[name][1])
        print(f"{kind}: {name}: {why.partition(chr(10))[0]}")
    closed = [
        end
        for end in DIFFERENCES
        if any(n.endswith(end) and o == "passed" for n, (o, _) in with_esam.items())
    ]
    for end in closed:
        print(f"NO LONGER DIFFERENT: {end}")
    if not used["optimizers"]:
        print("ESAM WAS NOT USED")
    return 1 if unexplained or closed or not used["optimizers"] else 0


if __name__ == "__main__":
    sys.exit(main())
