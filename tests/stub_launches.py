"""Run by test_launch.py on the stub of a GPU (benchmarks/measure/stub.py): what kept launches hand to the driver.

Each `check_` provokes one hazard of keeping compilations. Prints a JSON object: the name of each check, and its failure.
"""

import itertools
import json
import os
import random
import traceback

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

import torch_sigmoid
from benchmarks.measure import stub

stub.activate()

from torch_sigmoid import autograd, dispatch, kernels
from torch_sigmoid.kernels import kept, launch, pointwise
from torch_sigmoid.kernels import sigmoid as operator

BACKWARD = operator._backward[False]
# Three pointers, then strides and sizes as far as the compiler did not fold them: 8 bytes are read of each.
N_POINTERS = 3
record = stub.last_launch(N_POINTERS)


def launch_backward(grad, saved, launcher=BACKWARD, output=None):
    """The function, grid and stream that the driver was handed, along with the right pointers."""
    if output is None:
        output = torch.empty_like(saved, dtype=grad.dtype)
    before = record.launches
    launcher((grad, saved), (output,))
    assert record.launches == before + 1, "one launch"
    assert list(record.parameters[:N_POINTERS]) == [tensor.data_ptr() for tensor in (grad, saved, output)]
    return record.function, record.grid, record.stream


def operands(n, dtype, offset=0, grad_offset=0):
    return torch.empty(n + 16, dtype=dtype)[grad_offset : grad_offset + n], torch.empty(n + 16, dtype=dtype)[
        offset : offset + n
    ]


def rows(n, width, stride, dtype):
    return torch.empty(n, width, dtype=dtype), torch.empty(n, stride, dtype=dtype)[:, :width]


def variants():
    """Pairs of tensors that differ in all that a compilation depends on."""
    for dtype, n in itertools.product((torch.float32, torch.bfloat16, torch.float64), (1, 2, 15, 16, 17, 1024, 1030)):
        yield operands(n, dtype)
    for offset, grad_offset in itertools.product((0, 1, 8), (0, 1, 4)):
        yield operands(1024, torch.bfloat16, offset, grad_offset)
    for stride in (48, 41, 64):
        yield rows(33, 40, stride, torch.float32)
    yield torch.empty(()).expand(1024), torch.empty(1024)
    yield torch.empty(40, 1).expand(40, 33), torch.empty(40, 33)
    # Matrices: a block cut out of three dimensions, the same one expanded in each of its dimensions, and turned round.
    yield torch.empty(5, 7, 33), torch.empty(6, 16, 64)[:5, :7, :33]
    for expanded in ((1, 7, 33), (5, 1, 33), (5, 7, 1)):
        yield torch.empty(expanded).expand(5, 7, 33), torch.empty(5, 7, 33)
    yield torch.empty(33, 7, 5).permute(2, 1, 0), torch.empty(5, 7, 33)
    yield torch.empty(33, 40).t(), torch.empty(40, 33)
    yield torch.empty(1024, dtype=torch.float32), torch.empty(1024, dtype=torch.bfloat16)
    # Never touched, so never backed by memory: 32-bit offsets, 64-bit offsets, a 64-bit size.
    for n in (2**31 - 2**17, 2**31 - 2**10, 2**31 + 16):
        yield operands(n, torch.bfloat16)


def check_a_kept_launch_is_what_triton_itself_would_launch():
    fresh = launch.Launcher(BACKWARD.kernel, *BACKWARD.constants)
    pairs = [pair for pair in variants() for _ in range(2)]
    random.Random(0).shuffle(pairs)
    n_kept = 0
    for grad, saved in pairs:
        fresh.kept.clear()
        expected = launch_backward(grad, saved, fresh)
        entries = len(BACKWARD.kept)
        assert launch_backward(grad, saved) == expected, (grad.shape, grad.stride(), saved.stride(), grad.dtype)
        n_kept += len(BACKWARD.kept) == entries
        assert launch_backward(grad, saved) == expected
    assert n_kept >= len(pairs) // 2, "the second of each pair was launched from what the first had left"


