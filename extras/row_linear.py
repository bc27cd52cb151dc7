"""
Faster decoding of large fp32 models on a CPU: BLAS gives a product with a single row to one
thread, which reads half of what two do. open_model() in sample.py uses this where it is there.
"""
import torch


class RowLinear(torch.nn.Linear):
    """A Linear whose product with one row is shared out among a CPU's threads, each taking a part
    of the inputs."""

    def forward(self, x):
        parts = torch.get_num_threads()
        if x.numel() != self.in_features or self.in_features % parts:
            return super().forward(x)
        weight = self.weight.t().view(parts, -1, self.out_features)
        y = torch.bmm(x.view(parts, 1, -1), weight).sum(0)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


def use_row_linears(model):
    """Make a CPU's large fp32 Linears RowLinears, their weights kept as (in, out) in memory."""
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.numel() >= 2 ** 18:
            weight = module.weight
            if weight.dtype == torch.float32 and weight.device.type == 'cpu':
                weight.data = weight.data.t().contiguous().t()
                module.__class__ = RowLinear    # the same parameters, read in another way
    return model
