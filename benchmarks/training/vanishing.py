"""Where gradients vanish: networks of growing depth on images of digits, under a GradientWatch.

1. 2 to 20 hidden layers with sigmoid, SiLU and ReLU, in fp32 from PyTorch's initialisation and from Xavier's, and under bf16
   autocast: the accuracy reached, and the gradient's norm at each layer, in the first step and through training.
2. One sigmoid layer and four with save="output" and save="input", in fp32 and bf16, from PyTorch's initialisation, Xavier's,
   and saturated (every bias at +8): the same, and the fraction of gradients lost to rounding in the first step.

Writes vanishing.csv and .json and two figures. Exits with 1 if a number is not finite, or if save="input" loses a gradient to
rounding. Takes a few minutes on a CPU.
"""

import contextlib
import itertools
import math
import sys

import torch
from torch import nn

import torch_sigmoid
from torch_sigmoid.diagnostics import GradientWatch

from ..measure import record
from .tasks import BATCH_SIZE, load_tasks

DEPTHS = (2, 3, 4, 6, 8, 10, 14, 20)
SAVE_DEPTHS = (1, 4)
WIDTH = 64
LEARNING_RATE = 1e-3
# The accuracy from which a network counts as learning; with ten digits, chance gives 0.1.
LEARNS = 0.5
SATURATING_BIAS = 8.0
INITIALISATIONS = ("default", "Xavier", "saturated")
EVERY = 10
# The depth whose gradient norms through training are drawn.
SHOWN_DEPTH = 8
ACTIVATIONS = {
    "sigmoid": torch_sigmoid.Sigmoid,
    'sigmoid, save="input"': lambda: torch_sigmoid.Sigmoid(save="input"),
    "SiLU": nn.SiLU,
    "ReLU": nn.ReLU,
}


def build(task, activation, depth, initialisation, seed):
    """A network with `depth` hidden layers."""
    torch.manual_seed(seed)
    widths = [task.train_inputs.shape[1]] + [WIDTH] * depth
    layers = []
    for inside, outside in itertools.pairwise(widths):
        layers += [nn.Linear(inside, outside), ACTIVATIONS[activation]()]
    network = nn.Sequential(*layers, nn.Linear(WIDTH, task.classes)).to(task.train_inputs.device)
    for linear in layers[::2]:
        if initialisation == "Xavier":
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        elif initialisation == "saturated":
            nn.init.constant_(linear.bias, SATURATING_BIAS)
    return network


