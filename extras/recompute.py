"""
Activation checkpointing (arXiv:1604.06174): of each block only what goes in is kept for backward,
which computes the rest again. A third more FLOPs, and memory for a network many times as deep:

    python train.py --depth=24 config/depth.py --recompute=True
"""
import torch
from torch.utils.checkpoint import checkpoint


def recompute_blocks(model):
    """Let a model's blocks compute their activations again in backward."""
    class RecomputedBlock(type(model.transformer.h[0])):

        def forward(self, x, context):
            if not torch.is_grad_enabled():
                return super().forward(x, context)
            return checkpoint(super().forward, x, context, use_reentrant=False)

    for block in model.transformer.h:
        block.__class__ = RecomputedBlock
