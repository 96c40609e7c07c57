"""Train on real data with sigmoid layers, gates and losses: torch's and ours, from the same seed.

1. Breast-cancer records (569 × 30, two classes) and images of digits (1797 × 8·8, ten classes), both from scikit-learn, by
   networks with two sigmoid layers: held-out accuracy, and the largest difference of the two loss curves. In fp32 and fp64 with
   save="output" it must be 0.
2. The same networks under bf16 autocast, every sigmoid unit started at a bias of +8: σ rounds to 1 there, and torch's gradient,
   computed from that 1, is 0.
3. A transformer with SwiGLU and gated attention, and convolutions with squeeze-and-excitation, on the digits: with the gates
   written in torch operators and with ours (training/networks.py).
4. A rare digit among the others: binary cross-entropy and focal loss, in torch operators and ours (training/imbalanced.py).
5. SigLIP on paired views of digits: the plain formula, ours, and ours in two processes (training/retrieval.py).
6. Gradient descent moving a decision boundary (training/boundary.py).

Under torchrun, `--engine ddp`, fsdp2, tp or fsdp2-tp trains on PyTorch's engines instead; `--engine ddp --help` says what.

Writes train.json, boundary.json and figures. Exits with 1 if an accuracy is below 0.95 (0.6 of the pairs found), if a promised
identity does not hold, if our gates cost 0.5 % of accuracy, or if a curve of our losses is not that of torch operators. Takes
a minute or two on a CPU.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import torch
from torch import nn

import torch_sigmoid

from .measure import record
from .training import boundary, imbalanced, networks, retrieval
from .training.tasks import largest_difference, load_tasks, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REQUIRED_ACCURACY = 0.95
# Two samples in 450, because gates that round differently lead to slightly different networks.
GATED_ACCURACY_DIFFERENCE = 0.005
GATED_EPOCHS = 30
SATURATING_BIAS = 8.0
# With --interpret: steps of each epoch, and of the descent.
INTERPRETED_STEPS = 2
# The exponentials of a CPU and of Triton's interpreter differ by an ulp or two in each call.
INTERPRETED_TOLERANCE = 1e-5
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def sigmoid_network(task, make_sigmoid, bias=None):
    """Two sigmoid layers of 64 units; `bias` starts every unit there, in place of PyTorch's default."""
    width = task.train_inputs.shape[1]
    network = nn.Sequential(
        nn.Linear(width, 64), make_sigmoid(), nn.Linear(64, 64), make_sigmoid(), nn.Linear(64, task.classes)
    )
    if bias is not None:
        for layer in (network[0], network[2]):
            nn.init.constant_(layer.bias, bias)
    return network


def compare(task, made, epochs, seed, label, **options):
    """Train the network that each function of `made` makes, from the same seed; their runs by name."""
    runs = {}
    for name, make in made.items():
        torch.manual_seed(seed)
        runs[name] = train(task, make().to(task.train_inputs), epochs, seed, f"{label}, {name}", **options)
    return runs


def compare_layers(task, arguments, steps):
    """torch.nn.Sigmoid against ours in one dtype."""
    layers = {"torch.nn.Sigmoid": nn.Sigmoid, "torch_sigmoid.Sigmoid": lambda: torch_sigmoid.Sigmoid(save=arguments.save)}
    made = {name: functools.partial(sigmoid_network, task, layer) for name, layer in layers.items()}
    return compare(task, made, arguments.epochs, arguments.seed, task.name, steps=steps)


def compare_saturated(task, arguments):
    """Under bf16 autocast, every sigmoid unit started at σ(8).

    Without weight decay, which would pull the bias out of saturation whatever the gradient is.
    """
    layers = {
        "torch.nn.Sigmoid": nn.Sigmoid,
        'Sigmoid(save="output")': torch_sigmoid.Sigmoid,
        'Sigmoid(save="input")': lambda: torch_sigmoid.Sigmoid(save="input"),
    }
    made = {name: functools.partial(sigmoid_network, task, layer, SATURATING_BIAS) for name, layer in layers.items()}
    label = f"{task.name} in bf16 from σ({SATURATING_BIAS:g})"
    return compare(task, made, arguments.epochs, arguments.seed, label, weight_decay=0, autocast=True)


