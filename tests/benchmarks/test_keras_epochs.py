"""The benchmark of epochs in Keras."""

import json

import pytest
from benchmarks.keras_epochs import SETTINGS, main


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's
def test_the_command_runs(tmp_path, capsys):
    main(["--quick", "--out", str(tmp_path)])
    assert "six masks" in capsys.readouterr().out
    rows = json.loads((tmp_path / "keras.json").read_text())["rows"]
    assert [row["setting"] for row in rows] == list(SETTINGS)
    counted = {row["setting"]: row["counted"] for row in rows}
    assert counted["SGD"] == 1.0 and counted["SAM"] == 2.0
    assert 1.1 < counted["Suffix(0.5), Proportional(0.5)"] < 1.3
    assert all(row["first"] > 0.0 and row["later"] > 0.0 for row in rows)
