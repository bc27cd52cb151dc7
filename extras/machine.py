"""What this machine can do: the FLOP/s and bytes/s that a run's speed is compared with."""
import functools
import re
import time

import torch
from torch import nn

from configurator import cpu_flops
from data.models import flops_per_token

GPU_FLOPS = {   # dense bf16 (fp16 before Ampere), from the vendors' data sheets
    'B200': 2250e12, 'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L4': 121e12,
    'A10': 125e12, '5090': 210e12, '4090': 165e12, '3090': 71e12, 'V100': 125e12, 'T4': 65e12}


@functools.cache
def peak_flops(device, dtype):
    """-> FLOP/s that device could do: a GPU's by its data sheet, a CPU's measured, else None."""
    if device == 'cpu':
        return cpu_flops(dtype)
    if not device.startswith('cuda') or dtype == torch.float32:
        return None
    return gpu_flops(torch.cuda.get_device_name(device))


def mfu(run, rate, block_size):
    """-> {'mfu': the share of the peak FLOP/s that a run uses at rate tokens/s}, {} if unknown"""
    peak = peak_flops(run.device, run.dtype)
    return {'mfu': flops_per_token(run.model, block_size) * rate / peak / run.world} if peak else {}


def gpu_flops(name):
    """-> FLOP/s of the GPU that a name such as 'NVIDIA H100 80GB HBM3' contains, else None"""
    known = (peak for key, peak in GPU_FLOPS.items() if re.search(rf'{key}(?!\d)', name))
    return next(known, None)


def weight_bytes(model):
    """How many bytes of matrices a decoding step reads."""
    linears = (m for m in model.modules() if hasattr(m, 'nbytes') or isinstance(m, nn.Linear))
    experts = sum(getattr(m, 'active_weights', 0) for m in model.modules())     # for one token
    dense = sum(getattr(m, 'nbytes', 0) or m.weight.nbytes for m in linears)
    if experts:     # which are not quantized, and so have weights
        dense += experts * model.lm_head.weight.element_size()
    return dense


@functools.cache
def read_bandwidth(device):
    """Bytes per second that device reads from its memory, measured on a sum over 256 MB."""
    block, seconds = torch.ones(2 ** 26, device=device), []
    for _ in range(4):
        began = time.perf_counter()
        block.sum().item()
        seconds.append(time.perf_counter() - began)
    return block.nbytes / min(seconds)


def decoding_speed(model, requests, seconds):
    """-> a line: tokens/s of requests decoded side by side, and the share of the bandwidth"""
    lengths = [len(request.ids) for request in requests]
    share = bandwidth_share(model, seconds / max(lengths))
    return (f'{sum(lengths) / seconds:.1f} tokens/s in {len(requests)} rows; reading weights takes '
            f'{share:.0%} of the memory bandwidth')


def bandwidth_share(model, seconds):
    """The share of the memory bandwidth that reading a model's weights in these seconds takes."""
    return weight_bytes(model) / seconds / read_bandwidth(str(model.transformer.wte.weight.device))
