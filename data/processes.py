"""
One process or several: torchrun starts one for each GPU, and each runs the whole program.
"""
import contextlib
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn

from configurator import auto_device, auto_dtype


def join(device, dtype, backend):
    """-> rank, world, local rank, device and dtype of this process, by the settings"""
    rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in
                               (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
    where = auto_device(device, local_rank)
    if where.startswith('cuda'):
        torch.cuda.set_device(where)
    if world > 1:
        dist.init_process_group(backend or ('nccl' if where.startswith('cuda') else 'gloo'))
    precision = auto_dtype(dtype, where)
    if all_sum(torch.tensor([float(precision == torch.float32)]))[0] not in (0, world):
        precision = torch.float32       # measured in each process: they must agree
    torch.set_float32_matmul_precision('high')
    return rank, world, local_rank, where, precision


def leave(run):
    """End this process, if it is one of several, when all have come here; at once, since on a busy
    machine gloo's threads now and then abort a finished run while Python shuts down."""
    if dist.is_initialized():
        all_sum(torch.zeros(1))
        if run.config['wandb_log'] and run.rank == 0:
            import wandb
            wandb.finish()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def all_sum(values):
    """Sum a small tensor over all processes. -> list of numbers"""
    if dist.is_initialized():
        values = values.cuda() if dist.get_backend() == 'nccl' else values
        dist.all_reduce(values)
    return values.tolist()


def all_max(number):
    """-> the largest number of all processes'"""
    number = torch.tensor(number)
    if dist.is_initialized():
        number = number.cuda() if dist.get_backend() == 'nccl' else number
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def plain(tensor):
    """-> a tensor that may be sharded as a plain one; every process must call it"""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def prepare(model, config, device, precision, world):
    """-> the model as the loop calls it: on its device, by the settings in 8 bits and compiled, and
    either shared out among the processes or whole in each, with the mean of all gradients"""
    if config['lora_rank']:
        from extras.lora import add_lora
        add_lora(model, config)
    if config['dry_run']:
        return model
    if config['fp8']:
        from extras.float8 import use_float8
        use_float8(model, device)
    if config['recompute']:
        from extras.recompute import recompute_blocks
        recompute_blocks(model)
    if config['shard']:
        from extras.shard import shard_model
        shard_model(model, precision)
    model = model if config['shard'] else model.to(device)      # FSDP moves parts of it
    network = torch.compile(model) if config['compile'] else model
    if world == 1 or config['shard']:
        return network
    warnings.filterwarnings('ignore', '.*broadcast_buffers')    # renamed in torch 2.13
    return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)


def exchange(network, on):
    """-> a context for back-propagation in which processes exchange gradients, or do not"""
    if hasattr(network, 'set_requires_gradient_sync'):      # extras/shard.py
        network.set_requires_gradient_sync(on)
    elif hasattr(network, 'no_sync') and not on:
        return network.no_sync()
    return contextlib.nullcontext()