def run(task, epochs, seed, activation, depth, precision, initialisation) -> tuple[dict, dict]:
    """Train once: the row of the table, and what the watch saw."""
    network = build(task, activation, depth, initialisation, seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    shuffle = torch.Generator().manual_seed(seed)
    device = task.train_inputs.device
    context = torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    activations = tuple({type(module) for module in network[1::2]})
    with GradientWatch(network, every=EVERY, modules=activations) as watch:
        for _ in range(epochs):
            for batch in torch.randperm(len(task.train_inputs), generator=shuffle).split(BATCH_SIZE):
                batch = batch.to(device)
                with context:
                    logits = network(task.train_inputs[batch])
                loss = nn.functional.cross_entropy(logits.float(), task.train_targets[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    with torch.no_grad(), context:
        correct = network(task.test_inputs).argmax(1) == task.test_targets
    seen = watch.to_dict()
    layers = list(seen["layers"].values())
    row = {
        "activation": activation,
        "depth": depth,
        "precision": precision,
        "initialisation": initialisation,
        "accuracy": correct.double().mean().item(),
        "last loss": loss.item(),
        "first step: gradient entering the last layer": layers[-1]["entering"][0],
        "first step: gradient leaving the first layer": layers[0]["leaving"][0],
        "first step: saturated": max(layer["saturated"][0] for layer in layers),
        "first step: lost to rounding": max(layer["lost_to_rounding"][0] for layer in layers),
    }
    return row, seen


def experiments(depths):
    """Each training's activation, depth, precision and initialisation."""
    for activation, depth in itertools.product(("sigmoid", "SiLU", "ReLU"), depths):
        yield activation, depth, "fp32", "default"
        yield activation, depth, "fp32", "Xavier"
        yield activation, depth, "bf16", "default"
    for depth, initialisation, precision in itertools.product(SAVE_DEPTHS, INITIALISATIONS, ("fp32", "bf16")):
        yield "sigmoid", depth, precision, initialisation
        yield 'sigmoid, save="input"', depth, precision, initialisation


def accuracies(rows, *setting):
    """The accuracy at each of DEPTHS; `setting` is an activation, a precision and an initialisation."""
    own = {row["depth"]: row for row in rows if (row["activation"], row["precision"], row["initialisation"]) == setting}
    return {depth: own[depth]["accuracy"] for depth in DEPTHS if depth in own}


def deepest(rows, *setting):
    """The depth up to which a setting learns, and the next one, at which it does not; None if there is no such depth."""
    reached = accuracies(rows, *setting)
    stops = next((depth for depth, accuracy in reached.items() if accuracy < LEARNS), None)
    learnt = [depth for depth in reached if stops is None or depth < stops]
    return max(learnt, default=None), stops


def summary(rows):
    """For each activation, the depth up to which it learns."""
    lines = []
    for activation, (precision, initialisation) in itertools.product(
        ("sigmoid", "SiLU", "ReLU"), (("fp32", "default"), ("fp32", "Xavier"), ("bf16", "default"))
    ):
        learnt, stops = deepest(rows, activation, precision, initialisation)
        lines.append(
            {
                "activation": activation,
                "precision": precision,
                "initialisation": initialisation,
                "learns up to depth": learnt or "none",
                "stops at depth": stops or "none of these",
            }
        )
    return lines


def saves(rows):
    """The rows of the second experiment, ordered so that those to compare stand next to each other."""
    own = [row for row in rows if row["depth"] in SAVE_DEPTHS and row["activation"].startswith("sigmoid")]
    return sorted(own, key=lambda row: (row["depth"], INITIALISATIONS.index(row["initialisation"]), row["precision"] == "bf16"))


def draw_all(results, folder):
    """The figures of vanishing.json."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    rows, norms = results["rows"], results["norms"]
    about = f"{results['environment']['device']}, torch {results['environment']['torch']}"
    activations, settings = ("sigmoid", "SiLU", "ReLU"), (("fp32", "default"), ("fp32", "Xavier"), ("bf16", "default"))
    colours = dict(zip(activations, ("C3", "C0", "C2")))
    styles = dict(zip(settings, ("-", "--", ":")))

    figure, (accuracy, first) = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
    for activation, setting in itertools.product(activations, settings):
        reached = accuracies(rows, activation, *setting)
        label = f"{activation}, {', '.join(setting)}"
        look = {"color": colours[activation], "linestyle": styles[setting], "label": label}
        accuracy.plot(reached.keys(), reached.values(), marker=".", **look)
        deep = next(each for each in norms if each["activation"] == activation and each["setting"] == list(setting))
        values = np.array(deep["first step"], dtype=float)
        first.semilogy(range(1, len(values) + 1), np.where(values > 0, values, np.nan), **look)
    accuracy.axhline(LEARNS, color="grey", linewidth=0.8)
    accuracy.set(xlabel="hidden layers", ylabel="held-out accuracy", title=f"after {results['epochs']} epochs of digits")
    first.set(xlabel="layer", ylabel="norm of the gradient entering it", title=f"first step, {max(DEPTHS)} hidden layers")
    for panel in (accuracy, first):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.suptitle(about)
    record.save_figure(figure, folder / "vanishing.png")

    figure, panels = plt.subplots(1, len(activations), figsize=(12, 3.6), layout="constrained", sharey=True)
    for panel, each in zip(panels, results["through training"]):
        values = np.ma.masked_less_equal(np.array(each["entering"], dtype=float), 0)
        edges = np.append(each["steps"], each["steps"][-1] + EVERY)
        image = panel.pcolormesh(edges, np.arange(len(values) + 1) + 0.5, values, norm=LogNorm(1e-8, 1, clip=True))
        panel.set(title=each["activation"], xlabel="step")
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="norm of the gradient entering it")
    figure.suptitle(f"{SHOWN_DEPTH} hidden layers, fp32, PyTorch's initialisation; {about}")
    record.save_figure(figure, folder / "vanishing_training.png")


def parse(argv):
    parser = record.parser("vanishing", __doc__)
    parser.add_argument("--epochs", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {arguments.epochs}")
    return arguments


def main(argv=None) -> int:
    arguments = parse(argv)
    device = arguments.device
    if device.type == "cpu":
        # Layers this narrow wait longer for a second thread than they gain by it.
        torch.set_num_threads(1)
    (task,) = (task for task in load_tasks(device, torch.float32, arguments.seed) if task.name == "digits")
    rows, norms, through_training = [], [], []
    for setting in record.progress(dict.fromkeys(experiments(DEPTHS)), "training"):
        row, seen = run(task, arguments.epochs, arguments.seed, *setting)
        rows.append(row)
        activation, depth, precision, initialisation = setting
        entering = [layer["entering"] for layer in seen["layers"].values()]
        if depth == max(DEPTHS):
            first_step = [norm[0] for norm in entering]
            norms.append({"activation": activation, "setting": [precision, initialisation], "first step": first_step})
        if (depth, precision, initialisation) == (SHOWN_DEPTH, "fp32", "default"):
            steps = [first for first, _ in seen["steps"]]
            through_training.append({"activation": activation, "steps": steps, "entering": entering})
    about = record.environment(device)
    folder = record.folder_of(device, arguments.out)
    more = {"epochs": arguments.epochs, "norms": norms, "through training": through_training}
    record.write(folder, "vanishing", rows, about, **more)
    draw_all({"environment": about, "rows": rows, **more}, folder)
    record.show("Every training", rows)
    record.show(f"Up to which depth each activation learns (held-out accuracy of at least {LEARNS})", summary(rows))
    failures = []
    for row in rows:
        if not all(math.isfinite(value) for value in row.values() if isinstance(value, float)):
            failures.append(f"not finite: {row}")
        if row["activation"] == 'sigmoid, save="input"' and row["first step: lost to rounding"] > 0:
            failures.append(f"lost to rounding: {row}")
    for failure in failures:
        print(f"FAILED {failure}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
