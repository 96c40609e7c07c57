"""Which layers are in trouble, and what helps, from the numbers of a report.

A layer is blamed for what it does itself: not for a gradient that had vanished before it entered, nor for one that the loss
never sent. Where a gradient vanishes between two watched layers, that place is named instead.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

# Above these fractions of a layer's inputs, saturation and loss to rounding are worth a word.
MANY_SATURATED = 0.5
MANY_LOST = 0.01
# A gradient has vanished where its norm is below this fraction of the largest in the network.
VANISHED = 1e-4


class Trouble(NamedTuple):
    """A heading, the layers (or places) it is about, and lines of words: what happened, and what helps."""

    heading: str
    places: list[str]
    words: list[str]


NOT_FINITE = (
    "infinite or NaN gradients, which the norms leave out: under a GradScaler a few overflowing steps are normal; otherwise "
    "lower the learning rate, clip gradients, or train in bf16 in place of fp16"
)
NO_GRADIENT = (
    "it was 0 already when it entered the layers: look at the loss, and at what lies between the last layer and the loss"
)
SATURATED = (
    "inputs too large: smaller biases, a smaller or Xavier (Glorot) initialisation, normalisation before the layer, a lower "
    "learning rate"
)
SATURATION_FIRST = (
    'first mend the saturation of {names} (above): what save="input" keeps of a saturated layer\'s gradients is tiny'
)
LOST = (
    'rounding, not mathematics: torch_sigmoid.Sigmoid(save="input"), or torch_sigmoid.replace(model, save="input"), keeps '
    "these gradients, and those of SiLU and GLU"
)
LOST_BY_TANH = (
    "rounding, not mathematics: tanh has rounded to ±1; tanh(x) is 2·sigmoid(2x) - 1, whose gradient "
    'torch_sigmoid.sigmoid(2 * x, save="input") keeps; or normalisation before the layer'
)
DEAD = "units that no sample moves: look at their biases and initialisation; normalisation brings them back"
NOT_ROUNDING = (
    "mathematics, not rounding{except_lost}: many derivatives below 1 multiply (a sigmoid's is 1/4 at most), and "
    'save="input" cannot help, since it returns these derivatives as they are'
)
AGAINST_VANISHING = (
    "SiLU or ReLU with Xavier (Glorot) initialisation (together they trained 20 layers, where either alone did not), residual "
    "connections, fewer sigmoids; the layers before these receive what is left, and are not to blame"
)
BETWEEN = (
    "what lies between these layers multiplies the gradient by too little: look there for Linears or convolutions with small "
    "weights (Xavier (Glorot) initialisation in place of PyTorch's), for a factor near 0, and for activations called directly, "
    "which a watch cannot see"
)


def troubles(layers: list[dict[str, Any]]) -> list[Trouble]:
    """What is wrong, in the order in which to mend it.

    Args:
        layers: in the model's order; of each, its "name", its "kind", whether it "has_operand" beside its gate, and the
            statistics of `GradientWatch.to_dict` as numbers.
    """

    def named(condition: Callable[[dict[str, Any]], object]) -> list[str]:
        return [layer["name"] for layer in layers if condition(layer)]

    def is_lost(layer: dict[str, Any]) -> bool:
        return float(layer["lost_to_rounding"] or 0) > MANY_LOST

    not_finite = named(lambda layer: layer["not_finite"] or math.isnan(layer["mean_derivative"] or 0))
    # A ReLU is meant to be off for half of its inputs.
    saturated = named(lambda layer: (layer["saturated"] or 0) > MANY_SATURATED and layer["kind"] != "relu")
    lost = named(lambda layer: is_lost(layer) and layer["kind"] != "tanh")
    lost_by_tanh = named(lambda layer: is_lost(layer) and layer["kind"] == "tanh")

    def with_saturation_first(names: list[str], words: str) -> list[str]:
        too = [name for name in names if name in saturated]
        return [SATURATION_FIRST.format(names=", ".join(too)), words] if too else [words]

    found = [
        Trouble("NOT FINITE", not_finite, [NOT_FINITE]),
        Trouble("SATURATED", saturated, [SATURATED]),
        Trouble("LOST TO ROUNDING", lost, with_saturation_first(lost, LOST)),
        Trouble("LOST BY TANH", lost_by_tanh, with_saturation_first(lost_by_tanh, LOST_BY_TANH)),
        Trouble("DEAD", named(lambda layer: layer["dead_units"]), [DEAD]),
        *_vanished([layer for layer in layers if layer["entering"] is not None], lost + lost_by_tanh),
    ]
    return [trouble for trouble in found if trouble.places]


def _vanished(layers: list[dict[str, Any]], lost: list[str]) -> list[Trouble]:
    """Find where the gradient falls below VANISHED of its largest norm, and what multiplied it so; all `layers` have one."""
    largest = max((layer["entering"] for layer in layers if math.isfinite(layer["entering"])), default=0.0)
    if largest == 0:
        unsent = [layer["name"] for layer in layers if not layer["not_finite"]]
        return [Trouble("NO GRADIENT", unsent, [NO_GRADIENT])]
    limit = VANISHED * largest
    # The gradient goes on by a gate's operand, too: a small one of the gate alone is no sign that it has vanished.
    layers = [layer for layer in layers if not layer["has_operand"]]
    inside = Trouble("VANISHED", [], [])
    between = Trouble("VANISHED BETWEEN WATCHED LAYERS", [], [])
    # Follow the gradient backward; `start` is the layer that it entered with most since it was last below the limit.
    start = None
    for index in reversed(range(len(layers))):
        layer = layers[index]
        if layer["entering"] <= limit or layer["leaving"] is None:
            start = None
            continue
        if start is None or layer["entering"] > layers[start]["entering"]:
            start = index
        if layer["leaving"] <= limit:
            way = _Way.of(layers[index : start + 1], layers[index : start + 1])
        elif index and layers[index - 1]["entering"] <= limit:
            way = _Way.of(layers[index : start + 1], layers[index - 1 : start + 1])
        else:
            continue
        start = None
        blamed = between if math.prod(way.between.values()) < math.prod(way.watched.values()) else inside
        # In the model's order, as the table.
        blamed.places[:0] = _culprits(way.between if blamed is between else way.watched)
        blamed.words[:0] = way.lines
    except_lost = " (apart from what is LOST, above)" if set(inside.places) & set(lost) else ""
    inside.words.extend((NOT_ROUNDING.format(except_lost=except_lost), AGAINST_VANISHING))
    between.words.append(BETWEEN)
    return [inside, between]


class _Way(NamedTuple):
    """The way of a gradient until it vanished: the factors of watched layers, those of what lies between two, and words."""

    watched: dict[str, float]
    between: dict[str, float]
    lines: list[str]

    @classmethod
    def of(cls, left: list[dict[str, Any]], entered: list[dict[str, Any]]) -> "_Way":
        """For the layers that the gradient has left and those that it has entered, both in the model's order."""
        watched = {layer["name"]: layer["attenuation"] for layer in left}
        between = {
            f"{before['name']} and {layer['name']}": before["entering"] / layer["leaving"]
            for before, layer in itertools.pairwise(entered)
        }
        lines = []
        # Of a single layer the table says it: out / in.
        if between:
            first, last = entered[0], entered[-1]
            end = f"reaches {first['name']}" if len(entered) > len(left) else f"leaves {first['name']}"
            remains = math.prod((*watched.values(), *between.values()))
            lines.append(
                f"{remains:.2g} of the gradient that entered {last['name']} {end}: the watched layers multiply it by "
                f"{math.prod(watched.values()):.2g}, what lies between them by {math.prod(between.values()):.2g}"
            )
        return cls(watched, between, lines)


def _culprits(factors: dict[str, float]) -> list[str]:
    """Those whose factor has at least half the powers of ten of the smallest: ten sigmoids alike, or one saturated layer."""
    return [name for name, factor in factors.items() if factor <= min(factors.values()) ** 0.5]