def check_an_output_off_its_alignment_is_another_launch():
    grad, saved = operands(1024, torch.float32)
    aligned, shifted = torch.empty(1024), torch.empty(1025)[1:]
    BACKWARD.kept.clear()
    functions = [launch_backward(grad, saved, output=output)[0] for output in (aligned, shifted, aligned, shifted)]
    assert functions[0] == functions[2] != functions[1] == functions[3]


def through_triton(call):
    """How many launches of `call` went through `kernel[grid]`."""
    original, count = launch.Launcher._launch, 0

    def counted(self, *arguments):
        nonlocal count
        count += 1
        return original(self, *arguments)

    launch.Launcher._launch = counted
    try:
        call()
    finally:
        launch.Launcher._launch = original
    return count


def check_tensors_recognised_launch_what_triton_itself_would_launch():
    """In particular: gradients of another layout, dtype or size, and the same tensors where they start elsewhere."""
    fresh = launch.Launcher(BACKWARD.kernel, *BACKWARD.constants)
    BACKWARD.kept.clear()
    BACKWARD.kept_alike.clear()
    pairs = [pair for pair in variants() for _ in range(4)]
    random.Random(1).shuffle(pairs)
    asked, asks = autograd.launchable, []
    autograd.launchable = lambda *tensors: asks.append(1) or asked(*tensors)
    try:
        for grad, saved in pairs:
            fresh.kept.clear()
            expected = launch_backward(grad, saved, fresh)[:2]
            before = record.launches
            with torch.no_grad():
                output = autograd.sigmoid_backward(grad, saved, "output")
            assert record.launches == before + 1
            assert (record.function, record.grid) == expected, (grad.shape, grad.stride(), saved.stride(), grad.dtype)
            assert list(record.parameters[:N_POINTERS]) == [tensor.data_ptr() for tensor in (grad, saved, output)]
            assert output.dtype is grad.dtype
    finally:
        autograd.launchable = asked
    assert len(asks) < len(pairs) // 2, "most were recognised"
    assert all(len(known) <= dispatch.MAX_LIKENESSES for known in dispatch._known_pairs.values())


def check_a_forked_process_recognises_nothing_that_it_has_not_launched():
    with torch.no_grad():
        for _ in range(3):
            autograd.sigmoid_backward(*PAIR, "output")
    assert BACKWARD.kept_alike
    child = os.fork()
    if child == 0:
        os._exit(len(BACKWARD.kept_alike))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def check_hooks_see_launches_of_tensors_recognised():
    with torch.no_grad():
        for _ in range(3):
            autograd.sigmoid_backward(*PAIR, "output")
        assert through_triton(lambda: autograd.sigmoid_backward(*PAIR, "output")) == 0
        seen = []
        knobs.runtime.launch_enter_hook.add(seen.append)
        try:
            autograd.sigmoid_backward(*PAIR, "output")
        finally:
            knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(seen) == 1


PAIR = operands(640, torch.float32)


def usual():
    return launch_backward(*PAIR)


def check_the_second_launch_is_kept():
    BACKWARD.kept.clear()
    assert through_triton(usual) == 1
    assert through_triton(usual) == 0


def check_hooks_see_every_launch():
    usual()
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        seen = []
        chain.add(seen.append)
        try:
            usual()
            usual()
        finally:
            chain.remove(seen.append)
        assert len(seen) == 2, seen
        assert through_triton(usual) == 0


def check_a_hook_set_by_assignment_sees_every_launch():
    usual()
    before, seen = knobs.runtime.launch_enter_hook, []
    knobs.runtime.launch_enter_hook = seen.append
    try:
        usual()
    finally:
        knobs.runtime.launch_enter_hook = before
    assert len(seen) == 1


