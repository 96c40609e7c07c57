"""The suite: it refuses to time what is wrong, says what it cannot measure, and draws only what the files say."""

import json

import pytest
import torch

import torch_sigmoid
from benchmarks import record, speed
from benchmarks.operators import TOLERANCE, Operator, Provider, exact_sigmoid, operators

CPU = torch.device("cpu")


def wrong_gradient(x):
    """σ(x) with the gradient of 1.1·σ(x)."""
    y = torch.sigmoid(x)
    return y.detach() + 1.1 * (y - y.detach())


@pytest.mark.parametrize("layout", speed.LAYOUTS)
@pytest.mark.parametrize("dtype", [dtype for dtype in TOLERANCE if dtype is not torch.float64], ids=str)
def test_every_provider_passes_its_check_in_every_layout(layout, dtype):
    (operator,) = operators().values()
    for name, provider in operator.providers.items():
        if "cpu" in provider.devices:
            speed.check(name, operator, provider, speed.Case(dtype, layout, 1 << 18), CPU)


@pytest.mark.parametrize(
    ("function", "what"),
    [(wrong_gradient, "gradient"), (lambda x: torch.sigmoid(x) * 1.1, "value"), (lambda x: x.sigmoid() * torch.nan, "value")],
    ids=["wrong gradient", "wrong value", "NaN"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_result_is_not_timed(function, what, dtype, monkeypatch, tmp_path, capsys):
    operator = Operator(exact_sigmoid, {"torch": Provider(torch.sigmoid), "wrong": Provider(function)}, "torch", 2, 3)
    with pytest.raises(record.WrongResultError, match=what):
        speed.check("wrong", operator, operator.providers["wrong"], speed.Case(dtype, "dense", 1000), CPU)
    monkeypatch.setattr(speed, "operators", lambda: {"sigmoid": operator})
    monkeypatch.setitem(speed.SIZES, "cpu", (64,))
    assert speed.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_speed_writes_a_row_for_each_provider_and_mode(monkeypatch, tmp_path):
    monkeypatch.setitem(speed.SIZES, "cpu", (64, 1000))
    assert speed.main(["--device", "cpu", "--rounds", "3", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "cpu" / "speed.json").read_text())
    assert {"device", "driver", "torch", "triton", "date", "commit"} <= set(results["environment"])
    rows = results["rows"]
    assert {(row["provider"], row["mode"], row["n"]) for row in rows} == {
        (provider, mode, n)
        for provider in ("torch", "ours, output", "ours, input")
        for mode in ("forward", "both")
        for n in (64, 1000)
    }
    assert all(row["20 %"] <= row["microseconds"] <= row["80 %"] for row in rows)
    assert (tmp_path / "cpu" / "speed.csv").read_text().count("\n") == 1 + len(rows)


def test_what_does_not_fit_into_the_time_is_named(tmp_path, capsys):
    assert speed.main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path)]) == 0
    assert "not measured for want of time" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("part", ["gpu", "tune", "speed"])
def test_a_part_that_needs_a_gpu_says_so_and_is_no_failure(part, tmp_path, capsys):
    import importlib

    module = importlib.import_module(f"benchmarks.{part}")
    arguments = ["--device", "cuda"] if part == "speed" else []
    assert module.main([*arguments, "--out", str(tmp_path / "results")]) == 0
    assert "there is no GPU" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_the_host_part_without_a_compiler_says_so(monkeypatch, tmp_path, capsys):
    from benchmarks import host, stub

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(stub, "compiler", lambda: None)
    assert host.main(["--out", str(tmp_path)]) == 0
    assert "skipped" in capsys.readouterr().out


def test_what_is_saved_is_counted_once(device):
    from benchmarks.memory import saved_bytes

    x = torch.randn(1000, device=device, requires_grad=True)
    assert saved_bytes(torch.sigmoid, x) == 4000
    assert saved_bytes(lambda x: torch_sigmoid.sigmoid(x, save="input"), x) == 4000
    assert saved_bytes(lambda x: torch.sigmoid(x) * x, x) == 8000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_exhaustive_comparison_finds_a_wrong_bit(dtype, monkeypatch):
    accuracy = pytest.importorskip("benchmarks.accuracy")
    monkeypatch.setattr(accuracy, "DTYPES", (dtype,))
    monkeypatch.setattr(accuracy.torch_sigmoid, "sigmoid", torch.sigmoid)
    (row,) = accuracy.exhaustive(CPU)
    assert row["inputs"] == 65536
    assert row["bits not torch's"] == 0
    assert row["ulp of the gradient"] <= 1
    monkeypatch.setattr(accuracy.torch_sigmoid, "sigmoid", lambda x: torch.where(x == 1, 0.75, torch.sigmoid(x)))
    (row,) = accuracy.exhaustive(CPU)
    assert (row["bits not torch's"], row["first at"]) == (1, 1.0)
    assert row["ulp of ours"] > 1