def compare_gated(task, arguments, steps):
    """Torch's gates against ours, in each network."""
    gates = {"torch operators": networks.TORCH, "torch_sigmoid": networks.OURS}
    epochs = min(arguments.epochs, GATED_EPOCHS)
    return {
        network: compare(
            task,
            {name: functools.partial(make, own, task.classes) for name, own in gates.items()},
            epochs,
            arguments.seed,
            network,
            steps=steps,
        )
        for network, make in networks.NETWORKS.items()
    }


def draw(runs, epochs, title, path):
    """Mean loss of each epoch, in a panel for each data set; the second curve is dashed, so that both show if they are equal.

    `runs` comes from train.json: for each data set and layer the losses and the accuracy.
    """
    figure, panels = plt.subplots(1, len(runs), figsize=(10, 4.8), constrained_layout=True)
    styles = ("-", "--", "-.")
    for panel, (task, by_layer) in zip(panels, runs.items()):
        for (name, run), style in zip(by_layer.items(), styles):
            by_epoch = torch.tensor(run["losses"]).view(epochs, -1).mean(1)
            panel.plot(by_epoch.tolist(), style, label=f"{name} (accuracy {run['accuracy']:.3f})")
        panel.set(title=task, xlabel="epoch", ylabel="mean training loss", yscale="log")
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"drew {path}")


def draw_all(results, folder):
    """The figures of train.json."""
    titles = {
        "plain": (f"{results['dtype']}: the same seed with either layer", "loss.png"),
        "saturated": (f"bf16 autocast, sigmoid layers started at σ({SATURATING_BIAS:g})", "loss_saturated.png"),
    }
    for kind, (title, name) in titles.items():
        if results["runs"][kind]:
            draw(results["runs"][kind], int(results["epochs"]), title, folder / name)