def check_a_pre_run_hook_sees_every_launch():
    usual()
    seen = []
    BACKWARD.kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append(1))
    try:
        usual()
    finally:
        BACKWARD.kernel.pre_run_hooks.clear()
    assert len(seen) == 1


def check_debugging_goes_through_triton():
    usual()
    knobs.runtime.debug = True
    try:
        assert through_triton(usual) == 1
    finally:
        knobs.runtime.debug = False


def check_another_current_device_goes_through_triton():
    expected = usual()
    driver.active.device = 0
    try:
        assert through_triton(usual) == 1
        assert record.function != expected[0], "loaded anew for that device"
    finally:
        driver.active.device = -1
    assert usual() == expected


def check_the_current_stream_is_asked_for_at_every_launch():
    usual()
    BACKWARD.kept.clear()
    streams = iter(range(16, 1000, 16))
    original = driver.active.get_current_stream
    driver.active.get_current_stream = lambda device: next(streams)
    try:
        assert [usual()[2] for _ in range(3)] == [16, 32, 48]
    finally:
        driver.active.get_current_stream = original
        BACKWARD.kept.clear()


def check_another_driver_goes_through_triton():
    usual()
    before = driver.active
    driver.set_active(type(before)())
    try:
        assert through_triton(usual) == 1
        assert through_triton(usual) == 0
    finally:
        driver.set_active(before)
    assert through_triton(usual) == 1


def check_a_forked_process_keeps_nothing():
    usual()
    child = os.fork()
    if child == 0:
        os._exit(len(BACKWARD.kept) + len(operator._forward.kept))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert BACKWARD.kept


def check_an_unknown_version_of_triton_keeps_nothing():
    BACKWARD.kept.clear()
    assert kept.KEEPS_COMPILATIONS
    kept.KEEPS_COMPILATIONS = False
    try:
        assert [through_triton(usual) for _ in range(3)] == [1, 1, 1]
    finally:
        kept.KEEPS_COMPILATIONS = True


def check_a_launch_that_was_refused_is_not_kept():
    pair = operands(640, torch.float16)
    launcher = pointwise.pointwise(operator.sigmoid_backward_formula, True)
    knobs.runtime.jit_cache_hook = lambda **_: True
    try:
        launcher(pair, (torch.empty_like(pair[0]),))
    finally:
        knobs.runtime.jit_cache_hook = None
    assert not launcher.kept


def check_what_is_kept_outlives_tritons_own_cache():
    """Since Triton 3.8 a compilation that nothing refers to unloads its module, and its function with it."""
    BACKWARD.kept.clear()
    usual()
    for device_caches in BACKWARD.kernel.device_caches.values():
        device_caches[0].clear()
    (entry,) = BACKWARD.kept.values()
    assert any(isinstance(cell.cell_contents, CompiledKernel) for cell in entry.__closure__)
    assert through_triton(usual) == 0


def check_no_more_is_kept_than_the_limit():
    BACKWARD.kept.clear()
    before = kept.MAX_KEPT
    kept.MAX_KEPT = 3
    try:
        for n in range(100, 120):
            launch_backward(*operands(n, torch.float32))
            assert len(BACKWARD.kept) <= 3
    finally:
        kept.MAX_KEPT = before


def check_reading_copies_nothing_of_a_tensor_that_is_copied_when_written():
    """At the first launch, which is Triton's, and at kept ones; not with an older torch, which has no way to."""
    if not hasattr(torch.Tensor, "const_data_ptr"):
        return
    source = torch.empty(640)
    BACKWARD.kept.clear()
    for offset in (0, 4):
        for _ in range(2):
            grad, saved = (torch._lazy_clone(source)[offset:] for _ in range(2))
            BACKWARD((grad, saved), (torch.empty_like(saved),))
            address = source.const_data_ptr() + offset * source.itemsize
            assert list(record.parameters[:2]) == [address] * 2
            assert torch._C._is_cow_tensor(grad)
            assert torch._C._is_cow_tensor(saved)


