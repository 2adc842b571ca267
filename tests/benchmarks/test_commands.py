"""Command lines that are refused before training, and the common options."""

from pathlib import Path

import pytest
from benchmarks import __main__ as runner
from benchmarks.__main__ import BENCHMARKS

TRAINING = sorted(set(BENCHMARKS) - {"host", "memory", "speed", "study", "table4", "table5"})


def _refused(capsys: pytest.CaptureFixture[str], name: str, *arguments: str) -> str:
    """Run a command that its parser must refuse; return the message."""
    with pytest.raises(SystemExit) as ended:
        runner.run(name, list(arguments))
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.partition("error: ")[2].split())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_accepts_the_common_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        runner.run(name, ["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--quick", "--threads", "--out"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_options_are_not_abbreviated(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unrecognized arguments: --hel" in _refused(capsys, name, "--hel")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *((name, "--methods") for name in ("table1", "table2", "table3", "table6")),
        *((name, "--methods") for name in ("fig4", "fig8", "accuracy", "speed", "memory")),
        ("fig6", "--method"),
    ],
)
def test_a_misspelt_method_is_refused(
    name: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _refused(capsys, name, option, "smam@0.1")
    assert f"argument {option}: `method` must be one of sgd," in said
    assert "Received: 'smam'" in said


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *((name, "--models") for name in ("table1", "table2", "table6", "speed")),
        *((name, "--model") for name in ("table3", "fig3", "fig5", "accuracy", "memory")),
    ],
)
def test_a_misspelt_model_is_refused(
    name: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _refused(capsys, name, option, "resnet1")
    assert f"argument {option}: invalid choice: 'resnet1'" in said


@pytest.mark.parametrize("name", TRAINING)
def test_runs_of_no_epochs_are_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = _refused(capsys, name, "--epochs", "0")
    assert said == "argument --epochs: must be a whole number >= 1. Received: 0."


@pytest.mark.parametrize(
    ("name", "arguments", "must"),
    [
        ("table1", ("--batch", "0"), ">= 1"),
        ("table2", ("--m", "0"), ">= 1"),
        ("table3", ("--seeds", "-1"), ">= 0"),
        ("table4", ("--betas", "0.5", "1.5"), "in (0, 1]"),
        ("fig3", ("--values", "0"), "in (0, 1]"),
        ("fig4", ("--points", "1"), ">= 2"),
        ("fig4", ("--groups", "0"), ">= 1"),
        ("fig5", ("--epochs", "three"), ">= 1. Received: three"),
        ("fig6", ("--batches", "0"), ">= 1"),
        ("fig7", ("--betas", "1"), "in (0, 1). Received: 1."),
        ("fig7", ("--draws", "0"), ">= 1"),
        ("fig8", ("--reach", "0"), "> 0"),
        ("accuracy", ("--rho", "-1"), ">= 0"),
        ("accuracy", ("--rho", "nan"), ">= 0"),
        ("accuracy", ("--noise", "1"), "in [0, 1)"),
        ("speed", ("--repeats", "0"), ">= 1"),
        ("memory", ("--batch", "0"), ">= 1"),
    ],
)
def test_meaningless_numbers_are_refused(
    name: str, arguments: tuple[str, ...], must: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _refused(capsys, name, *arguments)
    assert f"argument {arguments[0]}: must be " in said
    assert must in said


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("accuracy", ["--data", "nowhere"], "`data` must be digits, synthetic, or a folder"),
        ("accuracy", ["--data", "pydoc"], "`data` must be digits, synthetic, or a folder"),
        ("accuracy", ["--device", "gpu"], "gpu"),
        ("speed", ["--device", "gpu"], "gpu"),
        ("speed", ["--clock", "cpu"], "--clock cpu needs --device cpu and --threads 1"),
        ("memory", ["--device", "gpu"], "gpu"),
        ("table1", ["--data", "digits"], "unrecognized arguments: --data digits"),
        ("table2", ["--model", "resnet8"], "unrecognized arguments: --model resnet8"),
    ],
)
def test_what_cannot_be_run_is_refused(
    command: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in _refused(capsys, command, *options)


def test_the_study_says_that_its_data_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ESAM_DATA", str(tmp_path))
    found = _refused(capsys, "study", "small", "--out", str(tmp_path))
    assert "cifar100: cifar-100-python" in found


def test_help_names_the_default_data(capsys: pytest.CaptureFixture[str]) -> None:
    for command, data in (("accuracy", "digits"), ("fig5", "cifar10")):
        with pytest.raises(SystemExit):
            runner.run(command, ["--help"])
        assert f"(default: {data})" in " ".join(capsys.readouterr().out.split())
