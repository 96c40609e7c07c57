"""Gradient descent moves the decision boundary of one sigmoid unit, and of a network with a hidden layer.

This is what σ' is for. With the squared error L = mean (σ(z) - t)², a unit z = w·x + b descends along

    ∂L/∂w = mean 2·(σ(z) - t)·σ'(z)·x

and by the chain rule a weight of the hidden layer has one more factor σ', that of its own unit. Both train with plain gradient
descent on two features of scikit-learn's 569 breast-cancer records, standardised, all of them in every step. No record is held
out: the figure shows descent, not how well the boundary generalises.

Writes boundary.json (losses, accuracies and parameters) and boundary.png; fails if a loss does not fall. `make train` includes
it. Takes a few seconds.
"""

import json
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

import torch_sigmoid

from ..measure import record

FEATURES = ("mean texture", "mean concave points")
HIDDEN = 8
STEPS = 1000
LEARNING_RATE = 2.0
CLASSES = ("malignant", "benign")
MODELS = {
    "one sigmoid unit": lambda: nn.Sequential(nn.Linear(2, 1), torch_sigmoid.Sigmoid(), nn.Flatten(0)),
    f"a hidden layer of {HIDDEN} sigmoid units": lambda: nn.Sequential(
        nn.Linear(2, HIDDEN), torch_sigmoid.Sigmoid(), nn.Linear(HIDDEN, 1), torch_sigmoid.Sigmoid(), nn.Flatten(0)
    ),
}


def load_records(device: torch.device) -> tuple[Tensor, Tensor]:
    """The two features, each with mean 0 and deviation 1, and the classes: 0 malignant, 1 benign."""
    data = load_breast_cancer()
    columns = [list(data.feature_names).index(name) for name in FEATURES]
    x = torch.tensor(data.data[:, columns])
    x = (x - x.mean(0)) / x.std(0)
    return x.float().to(device), torch.tensor(data.target, dtype=torch.float32, device=device)


def descend(make_model, device: torch.device, steps: int, seed: int, label: str) -> dict:
    """The loss before each step and after the last, and what each panel shows."""
    x, target = load_records(device)
    torch.manual_seed(seed)
    model = make_model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    # Early, because most of the way is covered in the first steps.
    panel_at = {0: "start", max(1, steps // 125): "on the way", steps: "end"}
    losses, panels = [], {}
    for step in record.progress(range(steps + 1), label):
        sigma = model(x)
        loss = nn.functional.mse_loss(sigma, target)
        losses.append(loss.item())
        if step in panel_at:
            accuracy = ((sigma > 0.5) == target.bool()).double().mean().item()
            parameters = {name: parameter.tolist() for name, parameter in model.state_dict().items()}
            panels[panel_at[step]] = {"step": step, "loss": loss.item(), "accuracy": accuracy, "parameters": parameters}
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {"losses": losses, "panels": panels}


def run(device: torch.device, seed: int, steps: int = STEPS) -> dict:
    """What boundary.json holds."""
    models = {name: descend(make_model, device, steps, seed, name) for name, make_model in MODELS.items()}
    about = record.environment(device)
    return {"environment": about, "features": FEATURES, "learning_rate": LEARNING_RATE, "seed": seed, "models": models}


def failures(results: dict) -> list[str]:
    return [
        f"{name}: the loss does not fall, it goes from {own['losses'][0]:.3g} to {own['losses'][-1]:.3g}"
        for name, own in results["models"].items()
        if not own["losses"][-1] < own["losses"][0]
    ]


def rows(results: dict) -> list[dict]:
    """For a table: loss and accuracy at the steps that the panels show."""
    return [
        {"model": name, "panel": panel, **{key: seen[key] for key in ("step", "loss", "accuracy")}}
        for name, own in results["models"].items()
        for panel, seen in own["panels"].items()
    ]


def draw(results: dict, folder: Path) -> None:
    """A row for each model: σ over the plane and its boundary σ = ½ at the start, on the way and at the end, then the loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x, target = load_records(torch.device("cpu"))
    axes = [torch.linspace(column.min().item() - 0.3, column.max().item() + 0.3, 200) for column in x.T]
    grid = torch.cartesian_prod(*axes)
    figure, all_panels = plt.subplots(len(MODELS), 4, figsize=(15, 7.2), layout="constrained")
    for (name, own), panels in zip(results["models"].items(), all_panels):
        for panel, (title, seen) in zip(panels, own["panels"].items()):
            model = MODELS[name]()
            model.load_state_dict({key: torch.tensor(value) for key, value in seen["parameters"].items()})
            with torch.no_grad():
                sigma = model(grid).view(len(axes[0]), len(axes[1])).T
            shades = panel.contourf(*axes, sigma, levels=torch.linspace(0, 1, 21).tolist(), cmap="RdBu", alpha=0.5)
            panel.contour(*axes, sigma, levels=[0.5], colors="black")
            for label, (colour, marker) in enumerate((("C3", "x"), ("C0", "."))):
                own_points = x[target == label].T
                panel.scatter(*own_points, s=14, color=colour, marker=marker, linewidths=0.8, label=CLASSES[label])
            panel.set(
                title=f"{title}: step {seen['step']}\nloss {seen['loss']:.3f}, accuracy {seen['accuracy']:.3f}",
                xlabel=results["features"][0],
                ylabel=results["features"][1] if title == "start" else None,
            )
        panels[0].annotate(name, (-0.28, 0.5), xycoords="axes fraction", rotation=90, va="center", fontsize="large")
        # The axis is logarithmic, and the first step is 0.
        panels[-1].plot(range(1, len(own["losses"]) + 1), own["losses"], color="black")
        shown = own["panels"].values()
        panels[-1].plot([seen["step"] + 1 for seen in shown], [seen["loss"] for seen in shown], "o", color="C1")
        panels[-1].set(xscale="log", ylim=(0, None), xlabel="step + 1", title="loss: mean (σ - t)²")
    all_panels[0][0].legend(loc="upper right", fontsize="small")
    figure.colorbar(shades, ax=all_panels[:, -2].tolist(), label="σ", shrink=0.6, ticks=[0, 0.5, 1])
    record.save_figure(figure, folder / "boundary.png")


def save(results: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "boundary.json").write_text(json.dumps(results, indent=1) + "\n")


def main(argv=None) -> int:
    parser = record.parser("boundary", __doc__, out=Path("runs/train"))
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.device.type == "cpu":
        # A model this small waits longer for a second thread than it gains by it.
        torch.set_num_threads(1)
    results = run(arguments.device, arguments.seed, arguments.steps)
    save(results, arguments.out)
    draw(results, arguments.out)
    record.show("Gradient descent on a squared error", rows(results))
    for failure in failures(results):
        print(f"FAILED: {failure}")
    return int(bool(failures(results)))


if __name__ == "__main__":
    sys.exit(main())
