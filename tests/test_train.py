"""The training command: its kernels agree with torch, and it says so when a promise does not hold."""

import json

import pytest
import torch

for library in ("matplotlib", "rich", "sklearn", "tqdm"):
    pytest.importorskip(library, reason="part of the extra `train`")
import torch_sigmoid as ts
from benchmarks import train
from benchmarks.training import boundary, imbalanced, retrieval


def test_interpreted_kernels_train_as_torch_does(tmp_path):
    assert train.main(["--interpret", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "train.json").read_text())
    assert results["path"] == "triton"
    assert set(results["largest_loss_difference"]) == {"breast cancer", "digits"}
    assert set(results["imbalanced"]["focal"]) == {"torch operators", "torch_sigmoid"}
    names = [retrieval.PLAIN, retrieval.ONE_PROCESS] + [retrieval.TWO_PROCESSES] * (retrieval.no_ranks() is None)
    steps = train.INTERPRETED_STEPS
    assert {name: len(run["losses"]) for name, run in results["retrieval"].items()} == dict.fromkeys(names, steps)
    # None of these curves is that of another seed.
    runs = {name: retrieval.Run(**run) for name, run in results["retrieval"].items()}
    runs[retrieval.PLAIN] = retrieval.train(retrieval.siglip_loss, torch.device("cpu"), steps, 1, "another seed")
    found = retrieval.failures(runs, trained=False)
    assert [failure.partition(": the loss curve")[0] for failure in found] == [f"paired views, {name}" for name in names[1:]]


@pytest.mark.skipif(ts.kernels.INTERPRETED, reason="trains on torch's operators, for half a minute through these")
def test_a_missed_accuracy_and_a_wrong_loss_are_failures(tmp_path, capsys, monkeypatch):
    wrong = {"alpha": 0.2501, "gamma": 2.0, "reduction": "mean"}
    monkeypatch.setitem(imbalanced.LOSSES["focal"], "torch_sigmoid", lambda *pair: ts.sigmoid_focal_loss(*pair, **wrong))
    monkeypatch.setattr(ts, "siglip_loss", lambda *operands, **options: retrieval.siglip_loss(*operands) * (1 + 1e-9))
    monkeypatch.setattr(retrieval, "no_ranks", lambda: "nobody is there")
    assert train.main(["--device", "cpu", "--epochs", "1", "--out", str(tmp_path)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "is below 0.95" in said
    assert "FAILED: focal on a rare digit: our loss curve differs" in said
    assert "FAILED: BCE on a rare digit" not in said
    assert "FAILED: paired views, torch_sigmoid: the loss curve differs" in said
    assert "not run in two processes: nobody is there" in said
    figures = {"loss.png", "loss_saturated.png", "boundary.png"}
    assert {path.name for path in tmp_path.iterdir()} == figures | {"train.json", "boundary.json"}
    assert retrieval.TWO_PROCESSES not in json.loads((tmp_path / "train.json").read_text())["retrieval"]


def test_a_class_as_rare_as_is_said():
    task = imbalanced.load_task(torch.device("cpu"), 0)
    assert task.train_targets.sum() == imbalanced.KEPT_POSITIVES
    assert 0.02 < task.train_targets.mean() < 0.025
    # Held out are half of the 174 images of an 8, which weigh what is left of the other half.
    assert task.test_targets.sum() == 87
    assert task.positives_kept == imbalanced.KEPT_POSITIVES / 87


def test_a_loss_that_is_not_a_number_is_a_failure():
    losses = [0.1, 0.2], [0.1, float("nan")]
    rare = {"BCE": {name: [imbalanced.Run(each, 1.0, 1.0, 1.0)] for name, each in zip(imbalanced.LOSSES["BCE"], losses)}}
    assert len(imbalanced.failures(rare)) == 1
    names = retrieval.PLAIN, retrieval.ONE_PROCESS
    paired = {name: retrieval.Run(each, 1.0, 10.0, -10.0) for name, each in zip(names, losses)}
    assert len(retrieval.failures(paired, trained=True)) == 1


@pytest.mark.skipif(retrieval.no_ranks() is not None, reason="needs gloo")
def test_ranks_that_do_not_run_are_a_failure(capfd, monkeypatch):
    monkeypatch.setattr(retrieval, "RANKS", "no number")
    plain = retrieval.Run([1.0], 1.0, 10.0, -10.0)
    runs = {retrieval.PLAIN: plain, retrieval.TWO_PROCESSES: retrieval.train_ranks(1, 0)}
    assert "no number" in capfd.readouterr().err
    assert retrieval.failures(runs, trained=True) == ["paired views, torch_sigmoid, two processes: ended without a result"]
    assert retrieval.rows(runs)[1]["held-out accuracy"] == "failed"


def test_an_accuracy_of_retrieval_that_is_missed_is_a_failure():
    runs = {retrieval.PLAIN: retrieval.Run([1.0], retrieval.REQUIRED_ACCURACY - 0.01, 10.0, -10.0)}
    assert len(retrieval.failures(runs, trained=True)) == 1
    assert retrieval.failures(runs, trained=False) == []


@pytest.mark.parametrize(
    "arguments", [["--epochs", "0"], ["--interpret", "--device", "cuda"], ["--dtype", "int8"]], ids=" ".join
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments)
    assert "usage" in capsys.readouterr().err


def test_descent_moves_the_boundary_and_the_figure_shows_what_the_file_holds(tmp_path, monkeypatch):
    assert boundary.main(["--device", "cpu", "--steps", "20", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "boundary.json").read_text())
    assert (tmp_path / "boundary.png").stat().st_size > 0
    x, target = boundary.load_records(torch.device("cpu"))
    assert x.shape == (569, len(results["features"]))
    torch.testing.assert_close(x.std(0), torch.ones(2))
    for name, own in results["models"].items():
        losses = own["losses"]
        assert len(losses) == 21
        assert losses[-1] < 0.6 * losses[0]
        assert {panel: seen["step"] for panel, seen in own["panels"].items()} == {"start": 0, "on the way": 1, "end": 20}
        boundaries = []
        for seen in own["panels"].values():
            assert seen["loss"] == losses[seen["step"]]
            # The parameters are those that gave this loss and accuracy.
            model = boundary.MODELS[name]()
            model.load_state_dict({key: torch.tensor(value) for key, value in seen["parameters"].items()})
            with torch.no_grad():
                sigma = model(x)
            torch.testing.assert_close(((sigma - target) ** 2).mean().item(), seen["loss"], rtol=1e-5, atol=0)
            assert ((sigma > 0.5) == target.bool()).double().mean().item() == seen["accuracy"]
            boundaries.append(sigma > 0.5)
        assert own["panels"]["end"]["accuracy"] > own["panels"]["start"]["accuracy"]
        assert not torch.equal(boundaries[0], boundaries[-1])
    monkeypatch.setattr(torch.optim, "SGD", lambda parameters, lr: torch.optim.Adam(parameters, lr=1.0, maximize=True))
    assert boundary.main(["--device", "cpu", "--steps", "2", "--out", str(tmp_path)]) == 1
