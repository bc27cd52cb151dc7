"""
Matrix products of training in 8 bits (arXiv:2209.05433), on Hopper and newer GPUs:

    python train.py config/train_gpt2.py --fp8=True

The Linears of the blocks round what they multiply: weights and activations to e4m3 (4 bits of
exponent, 3 of mantissa: relative steps of 1/8), gradients to e5m2, each tensor scaled to the range
of its format. Products are added up in higher precision; the weights that learn stay fp32. The head
and the embeddings are not touched, nor is evaluation, nor decoding.
"""
import torch
from torch import nn
from torch.nn import functional as F


def to_float8(x, dtype):
    """-> x in 8 bits, and the scale that gives it back: x is about x8 * scale"""
    scale = x.abs().max().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def product(a, b, scale_a, scale_b, dtype):
    """a: (N, K), b: (K, M), in 8 bits -> (N, M); b's columns must be contiguous"""
    b = b.t().contiguous().t()
    return torch._scaled_mm(a.contiguous(), b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype)


class Float8Product(torch.autograd.Function):
    """x: (N, K), w: (M, K) -> x w^T: (N, M)"""

    @staticmethod
    def forward(ctx, x, w, dtype):
        (x8, scale_x), (w8, scale_w) = (to_float8(t, torch.float8_e4m3fn) for t in (x, w))
        ctx.save_for_backward(x8, scale_x, w8, scale_w)
        ctx.dtypes = dtype, x.dtype, w.dtype
        return product(x8, w8.t(), scale_x, scale_w, dtype)

    @staticmethod
    def backward(ctx, grad):
        x8, scale_x, w8, scale_w = ctx.saved_tensors
        dtype, of_x, of_w = ctx.dtypes
        grad8, scale = to_float8(grad, torch.float8_e5m2)
        return (product(grad8, w8, scale, scale_w, dtype).to(of_x),
                product(grad8.t(), x8, scale, scale_x, dtype).to(of_w), None)


class Float8Linear(nn.Linear):

    def forward(self, x):
        if not (self.training and torch.is_grad_enabled()):
            return F.linear(x, self.weight, self.bias)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        y = Float8Product.apply(x.flatten(0, -2), self.weight, dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(dtype)


def use_float8(model, device):
    """Let the Linears of the blocks compute in 8 bits. ValueError where that is not possible."""
    if device.startswith('cuda') and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f'--fp8=True: {torch.cuda.get_device_name(device)} has no 8-bit products')
    for name, module in model.transformer.h.named_modules():
        if type(module) is nn.Linear:
            if module.in_features % 16 or module.out_features % 16:
                raise ValueError(f'--fp8=True: block {name} is of {module.in_features} x '
                                 f'{module.out_features}, which must be multiples of 16')
            module.__class__ = Float8Linear
