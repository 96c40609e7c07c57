"""siglip_loss over several processes: equal to the plain formula of the whole batch, and the same error on every rank."""

import copy
import gc
import os
import time
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import torch_sigmoid as ts

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs gloo", allow_module_level=True)

from ranks import Ranks, join_group
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from torch_sigmoid import ring as rings

# Of the largest expected value; the arithmetic is that of the features' dtype, in another order of sums.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    ranks = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.end()


@pytest.fixture
def two(tmp_path):
    """Two processes that a test may destroy, with a group that waits for 3 seconds."""
    ranks = Ranks(2, tmp_path, timeout=3)
    yield ranks
    ranks.end()


_groups = {}


def group_of(size):
    """On every rank: the group of the first `size` ranks."""
    if size not in _groups:
        _groups[size] = dist.new_group(range(size))
    return _groups[size]


def batch(size, width=6, dtype=torch.float64, n_texts=None):
    """The same on each rank: features, scale and bias."""
    generator = torch.Generator().manual_seed(size)
    image, text = (
        F.normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)
        for n in (size, n_texts or size)
    )
    return image, text, torch.tensor(7.0, dtype=dtype), torch.tensor(-3.0, dtype=dtype)


def plain(image, text, scale, bias, image_ids, text_ids):
    logits = scale * image @ text.T + bias
    signs = torch.where(image_ids[:, None] == text_ids, 1.0, -1.0).to(logits.dtype)
    return -F.logsigmoid(signs * logits).sum() / len(image)


def value_and_gradients(function, tensors):
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    loss = function(*tensors)
    return loss.detach(), *torch.autograd.grad(2 * loss, tensors)


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * expected.abs().max().item())


def own_rows(tensor, size):
    """This rank's part, as a model leaves it that packs both features into one tensor."""
    rows = tensor.chunk(size)[dist.get_rank()]
    return torch.cat([rows, rows], 1)[:, : rows.shape[1]]


def error_of(function, *arguments, **options):
    with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
        function(*arguments, **options)
    return type(raised.value).__name__, str(raised.value)