def check_an_output_that_is_copied_when_written_is_copied():
    source = torch.zeros(640)
    output = torch._lazy_clone(source)
    launch_backward(*PAIR, output=output)
    assert not torch._C._is_cow_tensor(output)
    assert output.data_ptr() != source.data_ptr()


def check_empty_tensors_launch_nothing():
    before = record.launches
    empty = torch.empty(0, 3)
    kernels.sigmoid.sigmoid_backward(empty, empty, False)
    assert record.launches == before


def check_after_warmup_nothing_is_compiled():
    compiled = []
    torch_sigmoid.warmup("cpu", [torch.float32, torch.bfloat16])
    below = torch_sigmoid.torch_below(0)
    knobs.runtime.jit_post_compile_hook = lambda **_: compiled.append(1)
    try:
        for dtype, shape, save in itertools.product(
            (torch.float32, torch.bfloat16), ((1,), (64,), (3, 1000, 7)), ("output", "input")
        ):
            x = torch.empty(shape, dtype=dtype, requires_grad=True)
            torch_sigmoid.sigmoid(x, save=save).sum().backward()
            (grad,) = torch.autograd.grad(
                torch_sigmoid.sigmoid(x, save=save), x, torch.empty(shape, dtype=dtype), create_graph=True
            )
            torch.autograd.grad(grad, x, torch.empty(shape, dtype=dtype))
        assert not compiled
        torch_sigmoid.warmup("cpu", [torch.bfloat16], operators=["silu", "logsigmoid", "swiglu", "sigmoid_gate"])
        compiled.clear()
        for shape in ((1,), (64,), (3, 1000, 7)):
            x = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
            for y in (torch_sigmoid.silu(x), torch_sigmoid.logsigmoid(x), torch_sigmoid.swiglu(x, x)):
                y.sum().backward()
                torch_sigmoid.sigmoid_gate(y.detach(), x).backward(torch.empty_like(y))
        assert not compiled
        torch_sigmoid.sigmoid(torch.empty(8, 40)[:, :33])
        assert compiled, "a slice compiles when it first comes, so the hook works"
    finally:
        torch_sigmoid.torch_below(below)
        knobs.runtime.jit_post_compile_hook = None


def check_a_watch_launches_without_looking_up():
    """Three kernels for an activation's input, two for each of its gradients."""
    layer = torch_sigmoid.Sigmoid()
    watch = torch_sigmoid.diagnostics.GradientWatch(layer)
    x = torch.empty(640, 64, requires_grad=True)
    unwatched, watched = (lambda: layer(x).backward(torch.empty(640, 64))), []
    unwatched()
    before = record.launches
    unwatched()
    own = record.launches - before
    with watch:
        for _ in range(2):
            before = record.launches
            looked_up = through_triton(unwatched)
            watched.append((record.launches - before - own, looked_up))
    # The two gradients' totals are aligned differently, so the kernel that adds to them is compiled twice.
    assert watched == [(3 + 2 * 2, 3 + 3), (3 + 2 * 2, 0)], watched


