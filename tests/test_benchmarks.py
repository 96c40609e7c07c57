"""The suite: it refuses to time what is wrong, says what it cannot measure, and draws only what the files say."""

import dataclasses
import functools
import importlib
import itertools
import json
import math
import re
import subprocess

import pytest
import torch

import torch_sigmoid
from benchmarks import __main__ as entry
from benchmarks.__main__ import PARTS
from benchmarks.measure import counts, gpu, graphs, imports, pairs, record, soak, speed, stub, ways
from benchmarks.measure import operators as table
from benchmarks.measure.operators import TOLERANCE, Operator, Provider, operators
from torch_sigmoid import kernels
from torch_sigmoid.operators import OPERATORS, siglip_loss

CPU = torch.device("cpu")
DTYPES = [dtype for dtype in TOLERANCE if dtype is not torch.float64]
GATES = [name for name, operator in operators().items() if operator.family == "gates"]


# Whole trainings, and memory, are the interpreter's own there; its kernels have tests of their own.
not_interpreted = pytest.mark.skipif(kernels.INTERPRETED, reason="measures torch's operators, or a GPU")


def sigmoid_row(**providers):
    """The row of sigmoid with these functions in place of its providers."""
    providers = {label: Provider(function) for label, function in providers.items()}
    return operators()["sigmoid"]._replace(providers=providers)


def wrong_gradient(x):
    """σ(x) with the gradient of 1.1·σ(x)."""
    y = torch.sigmoid(x)
    return y.detach() + 1.1 * (y - y.detach())