def assert_the_whole_batch(size, dtype, n_texts=8, ids=False):
    """`n_texts` for 8 images on each rank."""
    group = group_of(size)
    if dist.get_rank() >= size:
        return
    image, text, scale, bias = batch(8 * size, dtype=dtype, n_texts=n_texts * size)
    # Text i belongs to image i of its rank.
    image_ids, text_ids = (torch.arange(20 * size).reshape(size, 20)[:, :n].flatten() for n in (8, n_texts))
    given = {}
    if ids:
        # Pairs within a rank and between ranks, of several texts, and of none.
        image_ids, text_ids = image_ids // 2 * 2, text_ids * 3 % (20 * size)
        given = {"image_ids": image_ids.chunk(size)[dist.get_rank()], "text_ids": text_ids.chunk(size)[dist.get_rank()]}
    whole = [each.double() for each in (image, text, scale, bias)]
    expected = value_and_gradients(lambda *t: plain(*t, image_ids, text_ids), whole)
    tensors = own_rows(image, size), own_rows(text, size), scale, bias
    for chosen in [group, "world"] if size == dist.get_world_size() else [group]:
        options = given | {"chunk_size": 3, "group": chosen}
        # The second call, over the same ring, gives the same.
        for _ in range(2):
            actual = value_and_gradients(lambda *t: ts.siglip_loss(*t, **options), tensors)  # noqa: B023
            assert_close(actual[0], expected[0], TOLERANCES[dtype])
            for each, whole in zip(actual[1:3], expected[1:3]):
                assert_close(each / size, own_rows(whole, size), TOLERANCES[dtype])
            for each, whole in zip(actual[3:], expected[3:]):
                # As DistributedDataParallel averages the gradients of parameters.
                each = each.double() / size
                dist.all_reduce(each, group=group)
                assert_close(each, whole, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_have_the_loss_and_the_averaged_gradients_of_the_whole_batch(four, size, dtype):
    four.run(assert_the_whole_batch, size, dtype)


@pytest.mark.parametrize("ids", [False, True], ids=["positions", "ids"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_more_texts_than_images_and_ids_that_hold_across_ranks(four, size, dtype, ids):
    four.run(assert_the_whole_batch, size, dtype, 11, ids)


def assert_kernels():
    before = ts.torch_below()
    ts.torch_below(0)  # torch's builds for CUDA leave small tensors to torch
    assert ts.path(torch.empty(1)).name == "triton"
    for ids in (False, True):
        assert_the_whole_batch(4, torch.float32, 11, ids)
        assert_dtensors((4,), [Shard(0)], 5, 9, ids, "tensor", torch.float32)
    ts.torch_below(before)


@pytest.mark.ways("interpreter")
def test_kernels_know_the_texts_of_other_ranks(four, kernels):
    if kernels.way != "interpreter":
        pytest.skip("runs kernels in the interpreter")
    four.run(assert_kernels)


def assert_open_clip(size, bidir):
    from open_clip.loss import SigLipLoss

    group = group_of(size)
    rank = dist.get_rank()
    if rank >= size:
        return
    image, text, scale, bias = batch(8 * size)
    tensors = own_rows(image, size).contiguous(), own_rows(text, size).contiguous(), scale, bias
    theirs = SigLipLoss(rank=rank, world_size=size, dist_impl="bidir" if bidir else "shift")
    value, *expected = value_and_gradients(theirs, tensors)
    dist.all_reduce(value, group=group)
    actual = value_and_gradients(lambda *t: ts.siglip_loss(*t, group=group), tensors)
    for each, other in zip(actual, (value / size, *expected)):
        assert_close(each, other, 1e-12)


@pytest.mark.parametrize("bidir", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_have_what_open_clip_gives_them(four, size, bidir):
    pytest.importorskip("open_clip")
    four.run(assert_open_clip, size, bidir)


def log_of_round(size, with_gradients):
    """Owners in their order, messages as they went out among them, and the collected gradient."""
    group = group_of(size)
    rank = dist.get_rank()
    if rank >= size:
        return None
    log, send = [], dist.batch_isend_irecv

    def batch_isend_irecv(messages):
        log.append(
            [(each.peer, each.tensor.numel() * each.tensor.element_size()) for each in messages if each.op is dist.isend]
        )
        return send(messages)

    dist.batch_isend_irecv = batch_isend_irecv
    try:
        rows = 2
        texts = rings.ring_of(group).round(torch.full((rows, 4), float(rank)), torch.full((rows,), rank))
        for owner, text, ids in texts:
            assert text.eq(owner).all()
            assert ids.eq(owner).all()
            log.append(owner)
            if with_gradients:
                texts.give(torch.full((rows, 4), 10.0**rank * (1 + owner)))
        return log, texts.collected()[0, 0].item() if with_gradients else None
    finally:
        dist.batch_isend_irecv = send


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_texts_go_both_ways_in_the_fewest_steps_and_messages(four, size, with_gradients):
    for rank, (log, collected) in enumerate(four.run(log_of_round, size, with_gradients)[:size]):
        owners = [each for each in log if isinstance(each, int)]
        batches = [each for each in log if isinstance(each, list)]
        assert sorted(owners) == list(range(size))
        assert owners[0] == rank
        # A block of two texts of four fp32 numbers and two ids.
        sent = [length for each in batches for _, length in each]
        assert sent.count(2 * 8) == size - 1
        assert sent.count(2 * 4 * 4) == (size - 1) * (1 + with_gradients)
        neighbours = {(rank + 1) % size, (rank - 1) % size}
        assert {peer for each in batches[: size // 2] for peer, _ in each} <= neighbours
        # Messages go out before the computation that hides them.
        assert log[: 1 + (size > 1)] == [*batches[:1], rank]
        with_texts = [each for each in batches if any(length == 2 * 8 for _, length in each)]
        assert len(with_texts) == size // 2
        # And the gradients: one batch more for the last step's, one for the way home.
        assert len(batches) <= size // 2 + 2 * with_gradients
        if with_gradients:
            assert collected == (1 + rank) * sum(10**other for other in range(size))


def assert_uneven(sizes):
    group = group_of(len(sizes))
    rank = dist.get_rank()
    if rank >= len(sizes):
        return
    rows = sizes[rank]
    texts = rings.ring_of(group, sizes).round(torch.full((rows, 4), float(rank)), torch.full((rows,), rank))
    for owner, text, ids in texts:
        assert torch.equal(text, torch.full((sizes[owner], 4), float(owner)))
        assert torch.equal(ids, torch.full((sizes[owner],), owner))
        texts.give(text + 10.0**rank)
    assert torch.equal(texts.collected(), torch.full((rows, 4), sum(rank + 10.0**other for other in range(len(sizes)))))


@pytest.mark.parametrize("sizes", [[3, 2], [2, 2, 1], [1, 0, 5], [3, 3, 3, 0], [0, 1, 2, 3]], ids=str)
def test_texts_of_ranks_that_have_unequally_many(four, sizes):
    four.run(assert_uneven, sizes)


def disagree(case):
    """Rank 1 does something else than the others."""
    rank = dist.get_rank()
    image, text, scale, bias = (each.requires_grad_() for each in batch(4, 3, torch.bfloat16))
    options = {"group": "world"}
    if rank == 1:
        if case == "batch":
            image, text = image[:3], text[:3]
        elif case == "dtype":
            image, text = image.half(), text.half()
        elif case == "gradient":
            image = image.detach()
        elif case == "chunk_size":
            options["chunk_size"] = 0
        elif case == "scale":
            scale = "7"
        elif case == "overflow":
            scale = 10**400
        elif case == "ids":
            options |= {"image_ids": torch.arange(4), "text_ids": torch.arange(4)}
        elif case == "no_grad":
            image, text, scale, bias = (each.detach() for each in (image, text, scale, bias))
    if case == "everybody":
        options["chunk_size"] = 0
    return error_of(ts.siglip_loss, image, text, scale, bias, **options)


DISAGREEMENTS = {
    "batch": (
        "ValueError",
        ["on rank 0, 2-3: ", "text_features (4, 3), torch.bfloat16", "on rank 1: ", "text_features (3, 3), torch.bfloat16"],
    ),
    "dtype": ("ValueError", ["on rank 0, 2-3: ", "torch.bfloat16", "on rank 1: ", "torch.float16"]),
    "gradient": ("ValueError", ["on rank 0, 2-3: ", "on rank 1: "]),
    "ids": ("ValueError", ["on rank 0, 2-3: ", "no ids", "on rank 1: ", "torch.bfloat16, ids"]),
    "no_grad": ("ValueError", ["gradients of image_features, text_features, logit_scale, logit_bias", "gradients of nothing"]),
    "chunk_size": ("ValueError", ["on rank 0, 2-3: ", "on rank 1: ValueError: chunk_size must be at least 1, got 0"]),
    "overflow": ("ValueError", ["on rank 0, 2-3: ", "on rank 1: OverflowError"]),
    "scale": ("TypeError", ["on rank 0, 2-3: ", "on rank 1: TypeError: logit_scale must be a torch.Tensor, got str"]),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_what_one_rank_does_alone_is_the_same_error_on_every_rank(four, case):
    error, found = DISAGREEMENTS[case]
    outcomes = four.run(disagree, case, within=10)
    assert len(set(outcomes)) == 1
    assert outcomes[0][0] == error
    assert "expected the same on each rank" in outcomes[0][1]
    for each in found:
        assert each in outcomes[0][1]
    # And the ranks can go on.
    four.run(assert_the_whole_batch, 4, torch.float64, within=10)


def test_what_every_rank_does_wrong_is_the_error_of_one(four):
    expected = "ValueError", "siglip_loss(): chunk_size must be at least 1, got 0"
    assert four.run(disagree, "everybody", within=10) == [expected] * 4


def second_derivative():
    tensors = [each.requires_grad_() for each in batch(4)]
    loss = ts.siglip_loss(*tensors, group="world")
    return error_of(torch.autograd.grad, loss, tensors, create_graph=True)


def test_a_second_derivative_over_a_group_is_an_error(four):
    for _, message in four.run(second_derivative):
        assert "no second derivative" in message


def transforms():
    image, *others = batch(4)
    return error_of(torch.func.grad(lambda image: ts.siglip_loss(image, *others, group="world")), image)


def test_a_transform_over_a_group_is_an_error(four):
    for error, message in four.run(transforms):
        assert error == "RuntimeError"
        assert "eager reverse mode" in message


def dies(after):
    """Rank 1 ends, its process and all, `after` so many calls."""
    tensors = [each.requires_grad_() for each in batch(4)]
    for _ in range(after):
        ts.siglip_loss(*tensors, group="world").backward()
    if dist.get_rank() == 1:
        os._exit(1)
    start = time.monotonic()
    return *error_of(ts.siglip_loss, *tensors, group="world"), time.monotonic() - start


@pytest.mark.parametrize("after", [0, 2])
def test_a_rank_that_has_ended_is_an_error_on_the_others(two, after):
    (error, message, seconds), other = two.outcomes(dies, after, within=20)
    assert other is None
    assert error == "RuntimeError"
    assert "expected a call on each of the ranks 0-1, but one has ended or did not call in time" in message
    assert seconds < 5


def stays_away():
    tensors = batch(4)
    if dist.get_rank() == 0:
        return error_of(ts.siglip_loss, *tensors, group="world")
    time.sleep(4)
    return None


def test_a_rank_that_does_not_call_is_an_error_on_the_others(two):
    (error, message), _ = two.outcomes(stays_away, within=20)
    assert error == "RuntimeError"
    assert "did not call in time" in message


def calls(number):
    return [ts.siglip_loss(*batch(4), group="world").item() for _ in range(number)]


def joins_again(rendezvous):
    """Rank 0 leaves its group and meets the new process of rank 1."""
    if dist.get_rank() == 0:
        dist.destroy_process_group()
        join_group(0, 2, rendezvous, 3)
    return calls(2)


def test_a_group_with_a_restarted_worker_starts_anew(two, tmp_path):
    """Nothing of a call outlives its group: rank 0 has made calls that the new process of rank 1 has not."""
    before = two.run(calls, 2)
    two.processes[1].kill()
    two.processes[1].join()
    two.start(1, tmp_path / "again")
    assert two.run(joins_again, tmp_path / "again", within=10) == before


def assert_meshes():
    rank, size = dist.get_rank(), dist.get_world_size()
    tensors = batch(3, n_texts=3)
    tensors = (tensors[0] + rank, *tensors[1:])
    line = init_device_mesh("cpu", (size,))
    expected = ts.siglip_loss(*tensors, group="world")
    assert torch.equal(ts.siglip_loss(*tensors, group=line), expected)
    assert torch.equal(ts.SigLIPLoss(group=line)(*tensors), expected)
    plane = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    of_column = ts.siglip_loss(*tensors, group=plane.get_group("dp"))
    assert torch.equal(ts.siglip_loss(*tensors, group=plane["dp"]), of_column)
    assert not torch.equal(of_column, expected)
    error, message = error_of(ts.siglip_loss, *tensors, group=plane)
    assert error == "ValueError"
    assert "group must be a DeviceMesh of one dimension, got DeviceMesh((dp=2, tp=2)" in message
    assert 'e.g. mesh["dp"]' in message
    _, message = error_of(ts.siglip_loss, *tensors, group=init_device_mesh("cpu", (size // 2, 2)))
    assert "mesh_dim_names" in message


def test_a_device_mesh_of_one_dimension_stands_for_its_group(four):
    four.run(assert_meshes)


def errors_outside():
    """What ranks outside of a group get, for what new_group gives them in its place, and for a mesh."""
    groups = dist.new_group([0, 1]), DeviceMesh("cpu", [0, 1])
    tensors = batch(2)
    if dist.get_rank() < 2:
        return [ts.siglip_loss(*tensors, group=each).item() for each in groups]
    return [error_of(ts.siglip_loss, *tensors, group=each) for each in groups]


def test_a_group_must_hold_the_rank(four):
    inside, again, *outside = four.run(errors_outside)
    assert inside == again
    for rank, errors in enumerate(outside, 2):
        assert {error for error, _ in errors} == {"ValueError"}
        assert "group must hold this rank, got what torch.distributed.new_group gives to ranks outside" in errors[0][1]
        assert f"group must hold this rank, {rank}, got a DeviceMesh of ranks 0-1" in errors[1][1]


def error_of_a_destroyed_group():
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    dist.destroy_process_group(group)
    return error_of(ts.siglip_loss, *batch(2), group=group)


def test_a_destroyed_group_is_an_error(four):
    for error, message in four.run(error_of_a_destroyed_group):
        assert error == "ValueError"
        assert "got one that was destroyed" in message


def forgets():
    """The warnings of three calls: without a group, again, and with a group of this rank alone."""
    rings._has_warned = False
    tensors = batch(2)
    found = []
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for group in (alone, None, None):
            ts.siglip_loss(*tensors, group=group)
            found.append(len(caught))
        rings._has_warned = False
        ts.SigLIPLoss()(*tensors)
    return found, str(caught[0].message), {each.category.__name__ for each in caught}, caught[0].filename


def test_a_forgotten_group_warns_once(four):
    for found, message, categories, filename in four.run(forgets):
        assert found == [0, 1, 1]
        assert "torch.distributed runs on 4 ranks, but group is None" in message
        assert 'pass group="world"' in message
        assert categories == {"UserWarning"}
        assert filename == __file__


def test_one_process_has_no_group_to_forget():
    assert not dist.is_initialized()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ts.siglip_loss(*batch(2))
    assert not rings._has_warned


def assert_copies():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    calls = []
    tensors = batch(2)
    for group in (mesh, dist.group.WORLD, "world"):
        module = ts.SigLIPLoss(group=group)
        module.register_forward_hook(lambda *_: calls.append("original"))
        twin = copy.deepcopy(torch.nn.Sequential(module))[0]
        twin.register_forward_hook(lambda *_: calls.append("copy"))
        assert twin.group is group
        assert torch.equal(module(*tensors), ts.siglip_loss(*tensors, group=group))
        assert calls == ["original"]
        twin(*tensors)
        assert calls == ["original", "original", "copy"]
        calls.clear()


def test_a_deep_copy_has_the_group_and_hooks_of_its_own(four):
    four.run(assert_copies)


def assert_host_group():
    """A group that has gloo for no CPU, like one of NCCL alone, agrees over one that is made once and ends with it."""
    size = dist.get_world_size()
    group = dist.new_group(range(size), backend="cuda:gloo", timeout=timedelta(seconds=7))
    for _ in range(2):
        assert rings.agree(group, "same", rows=(dist.get_rank(), 1)) == [(rank, 1) for rank in range(size)]
        (host,) = rings._host_groups.values()
    assert host.options._timeout == timedelta(seconds=7)
    _, message = error_of(rings.agree, group, f"{dist.get_rank() % 2}")
    assert "on rank 0, 2: 0; on rank 1, 3: 1" in message
    assert list(rings._host_groups.values()) == [host]
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert not len(rings._host_groups)
    assert rings.agree(dist.group.WORLD, "same") == [(0, 0)] * size


def test_hosts_of_a_group_without_gloo_agree_over_one_that_has_it(four):
    four.run(assert_host_group)


# DTensors: what one process computes from the whole tensors.


def mesh_of(shape):
    if shape not in _groups:
        _groups[shape] = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[: len(shape)])
    return _groups[shape]


def placed(tensor, mesh, placements):
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def assert_dtensors(shape, placements, n_images, n_texts, ids, numbers, dtype):
    mesh = mesh_of(shape)
    image, text, scale, bias = batch(n_images, dtype=dtype, n_texts=n_texts)
    image_ids, text_ids = (torch.arange(n) for n in (n_images, n_texts))
    given = {}
    if ids:
        # Pairs within a rank and between ranks, of several texts, and of none.
        image_ids, text_ids = image_ids // 2 * 2, (text_ids * 3) % (n_texts + 2)
        given = {name: placed(each, mesh, placements) for name, each in (("image_ids", image_ids), ("text_ids", text_ids))}
    whole = [each.double().requires_grad_() for each in (image, text, scale, bias)]
    expected = plain(*whole, image_ids, text_ids)
    to_whole = torch.autograd.grad(3 * expected, whole)

    image, text = (placed(each, mesh, placements).requires_grad_() for each in (image, text))
    if numbers == "DTensor":
        scale, bias = (placed(each, mesh, [Replicate()] * mesh.ndim) for each in (scale, bias))
    if numbers == "number":
        scale, bias = scale.item(), bias.item()
    else:
        scale, bias = scale.requires_grad_(), bias.requires_grad_()
    loss = ts.siglip_loss(image, text, scale, bias, **given)
    assert isinstance(loss, DTensor)
    assert loss.placements == (Replicate(),) * mesh.ndim
    assert_close(loss.to_local().detach(), expected.detach(), TOLERANCES[dtype])
    (3 * loss).backward()
    for each, grad in zip((image, text), to_whole):
        assert each.grad.placements == tuple(placements)
        bound = TOLERANCES[dtype] * grad.abs().max().item()
        own = placed(grad, mesh, placements).to_local()
        torch.testing.assert_close(each.grad.to_local().double(), own, rtol=0, atol=bound)
    if numbers == "number":
        return
    for each, grad in zip((scale, bias), to_whole[2:]):
        if numbers == "DTensor":
            assert each.grad.placements == (Replicate(),) * mesh.ndim
            each.grad = each.grad.to_local()
        assert_close(each.grad, grad, TOLERANCES[dtype])


@pytest.mark.parametrize("numbers", ["DTensor", "tensor", "number"])
@pytest.mark.parametrize("ids", [False, True], ids=["positions", "ids"])
@pytest.mark.parametrize(("n_images", "n_texts"), [(8, 8), (10, 10), (3, 3), (5, 9)], ids=str)
def test_dtensors_have_the_loss_and_gradients_of_the_whole_batch(four, n_images, n_texts, ids, numbers):
    """Ten rows are 3, 3, 3 and 1; three are 1, 1, 1 and none; five and nine share no boundary."""
    four.run(assert_dtensors, (4,), [Shard(0)], n_images, n_texts, ids, numbers, torch.float64)


@pytest.mark.parametrize("placements", [[Shard(0), Replicate()], [Replicate(), Shard(0)], [Replicate(), Replicate()]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtensors_on_a_mesh_of_two_dimensions(four, placements, dtype):
    four.run(assert_dtensors, (2, 2), placements, 6, 7, False, "DTensor", dtype)
    four.run(assert_dtensors, (2, 2), placements, 6, 6, True, "tensor", dtype)


def assert_dtensors_on_ranks_out_of_order():
    _groups["permuted"] = DeviceMesh("cpu", [3, 1, 0, 2])
    for ids in (False, True):
        assert_dtensors("permuted", [Shard(0)], 5, 9, ids, "DTensor", torch.float64)


def test_dtensors_on_a_mesh_that_permutes_the_ranks(four):
    four.run(assert_dtensors_on_ranks_out_of_order)


def assert_dtensors_on_part_of_a_mesh():
    for name in ("dp", "tp"):
        _groups["part"] = mesh_of((2, 2))[name]
        assert_dtensors("part", [Shard(0)], 5, 9, False, "DTensor", torch.float64)


def test_dtensors_on_one_dimension_of_a_mesh(four):
    four.run(assert_dtensors_on_part_of_a_mesh)


def communication(placements):
    from torch.distributed.tensor.debug import CommDebugMode

    image, text, scale, bias = batch(8)
    image, text = (placed(each, mesh_of((4,)), placements).requires_grad_() for each in (image, text))
    scale.requires_grad_()
    messages, send = [], dist.batch_isend_irecv

    def batch_isend_irecv(operations):
        messages.append(len(operations))
        return send(operations)

    dist.batch_isend_irecv = batch_isend_irecv
    try:
        with CommDebugMode() as comm:
            loss = ts.siglip_loss(image, text, scale, bias)
        forward, forward_messages = comm.get_total_counts(), len(messages)
        with CommDebugMode() as comm:
            loss.backward()
        return forward, forward_messages, comm.get_total_counts(), len(messages) - forward_messages
    finally:
        dist.batch_isend_irecv = send


def test_replicated_dtensors_communicate_nothing_and_no_backward_does(four):
    assert set(four.run(communication, [Replicate()])) == {(0, 0, 0, 0)}
    for _, forward_messages, *backward in four.run(communication, [Shard(0)]):
        assert forward_messages == 4
        assert backward == [0, 0]


def errors_of_dtensors():
    line, plane = mesh_of((4,)), mesh_of((2, 2))
    image, text, scale, _ = batch(8)
    split, whole, width = (placed(image, line, [each]) for each in (Shard(0), Replicate(), Shard(1)))
    partial = DTensor.from_local(image, line, [Partial()], run_check=False)
    both = placed(image, plane, [Shard(0), Shard(0)])
    on_plane = placed(image, plane, [Shard(0), Replicate()])
    ids = torch.arange(8)
    of_ids = {"image_ids": ids, "text_ids": ids}
    calls = {
        "Shard(1)": ((width, width, 1.0), {}),
        "Partial": ((partial, partial, 1.0), {}),
        "two dimensions": ((both, both, 1.0), {}),
        "mixed": ((split, whole, 1.0), {}),
        "meshes": ((split, on_plane, 1.0), {}),
        "plain text": ((split, text, 1.0), {}),
        "plain image": ((image, split, 1.0), {}),
        "plain features": ((image, text, placed(scale, line, [Replicate()])), {}),
        "partial scale": ((split, split, DTensor.from_local(scale, line, [Partial()], run_check=False)), {}),
        "group": ((split, split, 1.0), {"group": "world"}),
        "plain ids": ((split, split, 1.0), of_ids),
        "ids elsewhere": ((split, split, 1.0), {name: placed(ids, line, [Replicate()]) for name in of_ids}),
        "one of the ids": ((split, split, 1.0), {"image_ids": placed(ids, line, [Shard(0)])}),
        "fewer texts": ((split, placed(image[:7], line, [Shard(0)]), 1.0), {}),
        "vectors": ((placed(image[:, 0], line, [Shard(0)]),) * 2 + (1.0,), {}),
        "chunk_size": ((split, split, 1.0), {"chunk_size": 0}),
    }
    return {name: error_of(ts.siglip_loss, *arguments, **options) for name, (arguments, options) in calls.items()}


SHARD_0 = "features must be sharded by Shard(0) over one dimension of the mesh"
DTENSOR_ERRORS = {
    "Shard(1)": ("ValueError", SHARD_0, "Shard(dim=1)", "redistribute"),
    "Partial": ("ValueError", SHARD_0, "Partial(sum)", "redistribute"),
    "two dimensions": ("ValueError", SHARD_0, "(Shard(dim=0), Shard(dim=0))", "dp=2, tp=2"),
    "mixed": ("ValueError", "equal placements", "(Shard(dim=0),)", "(Replicate(),)", "redistribute"),
    "meshes": ("ValueError", "one mesh", "dp=4", "dp=2, tp=2", "redistribute"),
    "plain text": ("TypeError", "image_features placements (Shard(dim=0),)", "text_features a plain Tensor"),
    "plain image": ("TypeError", "image_features a plain Tensor", "text_features placements (Shard(dim=0),)"),
    "plain features": ("TypeError", "image_features a plain Tensor", "logit_scale placements (Replicate(),)", "to_local()"),
    "partial scale": ("ValueError", "logit_scale must be replicated", "Partial(sum)", "redistribute"),
    "group": ("ValueError", "expected no group with them, got 'world'"),
    "plain ids": ("TypeError", "image_ids must be a DTensor like the features", "got a plain Tensor"),
    "ids elsewhere": ("TypeError", "image_ids must be a DTensor like the features", "got placements (Replicate(),)"),
    "one of the ids": ("TypeError", "image_ids were given without text_ids"),
    "fewer texts": ("ValueError", "expected a text for each image, got (8, 6) and (7, 6)"),
    "vectors": ("ValueError", "image_features must be (B, D)"),
    "chunk_size": ("ValueError", "chunk_size must be at least 1, got 0"),
}


def test_other_dtensors_are_the_same_error_on_every_rank(four):
    outcomes = four.run(errors_of_dtensors, within=20)
    assert all(each == outcomes[0] for each in outcomes)
    assert outcomes[0].keys() == DTENSOR_ERRORS.keys()
    for case, (expected, *found) in DTENSOR_ERRORS.items():
        error, message = outcomes[0][case]
        assert error == expected, (case, error, message)
        assert message.startswith("siglip_loss(): ")
        for each in found:
            assert each in message, (case, message)


def disagree_on_dtensors():
    image, text, scale, bias = batch(8)
    split = [placed(each, mesh_of((4,)), [Shard(0)]) for each in (image, text)]
    if dist.get_rank() == 2:
        split = [each.float() for each in split]
    return error_of(ts.siglip_loss, *split, scale, bias)


def test_dtensors_that_differ_are_the_same_error_on_every_rank(four):
    outcomes = four.run(disagree_on_dtensors, within=20)
    assert len(set(outcomes)) == 1
    assert "on rank 0-1, 3: image_features (8, 6)" in outcomes[0][1]
    assert "on rank 2: " in outcomes[0][1]


def derivatives_of_shards():
    """Errors of a second derivative, and of transforms."""
    image, text, scale, bias = batch(8)
    split = [placed(each, mesh_of((4,)), [Shard(0)]).requires_grad_() for each in (image, text)]
    loss = ts.siglip_loss(*split, scale, bias)
    second = error_of(torch.autograd.grad, loss, split, create_graph=True)
    return second, error_of(torch.func.grad(lambda scale: ts.siglip_loss(*split, scale, bias).to_local()), scale)


def test_shards_are_differentiable_once_in_eager_reverse_mode(four):
    for (error, message), transform in four.run(derivatives_of_shards):
        assert error == "RuntimeError"
        assert "no second derivative" in message
        assert transform == (
            "RuntimeError",
            "siglip_loss(): with DTensors expected eager reverse mode, got a tracer or a transform",
        )


def assert_compiled():
    """Outside of the loss the graph is compiled; fullgraph=True is an error."""
    torch._dynamo.reset()
    tensors = own_rows(batch(8)[0], 4), own_rows(batch(8)[1], 4), *batch(8)[2:]
    split = [placed(each, mesh_of((4,)), [Shard(0)]) for each in batch(8)[:2]]
    numbers = batch(8)[2:]

    def with_group(*tensors):
        return 2 * ts.siglip_loss(*(3 * each for each in tensors), group="world")

    def with_dtensors(*features):
        return 2 * ts.siglip_loss(*(3 * each for each in features), *numbers)

    for function, arguments in ((with_group, tensors), (with_dtensors, split)):
        for _ in range(2):
            compiled = value_and_gradients(torch.compile(function, backend="aot_eager"), arguments)
            for actual, expected in zip(compiled, value_and_gradients(function, arguments)):
                difference = actual - expected
                assert (difference.to_local() if isinstance(difference, DTensor) else difference).abs().max() < 1e-12
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(with_group, backend="aot_eager", fullgraph=True)(*tensors)


def test_torch_compile_breaks_the_graph(four):
    four.run(assert_compiled)


def assert_dtensors_without_warning():
    rings._has_warned = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_dtensors((4,), [Shard(0)], 8, 8, False, "number", torch.float64)
    with torch.no_grad():
        image, text, scale, bias = batch(8)
        split = [placed(each, mesh_of((4,)), [Shard(0)]) for each in (image, text)]
        loss = ts.SigLIPLoss(chunk_size=1)(*split, scale, bias).to_local()
        assert_close(loss, plain(image, text, scale, bias, torch.arange(8), torch.arange(8)), 1e-12)


def test_dtensors_are_no_forgotten_group(four):
    four.run(assert_dtensors_without_warning)
