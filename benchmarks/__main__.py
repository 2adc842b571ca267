"""Run a benchmark by its name: `python -m benchmarks speed --batch 64`."""

import sys

from benchmarks import speed

BENCHMARKS = {"speed": speed.main}


def main() -> int:
    """Run the benchmark that the first argument names, with the others."""
    name, *arguments = sys.argv[1:] or [""]
    if name not in BENCHMARKS:
        print(f"usage: python -m benchmarks NAME [OPTIONS]\nNAME: {', '.join(BENCHMARKS)}")
        return 2
    BENCHMARKS[name](arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
