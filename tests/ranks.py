"""Processes of one gloo group, started once, that run one check after the other.

A server imports torch once and forks them, so a group costs about a second. A check is a function of a test module, which each
process calls; its result, or what it raised, comes back. A check that takes too long fails, and the processes end.
"""

import contextlib
import importlib.util
import multiprocessing
import pickle
import time
import traceback
from datetime import timedelta

import torch.distributed as dist

_context = None


def _fork_server():
    global _context
    if _context is None:
        _context = multiprocessing.get_context("forkserver")
        preload = ["torch_sigmoid", "torch.distributed.tensor"]
        _context.set_forkserver_preload(preload + ["open_clip"] * (importlib.util.find_spec("open_clip") is not None))
    return _context


class Ranks:
    """`size` processes that meet at a file in `folder`, in a group that waits `timeout` seconds for a rank."""

    def __init__(self, size, folder, timeout=60.0):
        self.size, self.timeout = size, timeout
        self.connections, self.processes = [None] * size, [None] * size
        for rank in range(size):
            self.start(rank, folder / "rendezvous")

    def start(self, rank, rendezvous):
        """Start the process of a rank, also in the place of one that has ended."""
        context = _fork_server()
        self.connections[rank], theirs = context.Pipe()
        arguments = rank, self.size, str(rendezvous), self.timeout, theirs
        self.processes[rank] = context.Process(target=_serve, args=arguments, daemon=True)
        self.processes[rank].start()
        theirs.close()

    def outcomes(self, check, *arguments, within=60.0):
        """What each rank's call of `check` returned or raised; None of a rank that has ended."""
        deadline = time.monotonic() + within
        for connection in self.connections:
            with contextlib.suppress(BrokenPipeError):
                connection.send_bytes(pickle.dumps((check, arguments)))
        outcomes = []
        for connection in self.connections:
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                self.end()
                raise AssertionError(f"{check.__name__} did not end within {within} s")
            try:
                outcomes.append(pickle.loads(connection.recv_bytes()))
            except EOFError:
                outcomes.append(None)
        return outcomes

    def run(self, check, *arguments, within=60.0):
        """What `check` returns on each rank; raises what it raises on any."""
        outcomes = self.outcomes(check, *arguments, within=within)
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, Exception):
                raise AssertionError(f"on rank {rank} of {len(outcomes)}:\n{outcome.trace}") from outcome
        return outcomes

    def end(self):
        for process in self.processes:
            process.kill()
            process.join()


def join_group(rank, size, rendezvous, timeout):
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )


def _serve(rank, size, rendezvous, timeout, connection):
    import torch

    torch.set_num_threads(1)
    join_group(rank, size, rendezvous, timeout)
    while True:
        check, arguments = pickle.loads(connection.recv_bytes())
        try:
            outcome = check(*arguments)
        except Exception as error:
            outcome = error
            outcome.trace = traceback.format_exc()
        connection.send_bytes(pickle.dumps(outcome))
