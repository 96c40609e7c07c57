"""The training command: its kernels agree with torch, and it says so when a promise does not hold."""

import json

import pytest

for library in ("matplotlib", "rich", "sklearn", "tqdm"):
    pytest.importorskip(library, reason="part of the extra `train`")
from benchmarks import train


def test_interpreted_kernels_train_as_torch_does(tmp_path):
    assert train.main(["--interpret", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "train.json").read_text())
    assert results["path"] == "triton"
    assert set(results["largest_loss_difference"]) == {"breast cancer", "digits"}


def test_a_missed_accuracy_is_a_failure(tmp_path, capsys):
    assert train.main(["--device", "cpu", "--epochs", "1", "--out", str(tmp_path)]) == 1
    assert "is below 0.95" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"loss.png", "loss_saturated.png", "train.json"}


@pytest.mark.parametrize(
    "arguments", [["--epochs", "0"], ["--interpret", "--device", "cuda"], ["--dtype", "int8"]], ids=" ".join
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments)
    assert "usage" in capsys.readouterr().err
