"""
Faster decoding of large models on a CPU, a row at a time. In fp32 BLAS gives a product with a
single row to one thread, which reads half of what two do; in bf16 it reads the weights up to twice
as fast as a vector's. open_model() in sample.py uses this where it is there.
"""
import torch


class RowLinear(torch.nn.Linear):
    """A Linear whose product with one row is shared out among a CPU's threads, each taking a part
    of the inputs."""

    def forward(self, x):
        parts, is_bf16 = torch.get_num_threads(), self.weight.dtype == torch.bfloat16
        if x.numel() != self.in_features or self.in_features % parts and not is_bf16:
            return super().forward(x)
        if is_bf16:
            y = torch.mv(self.weight, x.flatten())
        else:
            weight = self.weight.t().view(parts, -1, self.out_features)
            y = torch.bmm(x.view(parts, 1, -1), weight).sum(0)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


def use_row_linears(model):
    """Make a CPU's large Linears in fp32 and bf16 RowLinears; in fp32 their weights are kept as
    (in, out) in memory."""
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.numel() >= 2 ** 18:
            weight = module.weight
            if weight.device.type == 'cpu' and weight.dtype in (torch.float32, torch.bfloat16):
                if weight.dtype == torch.float32:
                    weight.data = weight.data.t().contiguous().t()
                module.__class__ = RowLinear    # the same parameters, read in another way
    return model
