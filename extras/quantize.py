"""
Weights of 8 or 4 bits, for decoding: reading weights is all the work of a product with few rows.

    python sample.py --out_dir=out-gpt2 --quantize=int8     # extras chat, serve, evaluate too

With int4 the head keeps 8 bits.
"""
import warnings

import torch
from torch.nn import functional as F

GROUP = 32      # weights that share a scale and a zero in 4 bits


class Int8Linear(torch.nn.Module):
    """
    A Linear whose weights are kept as bytes with a scale for each output, for inference: a quarter
    of the memory of fp32.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        weight = (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8).contiguous()
        self.packed, self.nbytes = packed_for_cpu(weight, scale), weight.nbytes
        self.register_buffer('weight', weight if self.packed is None else None)
        self.register_buffer('scale', scale if self.packed is None else None)   # else it is packed
        self.register_buffer('bias', linear.bias)

    def forward(self, x):
        rows = x.view(-1, x.shape[-1])
        if self.packed is None:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        else:
            # The kernel multiplies bytes by bytes. So that it rounds the weights alone, a row is
            # split into two of 7 bits each, coarse and fine: 14 bits, where bf16 has 8.
            unit = rows.abs().amax(1, keepdim=True).float().clamp_(min=1e-30).div_(63)
            rows = rows / unit
            coarse = rows.round()
            both = torch.cat((coarse, rows.sub_(coarse).mul_(126)))
            coarse, fine = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
                both, 1.0, 64, self.packed).chunk(2)
            y = torch.add(coarse, fine, alpha=1 / 126).mul_(unit)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1).to(x.dtype)


def packed_for_cpu(weight, scale):
    """-> int8 weights as torch's x86 kernel reads them; None on other machines"""
    has_kernel = hasattr(torch.ops.quantized, 'linear_with_input_q_dq_qweight_dq_output_fp32')
    if weight.device.type != 'cpu' or torch.backends.quantized.engine != 'x86' or not has_kernel:
        return None
    with warnings.catch_warnings():     # that a later torch may be without it: then None
        warnings.simplefilter('ignore')
        zeros = torch.zeros(len(scale), dtype=torch.long)
        weight = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(weight, None)


class Int4Linear(torch.nn.Module):
    """
    A Linear whose weights are kept in 4 bits, with a scale and a zero for each GROUP of them in a
    row: w is about (q - 8) * scale + zero, for q from 0 to 15.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float().unflatten(1, (-1, GROUP))      # (N, groups, GROUP)
        low, high = weight.amin(2), weight.amax(2)
        scale = ((high - low) / 15).clamp(min=1e-12)
        q = ((weight - low[..., None]) / scale[..., None]).round().clamp(0, 15).flatten(1)
        # What torch's kernel reads, in bf16, of which the rounding is small beside that to 4 bits.
        scales = torch.stack((scale, low + 8 * scale), -1).transpose(0, 1).bfloat16().contiguous()
        self.packed, self.nbytes = None, q.numel() // 2 + scales.nbytes
        if q.device.type == 'cpu' and len(q) % 16 == 0:
            self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
            q = None    # this packing is right on a CPU alone
        self.register_buffer('q', None if q is None else (q[:, ::2] * 16 + q[:, 1::2]).byte())
        self.register_buffer('scales', scales)      # (groups, N, 2)
        self.register_buffer('bias', linear.bias)

    def dequantized(self):
        """-> the weights, (N, K)"""
        q = torch.stack((self.q >> 4, self.q & 15), -1).flatten(1).unflatten(1, (-1, GROUP))
        scale, zero = self.scales.float().transpose(0, 1).unbind(-1)
        return ((q.float() - 8) * scale[..., None] + zero[..., None]).flatten(1)

    def forward(self, x):
        if self.packed is None:
            y = F.linear(x, self.dequantized().to(x.dtype))
        else:   # its path for bf16 is the fast one
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.reshape(-1, x.shape[-1]).bfloat16(), self.packed, GROUP, self.scales)
            y = y.view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias


def quantize_model(model, kind='int8'):
    """Replace the Linears of a model by Int8Linears, with int4 those of its blocks by Int4Linears;
    tables that are looked up stay as they are. ValueError for what is not known"""
    if kind not in ('int8', 'int4'):
        raise ValueError(f'--quantize={kind}: choose int8 or int4')
    if model.config.n_expert:
        raise ValueError(f'--quantize={kind}: not for mixtures of experts')
    for path, module in list(model.named_modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Linear):
                narrow = kind == 'int4' and path.startswith('transformer.h.')
                fits = child.in_features % GROUP == 0
                setattr(module, name, (Int4Linear if narrow and fits else Int8Linear)(child))
    return model