@pytest.mark.parametrize("layout", speed.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_provider_of_sigmoid_passes_its_check_in_every_layout(layout, dtype):
    case = speed.Case(dtype, layout, (1 << 18) + 7 * (layout == "odd"))
    assert speed.checked("sigmoid", operators()["sigmoid"], case, CPU).keys() == {"torch", "ours, output", "ours, input"}


@pytest.mark.parametrize("name", [name for name in operators() if name != "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_provider_of_a_gate_or_loss_passes_its_check(name, dtype):
    for n in (64, 1 << 16):
        assert speed.checked(name, operators()[name], speed.Case(dtype, "dense", n), CPU).keys() == {"torch", "ours"}


@pytest.mark.parametrize("layout", speed.LAYOUTS)
@pytest.mark.parametrize("name", ["sigmoid", *GATES])
def test_operands_are_laid_out_as_the_case_says(name, layout):
    operator = operators()[name]
    if (name, layout) == ("sigmoid_gate, broadcast", "channels last"):
        pytest.skip("a gate a row is no image")
    operands, grad = speed.build(operator, speed.Case(torch.float32, layout, 1 << 18), CPU)
    assert operator.formula(*operands).shape == grad.shape
    assert abs(grad.numel() / (1 << 18) - 1) < 0.01
    assert any(grad.stride()) == (layout != "expanded gradient")
    assert grad.is_contiguous() == (layout not in ("channels last", "rows of a slice", "expanded gradient"))
    assert (grad.data_ptr() % 16 != 0) == (layout == "off alignment")
    # 3·x is compact again.
    if name != "swiglu, clamped" and layout != "expanded gradient":
        assert {operand.is_contiguous() for operand in operands} == {grad.is_contiguous()}


def test_the_traffic_is_that_of_every_operand_once():
    n = 1 << 16

    def tensors(name, layout="dense"):
        operator = operators()[name]
        moved = speed.traffic(operator, *speed.build(operator, speed.Case(torch.bfloat16, layout, n), CPU))
        assert moved["both"] == moved["forward"] + moved["backward"]
        return moved["forward"] / (2 * n), moved["backward"] / (2 * n)

    assert tensors("sigmoid") == (2, 3)
    assert tensors("sigmoid", "expanded gradient") == (2, 2 + 1 / n)
    assert tensors("glu") == tensors("swiglu") == tensors("swiglu_packed") == (3, 5)
    assert tensors("sigmoid_gate, broadcast") == (2 + 1 / 256, 3 + 2 / 256)


def test_an_operand_may_have_no_gradient_and_an_output_no_dimension():
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    operator = Operator(
        "losses",
        "",
        bce,
        lambda make, rows, columns: (make(rows, columns), torch.randint(2, (rows, columns)).float()),
        {"torch": Provider(bce), "wrong": Provider(lambda x, target: bce(x, target) * 1.1)},
        columns=16,
        constants=(1,),
    )
    case = speed.Case(torch.float32, "dense", 64)
    speed.check("loss", operator, operator.providers["torch"], case, CPU)
    with pytest.raises(record.WrongResultError, match="the value is wrong"):
        speed.check("loss", operator, operator.providers["wrong"], case, CPU)
    operands, grad = speed.build(operator, case, CPU)
    assert grad.shape == ()
    assert [leaf.requires_grad for leaf in operator.leaves(operands)] == [True, False]
    assert speed.traffic(operator, operands, grad) == {"forward": 516, "backward": 772, "both": 1288}
    for mode in speed.MODES:
        speed.prepare(operator, operator.providers["torch"], mode, [(operands, grad)])(0)
    # What torch runs within its one operator.
    assert counts.row_of("loss", operator, "torch")["forward"] == 5


@pytest.mark.parametrize(
    ("function", "what"),
    [(wrong_gradient, "gradient"), (lambda x: torch.sigmoid(x) * 1.1, "value"), (lambda x: x.sigmoid() * torch.nan, "value")],
    ids=["wrong gradient", "wrong value", "NaN"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_result_is_not_timed(function, what, dtype, monkeypatch, tmp_path, capsys):
    operator = sigmoid_row(torch=torch.sigmoid, wrong=function)
    with pytest.raises(record.WrongResultError, match=what):
        speed.check("wrong", operator, operator.providers["wrong"], speed.Case(dtype, "dense", 1000), CPU)
    monkeypatch.setattr(speed, "chosen", lambda names: {"sigmoid": operator})
    assert speed.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong_operand", [0, 1])
@pytest.mark.parametrize("name", ["sigmoid_gate, broadcast", "swiglu"])
def test_a_wrong_gradient_of_one_operand_is_not_timed(name, wrong_operand, dtype):
    operator = operators()[name]

    def wrong(*operands):
        operands = list(operands)
        right = operands[wrong_operand]
        operands[wrong_operand] = right.detach() + 1.1 * (right - right.detach())
        return operator.formula(*operands)

    with pytest.raises(record.WrongResultError, match=f"gradient {wrong_operand + 1}"):
        speed.check(name, operator, Provider(wrong), speed.Case(dtype, "dense", 1 << 14), CPU)


@pytest.mark.parametrize("broken", ["raise RuntimeError('built for another torch')", "", "import no_such_module"])
def test_another_package_is_no_dependency(broken, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.syspath_prepend(tmp_path)
    module = f"package_{abs(hash(broken))}"
    (tmp_path / f"{module}.py").write_text(broken)
    assert table._of_package(f"{module}:Function.apply") is None
    assert table._of_package("there_is_no_such_package:Function.apply") is None
    assert table._of_package("math:sqrt") is math.sqrt
    packages = {"broken": f"{module}:function", "works": "math:sqrt"}
    providers = table.providers(torch.sigmoid, torch.sigmoid, packages)
    assert providers.keys() == {"torch", "torch.compile", "ours", "works"}
    assert providers["works"] == Provider(math.sqrt, ("cuda",), foreign=True)


def raise_error(x):
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize("function", [raise_error, wrong_gradient])
def test_another_packages_operator_that_fails_is_left_out(function, capsys):
    operator = sigmoid_row(torch=torch.sigmoid)
    operator.providers["theirs"] = Provider(function, foreign=True)
    assert list(speed.checked("sigmoid", operator, speed.Case(torch.float32, "dense", 64), CPU)) == ["torch"]
    assert "left out: sigmoid by theirs" in capsys.readouterr().out


def test_another_packages_operator_may_overwrite_its_own_operands_only():
    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.sigmoid(x)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            s = torch.sigmoid(x)
            x.data.copy_(grad * s * (1 - s))
            return x

    operator, provider = operators()["sigmoid"], Provider(Overwriting.apply, foreign=True)
    case = speed.Case(torch.float32, "dense", 64)
    speed.check("sigmoid", operator, provider, case, CPU)
    buffers = speed.make_buffers(operator, case, CPU)
    ((before,), _) = buffers[0]
    before = before.clone()
    for mode in speed.MODES:
        speed.prepare(operator, provider, mode, buffers)(0)
    assert torch.equal(buffers[0][0][0], before)


def test_a_compiled_backward_may_be_repeated(monkeypatch, tmp_path):
    """On a GPU, Inductor's backward of a mean writes over what forward has kept, unless it is told not to."""
    from torch._functorch import config

    assert config.donated_buffer
    seen = set()

    def function(x):
        seen.add(config.donated_buffer)
        return torch.sigmoid(x)

    monkeypatch.setattr(speed, "chosen", lambda names: {"sigmoid": sigmoid_row(torch=function)})
    monkeypatch.setitem(speed.PLANS, ("sigmoid", "cpu"), speed.Plan((torch.float32,), (1024,)))
    assert speed.main(["--device", "cpu", "--rounds", "1", "--out", str(tmp_path)]) == 0
    assert seen == {False}
    assert config.donated_buffer


def test_speed_writes_a_row_for_each_provider_and_mode(monkeypatch, tmp_path):
    monkeypatch.setitem(speed.PLANS, ("sigmoid", "cpu"), speed.Plan((torch.float32,), (64, 1000)))
    assert speed.main(["--device", "cpu", "--operators", "sigmoid", "--rounds", "3", "--out", str(tmp_path)]) == 0
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


def test_the_gates_have_a_file_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setitem(speed.PLANS, ("gates", "cpu"), speed.Plan((torch.float32,), (64,)))
    assert speed.main(["--device", "cpu", "--operators", "gates", "--rounds", "1", "--out", str(tmp_path)]) == 0
    assert {path.name for path in (tmp_path / "cpu").iterdir()} == {"gates.csv", "gates.json"}
    rows = json.loads((tmp_path / "cpu" / "gates.json").read_text())["rows"]
    assert {(row["operator"], row["provider"], row["mode"]) for row in rows} == {
        (name, provider, mode) for name in GATES for provider in ("torch", "ours") for mode in ("forward", "both")
    }
    assert speed.main(["--device", "cpu", "--operators", "silu", "--rounds", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "cpu" / "gates.json").read_text())["rows"]
    assert {row["operator"] for row in rows} == {"silu"}


def test_the_losses_have_files_of_their_own(monkeypatch, tmp_path):
    for family in ("losses", "siglip"):
        monkeypatch.setitem(speed.PLANS, (family, "cpu"), speed.Plan((torch.float32,), (1 << 12,)))
    assert speed.main(["--device", "cpu", "--operators", "losses", "siglip", "--rounds", "1", "--out", str(tmp_path)]) == 0
    assert {path.name for path in (tmp_path / "cpu").glob("*.json")} == {"losses.json", "siglip.json"}
    for family in ("losses", "siglip"):
        rows = json.loads((tmp_path / "cpu" / f"{family}.json").read_text())["rows"]
        assert {row["operator"] for row in rows} == {name for name, each in operators().items() if each.family == family}


@not_interpreted
@pytest.mark.skipif(not pairs.CLEAR.exists(), reason="a process's peak memory is known on Linux only")
def test_the_memory_of_pairs_is_measured_in_processes_of_their_own(tmp_path, monkeypatch, capsys):
    assert pairs.main(["--device", "cpu", "--pairs", "2048", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "cpu" / "pairs.json").read_text())["rows"]
    assert [(row["pairs"], row["provider"]) for row in rows] == [(2048, "torch"), (2048, "ours")]
    theirs, ours = (row["peak MiB"] for row in rows)
    # Three matrices of all pairs at least; ours holds a quarter of each at a time, and the features' gradients.
    assert theirs > 3 * 4 * 2048**2 / 2**20
    assert ours < theirs / 4
    monkeypatch.setitem(pairs.PROVIDERS, "ours", lambda *operands: 1.001 * siglip_loss(*operands))
    assert pairs.main(["--device", "cpu", "--pairs", "300", "--out", str(tmp_path / "wrong")]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert not (tmp_path / "wrong").exists()


def test_an_unknown_operator_is_refused(capsys):
    with pytest.raises(SystemExit):
        speed.main(["--operators", "silu", "geglu"])
    assert "got geglu" in capsys.readouterr().err


def test_a_gpus_section_of_gates_and_its_summary(monkeypatch, tmp_path):
    commands = gpu.commands(tmp_path)
    assert commands["gates"][-4:-2] == ["--operators", "gates"]
    assert commands["speed"][-4:-2] == ["--operators", "sigmoid"]
    monkeypatch.setattr(
        gpu.record, "environment", lambda device: dict.fromkeys(("device", "driver", "torch", "triton", "date", "commit"))
    )
    monkeypatch.setattr(gpu.record, "folder_of", lambda device, out: out)
    row = {"operator": "swiglu", "mode": "both", "dtype": "bf16", "layout": "dense", "n": 16, "time / torch": 0.5}
    record.write(tmp_path, "gates", [row | {"provider": "ours"}, row | {"provider": "fla"}], {})
    lines = gpu.summary(tmp_path, {}).splitlines()
    assert "| swiglu | ours | both | bf16 | dense | 16 |  | 0.5 |  |" in lines
    assert "| swiglu | fla | both | bf16 | dense | 16 |  | 0.5 |  |" in lines


def test_the_tests_that_a_gpu_ran_are_counted_by_file(tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.test_gates" name="test_a"/>
        <testcase classname="tests.test_gates.TestB" name="test_b"><failure/></testcase>
        <testcase classname="tests.test_watch" name="test_c"><error/></testcase>
        <testcase classname="" name="tests.test_types"><skipped/></testcase>
        </testsuite></testsuites>"""
    )
    assert gpu.tests_of([report, report]) == [
        {"file": "tests/test_gates.py", "passed": 2, "failed": 2, "skipped": 0},
        {"file": "tests/test_types.py", "passed": 0, "failed": 0, "skipped": 2},
        {"file": "tests/test_watch.py", "passed": 0, "failed": 2, "skipped": 0},
    ]


def test_counts_are_of_launches_and_of_torch_operators_beside_them():
    x = torch.randn(8, 8)

    def of(function, *operands):
        counters = counts.count(function, [operand.requires_grad_() for operand in operands])
        return [counter.kernels for counter in counters.values()]

    torchs = [1, 1, 10]
    assert of(torch.nn.functional.silu, x) == torchs
    if not kernels.INTERPRETED:
        return
    assert of(torch_sigmoid.silu, x) == [1, 1, 1]
    assert of(lambda x: torch_sigmoid.silu(x) * 2, x)[:2] == [2, 2]
    # A gate of everything is summed up from the sums of several programs.
    assert of(torch_sigmoid.sigmoid_gate, torch.randn(3000, 40), torch.randn(1, 40))[1] > 1


@pytest.mark.skipif(bool(kernels.UNAVAILABLE), reason="counts launches")
def test_counts_are_written(monkeypatch, tmp_path):
    monkeypatch.setattr(counts, "measure_memory", lambda device: [])
    assert counts.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "cpu" / "counts.json").read_text())["rows"]
    assert [(row["operator"], row["provider"]) for row in rows] == [
        (name, label) for name in operators() if name != "sigmoid" for label in ("torch", "ours")
    ]
    committed = json.loads((record.RESULTS / "cpu" / "counts.json").read_text())["rows"]
    # Torch's differ from version to version.
    committed = {row["operator"]: row for row in committed if row["provider"] == "ours"}
    counted = {row["operator"]: row for row in rows if row["provider"] == "ours"}
    assert counted.keys() >= committed.keys()
    assert committed == {name: counted[name] for name in committed}


COMMITTED = list(dict.fromkeys(row["operator"] for row in record.read(record.RESULTS / "cpu", "counts")["rows"]))


@pytest.mark.parametrize("name", COMMITTED)
def test_what_the_page_says_of_torchs_kernels_and_of_memory(name):
    """Our launches are those of the file, above."""
    table = record.README.read_text().partition("<!-- operators:")[2].partition("<!-- end of operators -->")[0]
    (row,) = (line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
    cells = [cell.strip() for cell in row.split("|")]
    for index, label in enumerate(("torch", "ours")):
        counted = counts.row_of(name, operators()[name], label)
        if label == "torch":
            launched = " / ".join(str(counted[order]) for order in ("forward", "backward", "double backward"))
            assert cells[3].split(" → ")[index] == launched
        assert cells[4].split(" → ")[index] == f"{counted['saved']:.4g}"


def test_the_table_of_operators_takes_what_is_measured(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    from benchmarks import figures

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    cpu, gpu = tmp_path / "cpu", tmp_path / "A-GPU"
    about = {"device": "a device", "torch": "2", "date": "today"}
    kinds = {"forward": 2, "backward": 3, "double backward": 17, "saved": 3.0}
    record.write(cpu, "counts", [{"operator": "swiglu", "provider": label} | kinds for label in ("torch", "ours")], about)
    assert "| 2 / 3 / 17 → 2 / 3 / 17 | 3 → 3 | not measured yet | not measured yet |" in figures.operators_table(cpu, [gpu])
    row = {"operator": "swiglu", "provider": "ours", "mode": "both"}
    record.write(cpu, "gates", [row | {"dtype": "fp32", "n": 1 << 20, "time / torch": 1.5}], about)
    record.write(gpu, "gates", [row | {"dtype": "bf16", "n": 1 << 24, "time / torch": 0.5}], about | {"device": "A GPU"})
    table = figures.operators_table(cpu, [gpu])
    assert "| 3 → 3 | not measured yet / 1.50 | 0.50 / not measured yet |" in table
    assert "A GPU, time ÷ torch's, bf16, 2²⁴ / 2²⁶ elements" in table


def run_ways(tmp_path, *options):
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--rounds", "3", "--threads", "1"]
    return speed.main([*arguments, "--operators", "silu", "--ways", *options])


@not_interpreted
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_ways_are_measured_twice(monkeypatch, tmp_path):
    monkeypatch.setattr(ways, "DTYPES", (torch.float32,))
    monkeypatch.setattr(ways, "SIZES", {"eager": (64, 1000), "compiled": (64, 1000), "exported": (64,)})
    monkeypatch.setattr(ways, "DYNAMIC_SIZE", 1000)
    before = torch.get_num_threads()
    assert run_ways(tmp_path, "eager", "compiled", "exported") == 0
    assert torch.get_num_threads() == before
    results = json.loads((tmp_path / "cpu" / "ways.json").read_text())
    assert results["environment"]["threads"] == "1"
    assert [(row["way"], row["shapes"], row["mode"], row["n"]) for row in results["rows"]] == [
        ("eager", "static", "forward", 64),
        ("eager", "static", "both", 64),
        ("eager", "static", "forward", 1000),
        ("eager", "static", "both", 1000),
        ("compiled", "static", "forward", 64),
        ("compiled", "static", "both", 64),
        ("compiled", "static", "forward", 1000),
        ("compiled", "static", "both", 1000),
        ("compiled", "dynamic", "forward", 1000),
        ("compiled", "dynamic", "both", 1000),
        ("exported", "static", "forward", 64),
    ]
    for row in results["rows"]:
        assert row["ratio"] == pytest.approx(row["ours, microseconds"] / row["torch, microseconds"], abs=1e-3, rel=1e-2)
        assert row["noise"] == pytest.approx(abs(row["again"] - row["ratio"]), abs=2e-3)
        assert row["20 %"] <= row["80 %"]


@pytest.mark.parametrize("function", [wrong_gradient, lambda x: torch.sigmoid(x) * 1.1], ids=["gradient", "value"])
def test_a_wrong_result_is_not_timed_in_its_way(function, monkeypatch, tmp_path, capsys):
    wrong = sigmoid_row(torch=torch.sigmoid, ours=function)
    monkeypatch.setattr(ways, "each_case", lambda: iter([("silu", wrong)]))
    monkeypatch.setattr(ways, "SIZES", {"eager": (64,)})
    assert run_ways(tmp_path, "eager") == 1
    assert "silu by ours, eager, static" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_what_is_not_measured_again_stays_beside_it():
    about = {"device": "CPU", "torch": "2.13", "date": "2026-01-02", "commit": "b"}
    old = [{"operator": name, "way": way, "date": "2026-01-01"} for name in ("sigmoid", "silu") for way in ways.SIZES]
    new = [{"operator": "sigmoid", "way": "compiled"}]
    rows = ways.updated({"environment": about, "rows": old}, new, about)
    assert [(row["operator"], row["way"]) for row in rows] == [(row["operator"], row["way"]) for row in old]
    assert [row["date"][-1] for row in rows] == ["1", "2", "1", "1", "1", "1"]
    of_another = {"environment": about | {"torch": "2.14"}, "rows": old}
    assert ways.updated(of_another, new, about) == ways.updated(None, new, about) == [rows[1]]


@pytest.mark.parametrize("options", [["--device", "cuda"], ["--threads", "0"], ["--repeat", "0"]])
def test_ways_refuse_what_they_cannot_measure(options, capsys):
    with pytest.raises(SystemExit):
        speed.main(["--ways", "eager", "--device", "cpu", *options])
    assert options[1] in capsys.readouterr().err


def test_the_table_of_ways_takes_what_is_measured():
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    from benchmarks import figures

    shown = {"operator": "silu", "shapes": "static", "n": 1 << 20, "dtype": "fp32", "mode": "both", "noise": 0.01}
    rows = [
        shown | {"way": "eager", "threads": 1, "ratio": 2.0},
        shown | {"way": "eager", "threads": 2, "ratio": 3.0, "noise": 0.02},
        shown | {"way": "eager", "threads": 1, "ratio": 9.0, "mode": "forward", "noise": 9.0},
        shown | {"way": "compiled", "threads": 1, "ratio": 1.0},
        shown | {"way": "compiled", "threads": 1, "ratio": 1.25, "shapes": "dynamic"},
        shown | {"way": "exported", "threads": 1, "ratio": 0.5, "mode": "forward"},
    ]
    (line,) = figures.ways_lines({"rows": rows})
    assert (line["eager fp32"], line["compiled fp32"], line["exported fp32"]) == ("2.00 / 3.00", "1.00", "0.50")
    assert line["eager bf16"] == figures.NOT_MEASURED
    assert (line["largest"], line["noise"]) == ("1.25", 0.02)


@not_interpreted
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_graphs_are_counted_as_the_committed_file_says():
    name = "swiglu"
    counted = graphs.row_of(name, dict(graphs.each_case())[name], "ours")
    committed = record.read(record.RESULTS / "cpu", "graphs")["rows"]
    (row,) = (row for row in committed if (row["operator"], row["provider"]) == (name, "ours"))
    assert {key: row.get(key) for key in counted if key != "onnx"} == {key: counted[key] for key in counted if key != "onnx"}


@not_interpreted
@pytest.mark.skipif(stub.unavailable() is not None, reason="needs a stub of a GPU")
def test_a_soak_is_written_where_nothing_grows(tmp_path):
    name = "sigmoid, from the input"
    assert soak.main(["--calls", "150", "--what", name, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "cpu" / "soak.json").read_text())["rows"]
    assert [(row["path"], row["what"], row["calls"]) for row in rows] == [("CPU", name, 150), ("stub of a GPU", name, 150)]
    assert rows[1]["launches at the end"] == rows[1]["launches after 100"] > 0
    for row in rows:
        assert row["objects after 100"] > 1000
        assert row["cached after 100"] > 0


@not_interpreted
def test_a_watched_training_soaks_without_growth(monkeypatch):
    monkeypatch.setattr(soak, "SETTLED", 50)
    (row,) = soak.measure("CPU", 150, ["a training under a GradientWatch"])
    grown = soak.growth(row)
    assert {"objects", "tensors", "blocks", "cached"} <= grown.keys() <= soak.ALLOWED.keys()
    assert all(grown[count] <= soak.ALLOWED[count] for count in grown)


LEAKS = {
    "objects": lambda number: [],
    "tensors": lambda number: torch.zeros(1),
    "blocks": lambda number: tuple(float(number + each) for each in range(20)),
    "cached": functools.cache(lambda number: None),
    "MiB": lambda number: torch.ones(1 << 16),
}


@pytest.mark.parametrize("count", LEAKS)
def test_a_leak_is_noticed(count, monkeypatch, tmp_path, capsys):
    if count == "MiB" and not soak.STATUS.exists():
        pytest.skip("resident memory is known on Linux only")
    left, numbers = [], itertools.count()
    monkeypatch.setattr(soak, "calls", lambda: {"leaks": lambda variant: left.append(LEAKS[count](next(numbers)))})
    monkeypatch.setattr(soak, "measure_on_stub", lambda *arguments: [])
    if count != "objects":
        (row,) = soak.measure("CPU", 200)
        assert soak.growth(row)[count] > soak.ALLOWED[count]
        return
    assert soak.main(["--calls", "200", "--out", str(tmp_path)]) == 1
    assert "FAILED: more than the allowed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_launch_that_stays_is_noticed(monkeypatch):
    if kernels.UNAVAILABLE:
        pytest.skip(kernels.UNAVAILABLE)
    from torch_sigmoid.kernels import kept

    cache, numbers = kept.Cache(), itertools.count()
    monkeypatch.setattr(soak, "calls", lambda: {"leaks": lambda variant: cache.add(next(numbers), print)})
    (row,) = soak.measure("CPU", 150)
    assert soak.growth(row)["launches"] == 50


def test_calls_of_a_soak_have_many_dtypes_dimensions_and_strides(monkeypatch):
    seen = set()
    case = dataclasses.replace(
        OPERATORS["silu"].cases[""], function=lambda x: seen.add((x.dtype, x.dim(), x.stride())) or x * 2
    )
    monkeypatch.setattr(soak, "cases", lambda: [("silu", OPERATORS["silu"], case)])
    soak.soak(soak.operator_calls()["silu"], soak.SETTLED + 1)
    assert {dtype for dtype, _, _ in seen} == {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    assert {dimensions for _, dimensions, _ in seen} == {1, 2, 3}
    assert any(strides[-1] != 1 for _, _, strides in seen)
    assert len(seen) > soak.VARIANTS // 2


@pytest.mark.parametrize(("options", "said"), [(["--calls", "100"], "must exceed 100"), (["--what", "silly"], "silly")])
def test_a_soak_refuses_what_it_cannot_count(options, said, capsys):
    with pytest.raises(SystemExit):
        soak.main(options)
    assert said in capsys.readouterr().err


def test_what_does_not_fit_into_the_time_is_named(tmp_path, capsys):
    assert speed.main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path)]) == 0
    assert "the time was up" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("part", ["gpu", "threshold", "tune", "speed"])
def test_a_part_that_needs_a_gpu_says_so_and_is_no_failure(part, tmp_path, capsys):
    module = importlib.import_module(f"benchmarks.measure.{part}")
    arguments = ["--device", "cuda"] if part == "speed" else []
    assert module.main([*arguments, "--out", str(tmp_path / "results")]) == 0
    assert "there is no GPU" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_the_host_part_without_a_compiler_says_so(monkeypatch, tmp_path, capsys):
    from benchmarks.measure import host, stub

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(stub, "compiler", lambda: None)
    assert host.main(["--out", str(tmp_path)]) == 0
    assert "skipped" in capsys.readouterr().out


@pytest.mark.ways
def test_what_is_saved_is_counted_once(device):
    x = torch.randn(1000, device=device, requires_grad=True)
    assert counts.saved_bytes(torch.sigmoid, x) == 4000
    assert counts.saved_bytes(lambda x: torch_sigmoid.sigmoid(x, save="input"), x) == 4000
    assert counts.saved_bytes(lambda x: torch.sigmoid(x) * x, x) == 8000


def test_memory_is_that_of_every_operator(monkeypatch):
    monkeypatch.setitem(counts.ELEMENTS, "cpu", 1 << 16)
    monkeypatch.setattr(counts, "DTYPES", (torch.bfloat16,))
    saved = {(row["operator"], row["provider"]): row["saved"] for row in counts.measure_memory(CPU)}
    assert {name for name, _ in saved} == operators().keys()
    assert saved["glu", "ours"] == saved["swiglu_packed", "ours"] == saved["swiglu, clamped", "ours"] == 4
    assert (saved["swiglu", "torch"], saved["swiglu", "ours"]) == (6, 4)
    assert saved["sigmoid_gate, broadcast", "ours"] == 2 + 2 / 256


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_exhaustive_comparison_finds_a_wrong_bit(dtype, monkeypatch):
    accuracy = pytest.importorskip("benchmarks.measure.accuracy")
    monkeypatch.setattr(accuracy, "DTYPES", (dtype,))

    def compared(function):
        subject = accuracy.SUBJECTS["sigmoid"]._replace(ours=function)
        monkeypatch.setitem(accuracy.SUBJECTS, "sigmoid", subject)
        return accuracy.exhaustive(CPU)

    rows = compared(torch_sigmoid.sigmoid)
    assert [row["operator"] for row in rows] == ["sigmoid", "silu", "logsigmoid"]
    for row in rows:
        assert row["inputs"] == 65536
        assert 0.49 < row["ulp of ours"] <= 1
    assert rows[0]["bits not torch's"] == 0
    assert all(row["ulp of the gradient"] <= 1 for row in rows[1:])
    row, *_ = compared(lambda x: torch.where(x == 1, 0.75, torch.sigmoid(x)))
    assert (row["bits not torch's"], row["first at"]) == (1, 1.0)
    assert 1 < row["ulp of ours"] < math.inf
    row, *_ = compared(lambda x: torch.where(x == 1, torch.nan, torch.sigmoid(x)))
    assert row["ulp of ours"] == math.inf


def test_the_pages_figures_and_tables_are_those_of_the_committed_files(monkeypatch, tmp_path):
    """`make figures` changes nothing."""
    for needed in ("matplotlib", "rich", "sklearn", "tqdm"):
        pytest.importorskip(needed)
    from benchmarks import figures

    page = record.README.read_text()
    copy = tmp_path / "README.md"
    copy.write_text(page)
    monkeypatch.setattr(record, "README", copy)
    drawn = set()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: drawn.add(path))
    assert figures.main([]) == 0
    assert copy.read_text() == page
    # The page shows every figure and no other, and all are committed.
    shown = {record.RESULTS.parent / path for path in re.findall(r"\]\((results/[^)]*\.png)\)", page)}
    assert shown == drawn
    assert all(path.exists() for path in drawn)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_says_what_it_measures_what_it_writes_and_how_long_it_takes(part, capsys):
    for needed in ("matplotlib", "rich", "sklearn", "tqdm"):
        pytest.importorskip(needed)
    module = importlib.import_module(PARTS[part])
    with pytest.raises(SystemExit) as exit:
        module.main(["--help"])
    assert exit.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m benchmarks")
    summary = module.__doc__.strip().splitlines()[0]
    assert summary in said
    assert len(summary) <= 110, "the list of parts gives it one line"
    assert "Writes " in said
    assert "Takes " in " ".join(said.split())


def test_the_entry_lists_its_parts_and_runs_those_named(capsys, monkeypatch):
    assert entry.main(["--help"]) == 0
    said = capsys.readouterr().out
    for name, module in PARTS.items():
        assert f" {name} " in said
        assert importlib.import_module(module).__doc__.strip().splitlines()[0] in said
    ran = []

    def run(command):
        ran.append(command[2:])
        return subprocess.CompletedProcess(command, int("benchmarks.measure.counts" in command))

    monkeypatch.setattr(entry.subprocess, "run", run)
    assert entry.main(["code", "counts", "--out", "there"]) == 1
    assert ran == [["benchmarks.measure.code", "--out", "there"], ["benchmarks.measure.counts", "--out", "there"]]
    assert "FAILED: counts" in capsys.readouterr().out
    ran.clear()
    entry.main([])
    assert ran == [[PARTS[name], *options] for name, *options in entry.SUITE]
    with pytest.raises(SystemExit):
        entry.main(["sped"])
    assert "got sped" in capsys.readouterr().err


@pytest.fixture
def vanishing(monkeypatch):
    for needed in ("matplotlib", "rich", "sklearn", "tqdm"):
        pytest.importorskip(needed)
    from benchmarks.training import vanishing

    monkeypatch.setattr(vanishing, "DEPTHS", (2, 6))
    monkeypatch.setattr(vanishing, "SAVE_DEPTHS", (1,))
    monkeypatch.setattr(vanishing, "SHOWN_DEPTH", 2)
    return vanishing


@not_interpreted
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


@not_interpreted
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


@not_interpreted
@pytest.mark.parametrize(("watch", "code"), [(torch_sigmoid.diagnostics.GradientWatch, 0), (Meddling, 1)])
def test_the_price_of_a_watch_is_measured_only_where_it_changes_nothing(watch, code, monkeypatch, tmp_path, capsys):
    from benchmarks.measure import watch as part

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


class SeeingAll(torch.overrides.TorchFunctionMode):
    """A context that changes results."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result + 1 if func is torch.nn.functional.relu else result


@not_interpreted
@pytest.mark.parametrize(("context", "code"), [(torch_sigmoid.intercept, 0), (SeeingAll, 1)])
def test_the_price_of_intercept_is_measured_only_where_it_changes_nothing(context, code, monkeypatch, tmp_path, capsys):
    from benchmarks.measure import intercept as part

    monkeypatch.setitem(part.CONTEXTS, "intercept", context)
    monkeypatch.setattr(part, "ROUNDS", 3)
    assert part.main(["--out", str(tmp_path)]) == code
    if code:
        assert "the output with intercept is another" in capsys.readouterr().out
        assert not list(tmp_path.iterdir())
    else:
        rows = json.loads((tmp_path / "cpu" / "intercept.json").read_text())["rows"]
        assert len(rows) == 4
        assert rows[0]["time / forward"] == 1


def test_importing_the_package_takes_hardly_longer_than_torch_alone():
    """And no Triton: `imported` raises if there is any. The committed measurement is held to 0.06; here other work runs."""
    of_torch, added = zip(*(imports.imported() for _ in range(3)))
    assert min(added) < 0.15 * min(of_torch)
    committed = json.loads((record.RESULTS / "cpu" / "imports.json").read_text())["rows"]
    assert committed[-1]["time / torch"] <= 0.06
