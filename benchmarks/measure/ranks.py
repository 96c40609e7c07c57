"""A function in several processes of this machine, the ranks of one gloo group."""

import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def _rank(rank: int, size: int, folder: str, seconds: float, function, arguments) -> None:
    torch.set_num_threads(1)
    # Otherwise gloo looks for its own address at whatever this machine's name resolves to.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    options = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=seconds)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", **options)
    try:
        result = function(*arguments)
        torch.save(result, Path(folder) / str(rank))
        # A process that ends takes its connections with it, which the others may still need.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run(function, size: int, *arguments, seconds: float = 300) -> list:
    """function(*arguments) in `size` processes; what each returns. A TimeoutError if they take longer than `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        deadline = time.monotonic() + seconds
        ranks = multiprocessing.spawn(_rank, (size, folder, seconds, function, arguments), size, join=False)
        try:
            while not ranks.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} in {size} processes took longer than {seconds:g} seconds")
        finally:
            for process in ranks.processes:
                process.kill()
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(size)]