def loss_calls():
    """Losses of the same shapes that differ in all that a compilation depends on, forward and backward, single ones twice."""

    def call(x, target, **options):
        def run():
            leaf = x.detach().requires_grad_()
            loss = torch_sigmoid.binary_cross_entropy_with_logits(leaf, target, **options)
            twice = loss.dim() > 0
            (grad,) = torch.autograd.grad(loss, leaf, torch.empty(()).expand(loss.shape), create_graph=twice)
            if twice:
                torch.autograd.grad(grad, leaf, grad.detach())

        return run

    bfloat16, weight = torch.bfloat16, torch.empty(64)
    for shape, reduction in (((16, 64), "none"), ((300, 64), "mean")):
        x = torch.empty(shape, dtype=bfloat16)
        targets = [torch.empty(shape, dtype=dtype) for dtype in (bfloat16, torch.float32, torch.int64, torch.bool)]
        targets += [torch.empty(shape[::-1], dtype=bfloat16).t(), torch.empty(shape[0], 80, dtype=bfloat16)[:, :64]]
        targets += [
            torch.empty(shape[0] * 64 + 1, dtype=bfloat16)[1:].view(shape),
            torch.empty((), dtype=bfloat16).expand(shape),
        ]
        for target in targets:
            yield call(x, target, reduction=reduction)
        for options in ({"weight": weight}, {"pos_weight": weight}, {"pos_weight": weight[:1]}, {"label_smoothing": 0.1}):
            yield call(x, targets[0], reduction=reduction, **options)
        yield call(x, targets[2], reduction=reduction, ignore_index=-100)
        yield call(x.float(), targets[2], reduction=reduction, ignore_index=-100)


def gate_calls():
    """Gates that broadcast against operands of the same shapes, forward and backward, dense ones twice.

    Sums are split in the last two shapes.
    """

    def call(x, gate, upstream, twice=False):
        def run():
            leaves = x.detach().requires_grad_(), gate.detach().requires_grad_()
            grads = torch.autograd.grad(torch_sigmoid.sigmoid_gate(*leaves), leaves, upstream, create_graph=twice)
            if twice:
                torch.autograd.grad(grads, leaves, tuple(grad.detach() for grad in grads))

        return run

    shapes = {(64, 48): [(64, 1), (1, 1)], (4, 64, 33): [(4, 1, 33), (1, 64, 1)]}
    shapes |= {(2, 5000): [(2, 1)], (3000, 64): [(1, 64)]}
    dtype = torch.bfloat16
    for shape, gate_shapes in shapes.items():
        dense = torch.empty(shape, dtype=dtype)
        wider = torch.empty(*shape[:-1], shape[-1] + 16, dtype=dtype)
        for gate_shape in gate_shapes:
            gate = torch.empty(gate_shape, dtype=dtype)
            for x in (dense, dense.mT.contiguous().mT, wider[..., : shape[-1]]):
                yield call(x, gate, dense, twice=x is dense)
            yield call(dense, gate, torch.empty((), dtype=dtype).expand(shape))
            yield call(dense, torch.empty(gate.numel() + 1, dtype=dtype)[1:].view(gate_shape), dense)


def hand_to_the_driver_what_triton_would(calls):
    """That each call launches what it launches when nothing is kept, in any order, and at last without Triton's lookup."""
    seen, original = [], launch.Launcher.__call__

    def recorded(self, inputs, outputs, known=None):
        original(self, inputs, outputs, known)
        seen.append((record.function, record.grid))

    def launches_of(call):
        seen.clear()
        call()
        return tuple(seen)

    launch.Launcher.__call__ = recorded
    try:
        expected = []
        for call in calls:
            for cache in kept.caches:
                cache.clear()
            expected.append(launches_of(call))
        assert len(set(expected)) > len(calls) // 2
        pairs = list(zip(calls, expected)) * 2
        random.Random(0).shuffle(pairs)
        for call, launches in pairs:
            assert launches_of(call) == launches
        assert sum(through_triton(call) for call in calls) == 0
    finally:
        launch.Launcher.__call__ = original


def check_a_kept_launch_of_a_loss_is_what_triton_itself_would_launch():
    hand_to_the_driver_what_triton_would(list(loss_calls()))


def check_a_kept_launch_of_a_broadcast_gate_is_what_triton_itself_would_launch():
    hand_to_the_driver_what_triton_would(list(gate_calls()))


def main():
    failures = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check()
                failures[name] = None
            except Exception:
                failures[name] = traceback.format_exc()
    print(json.dumps(failures))


if __name__ == "__main__":
    main()
