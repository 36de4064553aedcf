"""Real processes that train together through gloo, as under torchrun, forked from one that has imported torch."""

import contextlib
import multiprocessing
import os
import signal
import socket
import traceback

import torch

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["tiny_run", "fastbert.pretrain.run", "fastbert.models.checkpoint", "torch._dynamo"]
PRELOADED += ["torch.utils.tensorboard", "torch.distributed.fsdp", "matplotlib.figure"]
CONTEXT.set_forkserver_preload(PRELOADED)


def free_port():
    with contextlib.closing(socket.socket()) as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def _entry(function, rank, size, port, errors, arguments):
    """Set the variables that torchrun sets, then run the function."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    names |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException as error:
        (errors / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        traceback.print_exc()
        # skips destructors that might wait for the other processes
        os._exit(2)


def run(size, function, *arguments, errors):
    """Run `function` on `size` processes; returns their exit codes, negative for a signal, and their errors."""
    errors.mkdir(parents=True, exist_ok=True)
    for old in errors.iterdir():
        old.unlink()
    port = free_port()
    processes = [
        CONTEXT.Process(target=_entry, args=(function, rank, size, port, errors, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        if process.exitcode is None:
            process.kill()
    found = {int(p.stem): p.read_text() for p in errors.iterdir()}
    return [process.exitcode for process in processes], found


def train(settings, out, resume=False, kill=None, fail=None):
    """Pretrain. `kill` = (rank, step) kills that process before the step, `fail` = (rank, step) raises there."""
    from fastbert.pretrain.trainer import PretrainTrainer
    from fastbert.train import PretrainConfig, pretrain

    original = PretrainTrainer.train_step

    def train_step(self):
        if (self.world.rank, self.at.step) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.world.rank, self.at.step) == fail:
            raise ValueError("this process can't read its data")
        return original(self)

    PretrainTrainer.train_step = train_step
    pretrain(PretrainConfig(**settings), out, resume=resume, quiet=True)


def count_exchanges(folder, accumulate):
    """Write the number of gradient exchanges of DDP in 3 steps, and the losses."""
    import json

    from random_feed import RandomFeed, small_config, small_model
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from fastbert.pretrain.trainer import PretrainTrainer
    from fastbert.train.world import joined

    with joined(gpu=False) as world:
        config = small_config(accumulate=accumulate)
        trainer = PretrainTrainer(small_model(dropout=0.0), RandomFeed(), config, world)
        calls = []

        def hook(state, bucket):
            calls.append(1)
            return allreduce_hook(state, bucket)

        trainer.spread.call.register_comm_hook(None, hook)
        losses = [trainer.train_step().loss for _ in range(3)]
        (folder / f"{world.rank}.json").write_text(json.dumps([len(calls), losses]))
        world.meet()
