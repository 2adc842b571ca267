"""The demo in its smallest form: it runs, shows its results, and explains wrong input."""

import pickle

import numpy as np
import pytest
import torch
from demo.__main__ import main
from demo.options import parse


def cifar(folder, train=128, test=64):
    """Write a folder in the official Python layout of CIFAR-10, with random images."""
    inner = folder / "cifar-10-batches-py"
    inner.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def write(name, n):
        data = generator.integers(0, 256, (n, 3072), dtype=np.uint8)
        labels = generator.integers(0, 10, n).tolist()
        (inner / name).write_bytes(pickle.dumps({b"data": data, b"labels": labels}))

    for i in range(1, 6):
        write(f"data_batch_{i}", train // 5)
    write("test_batch", test)
    return folder


@pytest.fixture
def _small(monkeypatch):
    """Use few points in pictures and few steps in counts."""
    monkeypatch.setattr("demo.pictures.POINTS", 3)
    monkeypatch.setattr("demo.measures.COUNTED", 3)
    monkeypatch.setattr("demo.measures.TURNS", 3)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def _threads():
    """Use two threads, and restore the number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("arguments", "threads"), [((), 1), (("--threads", "2"), 2)])
def test_it_trains_on_one_thread_by_default(arguments, threads, tmp_path, monkeypatch):
    found = []
    # The number of threads at the first computation; nothing is trained.
    monkeypatch.setattr("demo.__main__.load", lambda path: found.append(torch.get_num_threads()))
    with pytest.raises(AttributeError):
        main(["--out", str(tmp_path), *arguments])
    assert found == [threads]


@pytest.mark.usefixtures("_small")
def test_it_runs_on_cifar(tmp_path, capsys):
    main(["--data", str(cifar(tmp_path / "data")), "--epochs", "1", "--out", str(tmp_path / "o")])
    printed = capsys.readouterr().out
    for word in ("SGD", "SAM", "ESAM", "images/s", "predicted", "sharpness", "cifar10"):
        assert word in printed, word
    for name in ("curves.png", "landscapes.png"):
        assert (tmp_path / "o" / name).read_bytes().startswith(b"\x89PNG")


def test_the_digits_need_no_download():
    from demo.images import load

    data = load(None)
    assert data.shape == (1, 8, 8)
    assert len(data.train) + len(data.test) == 1797


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rho", "-1"], "`rho` must be finite and >= 0"),
        (["--beta", "0"], "`beta` must be in (0, 1]"),
        (["--gamma", "1.5"], "`gamma` must be in (0, 1]. Received: gamma=1.5."),
        (["--epochs", "0"], "`epochs` must be >= 1"),
        (["--threads", "0"], "`threads` must be >= 1"),
        (["--seed", "-1"], "`seed` must be in [0, 9223372036854775807]. Received: seed=-1."),
        (["--seed", str(2**63)], "`seed` must be in [0, 9223372036854775807]"),
        (["--device", "abacus"], "abacus"),
        (["--epohcs", "1"], "--epohcs"),
    ],
)
def test_wrong_options(arguments, words, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["", "pictures", "a/b"])
def test_out_that_is_a_file(inside, tmp_path, capsys):
    (tmp_path / "taken").write_text("kept")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "taken" / inside)])
    said = capsys.readouterr().err
    assert (
        f"`out` must be a folder, or a path where one can be created: {tmp_path / 'taken'} is a"
        in said
    )
    assert (tmp_path / "taken").read_text() == "kept"


def test_out_may_be_an_existing_or_a_new_folder(tmp_path):
    for out in (tmp_path, tmp_path / "a" / "b"):
        assert parse(["--out", str(out)]).out == out
    assert not (tmp_path / "a").exists()


def test_errors_for_wrong_folders_describe_the_layout(tmp_path):
    with pytest.raises(SystemExit, match="cifar-100-python/train, test") as found:
        main(["--data", str(tmp_path / "nowhere")])
    assert "which is not a folder" in str(found.value)
    (tmp_path / "cats").mkdir()
    with pytest.raises(SystemExit, match="which contains cats"):
        main(["--data", str(tmp_path)])
    inner = tmp_path / "cifar-100-python"
    inner.mkdir()
    (inner / "train").write_text("not a pickle")
    with pytest.raises(SystemExit, match="which could not be read"):
        main(["--data", str(tmp_path)])
