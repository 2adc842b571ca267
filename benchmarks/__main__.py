"""Run a benchmark by its name: `python -m benchmarks speed --batch 64`."""

import importlib
import sys

#: The module that holds each benchmark, with a `main` that takes the other arguments.
BENCHMARKS = {
    "accuracy": "benchmarks.accuracy",
    "speed": "benchmarks.speed",
}


def main() -> int:
    """Run the benchmark that the first argument names, with the others."""
    name, *arguments = sys.argv[1:] or [""]
    if name not in BENCHMARKS:
        print(f"usage: python -m benchmarks NAME [OPTIONS]\nNAME: {', '.join(BENCHMARKS)}")
        return 2
    importlib.import_module(BENCHMARKS[name]).main(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
