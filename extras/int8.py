"""
Weights of a byte each, for decoding: reading weights is all the work of a product with few rows.

    python sample.py --out_dir=out-gpt2 --quantize=int8     # extras chat, serve, evaluate too
"""
import warnings

import torch
from torch.nn import functional as F


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


def quantize_model(model, kind='int8'):
    """Replace the Linears of a model by Int8Linears; tables that are looked up stay as they are."""
    if kind != 'int8':
        raise ValueError(f'--quantize={kind}: choose int8')
    if model.config.n_expert:
        raise ValueError(f'--quantize={kind}: not for mixtures of experts')
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Int8Linear(child))
    return model
