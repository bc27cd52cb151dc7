"""
Sliding windows (arXiv:2004.05150): of the layers that window_pattern calls S, a token sees only the
last short_window tokens, itself included. They are cheaper in long contexts, and in decoding their
cache holds a window instead of the whole context.

    python train.py config/train_gpt2.py --window_pattern=SSSL --short_window=256
"""
import functools
from dataclasses import replace

import torch


def contexts_of(config, context):
    """-> the context of each layer: of a short one, with a mask (and keys) of its own"""
    window, cache, q = min(config.windows), context.cache, context.positions
    if cache is None:
        keys = context.keys
        if len(keys) <= window:     # all is in sight
            return [context] * config.n_layer
        # Compiled for whole rows only: the lengths of answers differ from batch to batch.
        whole = q.is_cuda and len(keys) == config.block_size
        attend = flex(len(keys), window) if whole else context.attend
    else:
        keys, attend = cache.ring_positions[:, None, None], context.attend
    q = q[:, None, :, None]                                             # (B or 1, 1, T, 1)
    mask = (keys >= 0) & (keys <= q) & (keys > q - window)              # (B or 1, 1, T, S)
    short = replace(context, mask=mask, attend=attend)
    return [short if size < config.block_size else context for size in config.windows]


@functools.cache
def flex(T, window):
    """-> attention over windows in FlexAttention, which skips what is out of sight (CUDA)"""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def in_sight(_batch, _head, q, k):
        return (k <= q) & (k > q - window)

    mask, run = create_block_mask(in_sight, None, None, T, T), torch.compile(flex_attention)

    def attend(q, k, v, attn_mask, is_causal, dropout_p, enable_gqa):
        return run(q, k, v, block_mask=mask, enable_gqa=enable_gqa)

    return attend


def window_cache(KVCache):
    """-> sample.py's KVCache for a network with short layers"""
    class WindowCache(KVCache):
        """Its short layers have a ring: the token at position p is in slot p % window."""
        overwrites = True

        def __init__(self, config, rows, device='cpu', dtype=torch.float32):
            self.window = min(config.windows)
            is_short = [size < config.block_size for size in config.windows]
            self.layers = [     # whether each one is short, its place among those of its kind
                (short, is_short[:layer].count(short)) for layer, short in enumerate(is_short)]
            super().__init__(replace(config, n_layer=is_short.count(False)), rows, device, dtype)
            _, _, _, _, *shape = self.kv.shape
            self.ring = self.kv.new_zeros(2, is_short.count(True), rows, self.window + 1, *shape)

        def part(self, first, last):
            part = super().part(first, last)
            part.ring = self.ring[:, :, first:last]
            return part

        def copy_row(self, source, target, count):
            super().copy_row(source, target, count)
            self.ring[:, :, target] = self.ring[:, :, source]

        def place(self, idx):
            positions, keys = super().place(idx)
            end = self.pos + self.lengths
            kept = (idx >= 0) & (positions >= end[:, None] - self.window)   # others are overwritten
            self.ring_slots = (positions % self.window).where(kept, self.window)
            slots = torch.arange(self.window, device=idx.device)
            self.single = idx.shape[1] == 1     # written first: what it replaces is out of sight
            last = self.pos[:, None] - 1 + self.single
            self.ring_positions = last - (last - slots) % self.window   # (B, window), < 0: none
            if not self.single:
                self.ring_positions = torch.cat((self.ring_positions, positions), dim=1)
            return positions, keys

        def extend(self, layer, k, v):
            is_short, place = self.layers[layer]
            if not is_short:
                return super().extend(place, k, v)
            seen = [torch.cat((self.ring[i, place, :, :self.window], new), dim=1)
                    for i, new in enumerate((k, v)) if not self.single]
            for i, new in enumerate((k, v)):
                self.ring[i, place].index_put_((self.row, self.ring_slots), new)
            return seen or [self.ring[i, place, :, :self.window] for i in (0, 1)]

    return WindowCache