def parse(argv):
    parser = record.parser("train", __doc__, out=Path("runs/train"))
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of 1 and 3 (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--save", choices=["output", "input"], default="output", help="of ours in 1 (default: %(default)s)")
    parser.add_argument("--interpret", action="store_true", help="a few steps through the Triton kernels, on the CPU")
    arguments = parser.parse_args(argv)
    if arguments.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {arguments.epochs}")
    if arguments.interpret and arguments.device.type != "cpu":
        parser.error(f"--interpret runs on the CPU, got --device {arguments.device}")
    return arguments


def asks_for_engine(argv) -> bool:
    return any(word.partition("=")[0] == "--engine" for word in argv)


def show(title, compared, caption=None) -> None:
    """A row for each run; the difference is that of its losses from the losses of the first run beside it."""
    rows = []
    for group, runs in compared.items():
        first, *_ = runs.values()
        for name, run in runs.items():
            row = {"data or network": group, "layer or gates": name, "held-out accuracy": run.accuracy}
            row |= {"last loss": run.losses[-1], "first gradient's norm": run.first_gradient}
            rows.append(row | {"largest loss difference": None if run is first else largest_difference(first, run)})
    record.show(title, rows, caption=caption)


def failures_of(compared, interpret) -> list[str]:
    """Accuracies that are too low; if the kernels were interpreted, losses that are not torch's."""
    found = []
    for group, runs in compared.items():
        if interpret:
            difference = largest_difference(*runs.values())
            if not difference <= INTERPRETED_TOLERANCE:
                found.append(f"{group}: the interpreted kernels differ by {difference:.3g} from torch")
            continue
        for name, run in runs.items():
            if run.accuracy < REQUIRED_ACCURACY:
                found.append(f"{group} with {name}: accuracy {run.accuracy:.4f} is below {REQUIRED_ACCURACY}")
    return found


def main(argv=None) -> int:
    if asks_for_engine(sys.argv[1:] if argv is None else argv):
        from .training import engines  # needs torch.distributed

        return engines.main(argv)
    arguments = parse(argv)
    if arguments.interpret:
        if not torch_sigmoid.kernels.INTERPRETED:
            # Triton decides when the kernels are imported, which has happened.
            command = [sys.executable, "-m", "benchmarks.train", *(sys.argv[1:] if argv is None else argv)]
            return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
        arguments.epochs = 1
        # A build of torch for NVIDIA leaves small tensors to torch's operator.
        torch_sigmoid.torch_below(0)
    if arguments.device.type == "cpu":
        # Layers this narrow wait longer for a second thread than they gain by it.
        torch.set_num_threads(1)
    device, dtype, interpret = arguments.device, DTYPES[arguments.dtype], arguments.interpret
    chosen = torch_sigmoid.path(torch.empty(1, device=device, dtype=dtype))
    print(f"{device}, {arguments.dtype}, save={arguments.save!r}, path {chosen.name}: {chosen.reason}")

    steps = INTERPRETED_STEPS if interpret else None
    tasks = {task.name: task for task in load_tasks(device, dtype, arguments.seed)}
    plain = {name: compare_layers(task, arguments, steps) for name, task in tasks.items()}
    saturated = {}
    if not interpret:
        in_fp32 = load_tasks(device, torch.float32, arguments.seed)
        saturated = {task.name: compare_saturated(task, arguments) for task in in_fp32}
    gated = compare_gated(tasks["digits"], arguments, steps)
    seeds = 1 if interpret else imbalanced.SEEDS
    rare = imbalanced.compare(device, arguments.epochs, arguments.seed, seeds, steps)
    paired = retrieval.compare(device, arguments.epochs, arguments.seed, steps)
    moved = boundary.run(device, arguments.seed, steps or boundary.STEPS)

    promised = arguments.dtype != "bfloat16" and arguments.save == "output" and not interpret
    show(f"{arguments.dtype}, the same seed with either layer", plain, "the loss difference must be 0" if promised else None)
    if saturated:
        show(f"bf16 autocast, every sigmoid unit started at a bias of +{SATURATING_BIAS:g}", saturated)
    show(f"{arguments.dtype}, digits, gates in torch operators and ours", gated)
    imbalanced.show(rare)
    retrieval.show(paired)
    record.show("Gradient descent on a squared error, two features of the breast-cancer records", boundary.rows(moved))

    differences = {name: largest_difference(*runs.values()) for name, runs in plain.items()}
    failures = failures_of(plain, interpret) + failures_of(gated, interpret)
    for name, difference in differences.items():
        if promised and difference != 0:
            failures.append(f"{name}: the loss curves should be identical bit for bit, they differ by {difference:.3g}")
    for name, (theirs, ours) in ((name, runs.values()) for name, runs in gated.items()):
        if theirs.accuracy - ours.accuracy > GATED_ACCURACY_DIFFERENCE and not interpret:
            failures.append(f"{name}: our gates cost {theirs.accuracy - ours.accuracy:.4f} of accuracy")
    failures += imbalanced.failures(rare) + retrieval.failures(paired, trained=not interpret) + boundary.failures(moved)

    def written(compared):
        return {group: {name: run._asdict() for name, run in runs.items()} for group, runs in compared.items()}

    results = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "path": chosen.name,
        **{key: str(value) for key, value in vars(arguments).items() if key != "out"},
        "largest_loss_difference": differences,
        "runs": {"plain": written(plain), "saturated": written(saturated)},
        "gated": written(gated),
        "imbalanced": imbalanced.summary(rare, arguments.epochs),
        "retrieval": {name: run and run._asdict() for name, run in paired.items()},
    }
    boundary.save(moved, arguments.out)
    (arguments.out / "train.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {arguments.out / 'train.json'} and boundary.json")
    if not interpret:
        draw_all(results, arguments.out)
        boundary.draw(moved, arguments.out)
    for failure in failures:
        print(f"FAILED: {failure}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
