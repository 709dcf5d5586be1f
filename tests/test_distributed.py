"""One, two and four processes: the same groups, curve, weights and run."""

import json
import os
import socket
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from rankmamba.collection import load
from rankmamba.errors import InputError
from rankmamba.reranker import Reranker
from rankmamba.train import TrainConfig, main, train

RECIPE = dict(max_steps=6, batch_size=4, group_size=4, max_length=64, max_query_length=16, learning_rate=5e-3)


def on_processes(count: int, work) -> None:
    """Run `work` in `count` forks of this process that know of one another as torchrun's processes do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        process = os.fork()
        if process == 0:
            status = 1
            try:
                torch.set_num_threads(1)  # no thread of the parent lives in a fork
                where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in where.items()})
                work(rank)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        processes.append(process)
    statuses = [os.waitpid(process, 0)[1] for process in processes]
    assert not any(statuses), "it failed; what it said is above"
