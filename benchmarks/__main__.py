"""Run a benchmark by name: `python -m benchmarks speed --batch 64`, `... all --quick`."""

import importlib
import sys

#: The function that runs each benchmark with the remaining arguments, as module:function.
BENCHMARKS = {
    "accuracy": "benchmarks.accuracy:main",
    "host": "benchmarks.host:main",
    "keras": "benchmarks.keras_epochs:main",
    "memory": "benchmarks.memory:main",
    "speed": "benchmarks.speed:main",
    "study": "benchmarks.study.command:main",
    "table1": "benchmarks.paper.table1:main",
    "table2": "benchmarks.paper.imagenet:table2",
    "table3": "benchmarks.paper.table3:main",
    "table4": "benchmarks.paper.savings:table4",
    "table5": "benchmarks.paper.savings:table5",
    "table6": "benchmarks.paper.imagenet:table6",
    "fig3": "benchmarks.paper.fig3:main",
    "fig4": "benchmarks.paper.landscape:fig4",
    "fig5": "benchmarks.paper.fig5:main",
    "fig6": "benchmarks.paper.fig6:main",
    "fig7": "benchmarks.paper.fig7:main",
    "fig8": "benchmarks.paper.landscape:fig8",
}


def run(name: str, arguments: list[str]) -> None:
    """Run one benchmark."""
    module, _, function = BENCHMARKS[name].partition(":")
    getattr(importlib.import_module(module), function)(arguments)


def main() -> int:
    """Run the benchmark that the first argument names, with the remaining arguments."""
    name, *arguments = sys.argv[1:] or [""]
    if name == "all":
        for each in BENCHMARKS:
            print(f"{each}:", flush=True)
            run(each, arguments)
        return 0
    if name not in BENCHMARKS:
        names = ", ".join((*BENCHMARKS, "all"))
        print(f"usage: python -m benchmarks NAME [OPTIONS]\nNAME: {names}")
        return 0 if name in ("-h", "--help") else 2
    run(name, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