def test_the_readmes_figures_and_tables_are_those_of_the_committed_files(monkeypatch, tmp_path):
    """`make figures` changes nothing."""
    for needed in ("matplotlib", "rich", "sklearn", "tqdm"):
        pytest.importorskip(needed)
    from benchmarks import figures

    readme = record.README.read_text()
    copy = tmp_path / "README.md"
    copy.write_text(readme)
    monkeypatch.setattr(record, "README", copy)
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: (drawn.append(path), figures.plt.close(figure)))
    for module in ("train", "vanishing"):
        monkeypatch.setattr(f"benchmarks.{module}.draw_all", lambda results, folder: [])
    assert figures.main() == 0
    assert copy.read_text() == readme
    assert all(path.exists() for path in drawn)
    shown = {record.ROOT / path for path in figures.re.findall(r"\]\((benchmarks/results/[^)]*\.png)\)", readme)}
    assert all(path.exists() for path in shown)


@pytest.fixture
def vanishing(monkeypatch):
    for needed in ("matplotlib", "rich", "sklearn", "tqdm"):
        pytest.importorskip(needed)
    from benchmarks import vanishing

    monkeypatch.setattr(vanishing, "DEPTHS", (2, 6))
    monkeypatch.setattr(vanishing, "SAVE_DEPTHS", (1,))
    monkeypatch.setattr(vanishing, "SHOWN_DEPTH", 2)
    return vanishing


def test_the_demonstration_sees_gradients_vanish(vanishing, tmp_path):
    assert vanishing.main(["--device", "cpu", "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert {path.name for path in (tmp_path / "cpu").iterdir()} == {
        "vanishing.csv",
        "vanishing.json",
        "vanishing.png",
        "vanishing_training.png",
    }
    results = json.loads((tmp_path / "cpu" / "vanishing.json").read_text())
    names = ("activation", "depth", "precision", "initialisation")
    rows = {tuple(row[name] for name in names): row for row in results["rows"]}
    for activation in ("sigmoid", "SiLU", "ReLU"):
        norms = next(each["first step"] for each in results["norms"] if each["activation"] == activation)
        assert len(norms) == 6
        # σ' is 1/4 at best; what a layer's weights give back does not make up for it.
        assert norms == sorted(norms)
    first = "first step: gradient leaving the first layer"
    assert rows["sigmoid", 6, "fp32", "default"][first] < 1e-3 * rows["sigmoid", 2, "fp32", "default"][first]
    lost, kept = rows["sigmoid", 1, "bf16", "saturated"], rows['sigmoid, save="input"', 1, "bf16", "saturated"]
    assert lost["first step: lost to rounding"] > 0.99
    assert kept["first step: lost to rounding"] == 0
    assert kept[first] > 0


def test_the_demonstration_fails_where_a_gradient_is_lost_after_all(vanishing, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(vanishing.ACTIVATIONS, 'sigmoid, save="input"', torch_sigmoid.Sigmoid)
    assert vanishing.main(["--device", "cpu", "--epochs", "1", "--out", str(tmp_path)]) == 1
    assert "FAILED lost to rounding" in capsys.readouterr().out


def test_where_an_activation_stops_is_its_first_failure(vanishing):
    rows = [
        {"activation": "SiLU", "depth": depth, "precision": "fp32", "initialisation": "default", "accuracy": accuracy}
        for depth, accuracy in ((1, 0.9), (2, 0.8), (6, 0.1))
    ]
    assert vanishing.deepest(rows, "SiLU", "fp32", "default") == (2, 6)
    assert vanishing.deepest(rows[:2], "SiLU", "fp32", "default") == (2, None)
    assert vanishing.deepest(rows[2:], "SiLU", "fp32", "default") == (None, 6)


class Meddling(torch_sigmoid.diagnostics.GradientWatch):
    """A watch that changes what it watches."""

    def _before(self, layer, module, args, kwargs):
        args[0].data.mul_(1.001)


@pytest.mark.parametrize(("watch", "code"), [(torch_sigmoid.diagnostics.GradientWatch, 0), (Meddling, 1)])
def test_the_price_of_a_watch_is_measured_only_where_it_changes_nothing(watch, code, monkeypatch, tmp_path, capsys):
    from benchmarks import watch as part

    monkeypatch.setattr(part, "GradientWatch", watch)
    for constant, value in (("WIDTH", 32), ("BATCH", 8), ("ROUNDS", 2)):
        monkeypatch.setitem(getattr(part, constant), "cpu", value)
    assert part.main(["--device", "cpu", "--out", str(tmp_path)]) == code
    if code:
        assert "changed the parameters" in capsys.readouterr().out
        assert not list(tmp_path.iterdir())
    else:
        rows = json.loads((tmp_path / "cpu" / "watch.json").read_text())["rows"]
        assert [row["watch"] for row in rows] == ["no watch", "every=1", "every=10"]
        assert rows[0]["overhead %"] == 0
