"""Shows where gradients vanish: what each sigmoid-like layer of a network does to them in a real training run.

    with torch_sigmoid.diagnostics.GradientWatch(model, every=10) as watch:
        train(model)
    watch.report()

watch        GradientWatch: attaches to a model, follows its steps, hands out what it saw
layers       which modules are watched, and what is known of each
gradients    hooks: where a layer's gradients pass in autograd's graph, and which calls do not count
totals       what is kept of every layer on each device, and the numbers that follow from it
statistics   what one tensor adds to that
advice       which layers are in trouble, and what helps
report       the table, its words, heat maps
"""

from .layers import SIGMOID_LIKE
from .watch import GradientWatch

__all__ = ["SIGMOID_LIKE", "GradientWatch"]
