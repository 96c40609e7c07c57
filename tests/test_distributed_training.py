"""Training on PyTorch's engines: a killed rank is resumed with the losses of one process, and a wrong loss is a failure."""

import json

import pytest
import torch

for library in ("matplotlib", "rich", "sklearn", "tqdm"):
    pytest.importorskip(library, reason="part of the extra `train`")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("needs gloo", allow_module_level=True)
import torch_sigmoid as ts
from benchmarks import train
from benchmarks.measure import record
from benchmarks.training import distributed, engines, loop
from benchmarks.training.checkpoints import Checkpoints
from benchmarks.training.tasks import largest_difference

pytestmark = pytest.mark.skipif(ts.kernels.INTERPRETED, reason="trains on torch's operators, for minutes through these")
CPU = torch.device("cpu")


@pytest.fixture
def as_rank(monkeypatch):
    """Has this process look like a rank of some that torchrun has started."""

    def look_like(world, rank=0, **more):
        known = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"}
        known |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "RANK": rank}
        known |= {"WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
        for name, value in (known | more).items():
            monkeypatch.setenv(name, str(value))

    return look_like


def one_process(name, dtype, steps):
    """A task's training in torch operators, by one process that nobody disturbs."""
    task = engines.load(CPU, getattr(torch, dtype), 0)[name]
    _, training = engines.make_training(task, task.plain, 0)
    training.run(steps, shown=False)
    return training


def test_ranks_killed_while_they_save_go_on_from_the_checkpoint_before_and_one_process_goes_on_from_theirs(tmp_path):
    checkpoint, killed = tmp_path / "checkpoints", ["--kill-rank", "1", "--kill-at-step", "12"]
    options = ["--engine", "fsdp2", "--device", "cpu", "--dtype", "float64", "--task", "siglip", "--out", str(tmp_path)]
    options += ["--checkpoint", str(checkpoint), "--checkpoint-every", "6", *killed]
    ended = loop.run_ranks(2, *options, restarts=1, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("What a GradientWatch saw") == 1
    assert "even.1" in ended.stdout
    assert "exitcode: -9" in ended.stderr
    (row,) = json.loads((tmp_path / "fsdp2-2.json").read_text())["rows"]
    assert row["resumed at step"] == 6
    assert row["largest loss difference"] <= 1e-10
    assert 0.4 < row["parameters held"] < 0.6

    # What two processes have saved, one loads; then both orders of batches must be the same beyond an epoch too.
    folder = checkpoint / "siglip-float64-seed0"
    assert {path.name for path in folder.iterdir()} == {"step-12", "step-14"}
    task = engines.load(CPU, torch.float64, 0)["siglip"]
    _, training = engines.make_training(task, task.ours, 0)
    assert Checkpoints(folder).load(training) == 14
    assert training.losses[-1] == row["last loss"]
    training.run(24, shown=False)
    assert largest_difference(training, one_process("siglip", "float64", 24)) <= 1e-10


def test_a_loss_that_is_not_that_of_one_process_is_a_failure(as_rank, monkeypatch, tmp_path, capsys):
    as_rank(1)
    wrong = {"alpha": 0.2501, "gamma": 2.0, "reduction": "mean"}
    monkeypatch.setattr(ts, "sigmoid_focal_loss", lambda *pair, **_: ts.losses.sigmoid_focal_loss(*pair, **wrong))
    options = ["--engine", "ddp", "--device", "cpu", "--task", "bce", "focal", "--out", str(tmp_path)]
    assert train.main(options) == 1
    said = capsys.readouterr().out
    assert "FAILED: ddp in 1 processes, focal, float64: the losses differ by" in said
    assert "FAILED: ddp in 1 processes, focal, float32: the losses differ by" in said
    assert said.count("FAILED") == 2


@pytest.mark.parametrize(
    ("world", "options", "said"),
    [
        (2, "--engine zero", "invalid choice: 'zero'"),
        (2, "--engine ddp --task moe", "invalid choice: 'moe'"),
        (3, "--engine fsdp2-tp", "--engine fsdp2-tp needs an even number of processes, got 3"),
        (3, "--engine tp", "--engine tp splits 4 heads, got 3 processes to split them among"),
        (3, "--engine ddp", "--engine ddp splits batches of 64 rows, got 3 processes to split them among"),
        (2, "--engine ddp --steps 0", "--steps must be at least 1, got 0"),
        (2, "--engine ddp --checkpoint-every 0", "--checkpoint-every must be at least 1, got 0"),
        (2, "--engine ddp --kill-rank 1", "--kill-rank and --kill-at-step need each other, got one of them"),
        (2, "--engine ddp --kill-rank 2 --kill-at-step 1", "--kill-rank must be 0 to 1, got 2"),
        (2, "--engine ddp --kill-rank 1 --kill-at-step 15", "--kill-at-step must be 1 to 14, got 15"),
        (2, "--engine ddp --device meta", "--device must be cpu or cuda, got meta"),
        (64, "--engine ddp --device cuda", "64 processes on this machine need a GPU each, got"),
    ],
)
def test_bad_arguments_are_named(world, options, said, as_rank, capsys):
    as_rank(world, rank=world - 1)
    with pytest.raises(SystemExit) as exit:
        train.main(["--device", "cpu", *options.split()])
    assert exit.value.code == 2
    assert said in capsys.readouterr().err


def test_an_engine_needs_torchrun_and_restarts_need_a_store_of_their_own(as_rank, capsys):
    with pytest.raises(SystemExit):
        train.main(["--engine=tp", "--device", "cpu"])
    assert "torchrun --nproc-per-node 2 -m benchmarks.train --engine tp" in capsys.readouterr().err
    as_rank(2, TORCHELASTIC_MAX_RESTARTS=1, TORCHELASTIC_USE_AGENT_STORE=True)
    with pytest.raises(SystemExit):
        train.main(["--engine", "tp", "--device", "cpu"])
    assert "expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # torch 2.10's own checkpoints use it
def test_a_checkpoint_beyond_the_steps_is_an_error_and_a_partial_one_is_none(as_rank, tmp_path):
    as_rank(1)
    options = ["--engine", "ddp", "--device", "cpu", "--dtype", "float32", "--task", "bce", "--out", str(tmp_path)]
    options += ["--checkpoint", str(tmp_path)]
    assert train.main([*options, "--steps", "2"]) == 0
    folder = tmp_path / "bce-float32-seed0"
    (folder / "step-9.partial").mkdir()
    assert Checkpoints(folder).finished() == [2]
    with pytest.raises(ValueError, match=r"--steps 1 is over: .* holds step 2"):
        train.main([*options, "--steps", "1"])
    torch.distributed.destroy_process_group()
    assert {path.name for path in folder.iterdir()} == {"step-2"}


def test_batches_go_on_where_they_stood():
    whole, part = loop.Shuffle(100, 30, seed=3), loop.Shuffle(100, 30, seed=3)
    batches = [whole.next() for _ in range(10)]
    assert [len(batch) for batch in batches] == [30] * 10
    assert len({*torch.cat(batches[:3]).tolist()}) == 90
    assert not torch.equal(batches[0], batches[3])
    for _ in range(4):
        part.next()
    resumed = loop.Shuffle(100, 30, seed=4)
    resumed.load_state_dict(part.state_dict())
    assert all(torch.equal(resumed.next(), batch) for batch in batches[4:])


def test_a_scenario_that_fails_or_resumes_nothing_is_a_failure(monkeypatch, tmp_path, capsys):
    row = {"engine": "ddp", "processes": 2, "task": "bce", "dtype": "float64", "resumed at step": 0, "seconds": 1.0}

    def run_engine(engine, *ignored, **options):
        if engine == "tp":
            raise distributed.FailedError("no number")
        return [row | {"largest loss difference": 0.0}]

    monkeypatch.setattr(distributed, "run_engine", run_engine)
    ran, killed, failed = (
        next(each for each in distributed.SCENARIOS if (each.engine, each.restarts) == which)
        for which in (("ddp", 0), ("ddp", 1), ("tp", 0))
    )
    for scenarios, said in (((ran,), None), ((ran, killed), "resumed at step {0}, expected 12"), ((ran, failed), "no number")):
        monkeypatch.setattr(distributed, "SCENARIOS", scenarios)
        out = tmp_path / str(said is None)
        assert distributed.main(["--device", "cpu", "--out", str(out)]) == (said is not None)
        assert (said or "") in capsys.readouterr().out
        assert (record.folder_of(CPU, out) / "distributed.json").exists() == (said is None)
