"""
A GPT from top to bottom: rotary positions, the KV cache, attention, MLP, block, model, optimizers.

One config spans two families. The defaults are the modern one: RMSNorm, rotary positions, QK-norm,
ReLU^2, untied head, zero-initialized projections. GPT2 below is what to change to get GPT-2.

Shapes: B rows, T tokens a row, C = n_embd, H query heads, G key and value heads, D = C / H,
V vocabulary, S keys in sight.
"""
import copy
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int = 1024     # the longest context, in tokens
    vocab_size: int = 50257    # ids 0 .. vocab_size-1 are tokens; the tables may have more rows
    n_layer: int = 12
    n_head: int = 6            # fewer, wider heads than GPT-2's: cheaper on every device
    n_kv_head: int = 0         # shared by groups of query heads (arXiv:2305.13245); 0: n_head
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False         # biases in Linears and LayerNorms, as in GPT-2
    norm: str = 'rms'          # rms (arXiv:1910.07467, without a gain) or layer
    position: str = 'rope'     # rope (arXiv:2104.09864) or learned
    qk_norm: bool = True       # normalize queries and keys (arXiv:2302.05442)
    activation: str = 'relu2'  # relu2 (arXiv:2109.08668), gelu or gelu_tanh (OpenAI's GPT-2)
    tied: bool = False         # one table for the embedding and the head
    zero_init: bool = True     # projections into the residual stream, and the head, start at zero
    x0: bool = True            # each block sees the embedding again, as much as it learns to want
    ngrams: int = 1            # embed the last 2 .. ngrams tokens too (arXiv:2501.16975), hashed
    ngram_rows: int = 32768    # into a table of so many rows
    vocab_multiple: int = 64   # the tables' rows are rounded up: matrix products like round sizes

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd',
                     'ngrams', 'ngram_rows', 'vocab_multiple'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} = {getattr(self, name)}: must be at least 1')
        if self.n_embd % (self.n_head * (2 if self.position == 'rope' else 1)):
            raise ValueError(f'n_embd = {self.n_embd} does not divide into n_head = {self.n_head} '
                             'heads of an even width')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head = {self.n_head} is no multiple of n_kv_head={self.n_kv_head}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout = {self.dropout}: must be from 0 to less than 1')
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} = {getattr(self, name)!r}: choose one of {allowed}')

    @property
    def rows(self):
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


def relu2(x):
    x = F.relu(x)
    return x * x    # not x.square(): its backward is a pow() per element, 7 times slower on a CPU


ACTIVATIONS = {'relu2': relu2, 'gelu': F.gelu, 'gelu_tanh': nn.GELU('tanh')}
CHOICES = {'norm': ('rms', 'layer'), 'position': ('rope', 'learned'),
           'activation': tuple(ACTIVATIONS)}
# What turns the modern default into GPT-2 (nanoGPT's; OpenAI's weights want gelu_tanh).
GPT2 = dict(bias=True, norm='layer', position='learned', qk_norm=False, activation='gelu',
            tied=True, zero_init=False, x0=False, vocab_multiple=1)
GPT2_SIZES = {'gpt2': (12, 12, 768), 'gpt2-medium': (24, 16, 1024), 'gpt2-large': (36, 20, 1280),
              'gpt2-xl': (48, 25, 1600)}    # n_layer, n_head, n_embd


def rms_norm(x):
    return F.rms_norm(x, (x.shape[-1],))


def make_norm(config):
    if config.norm == 'rms':
        return nn.RMSNorm(config.n_embd, elementwise_affine=False)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def rotary(block_size, width, base=10000.0):
    """-> (2, block_size, 1, width): cos and signed sin of each position's angles, for rotate()."""
    angles = torch.outer(torch.arange(block_size), base ** (-torch.arange(0, width, 2) / width))
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), 1), torch.cat((sin, -sin), 1)))[:, :, None]


def rotate(x, rope):
    """x: (B, T, heads, D), each pair (x[i], x[i + D/2]) turned by its angle."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).type_as(x)


class KVCache:
    """
    Keys and values of every layer for a fixed number of rows, each at a position of its own, so
    that texts of different lengths decode side by side. What lies beyond pos is never read.
    """

    def __init__(self, config, rows, device='cpu', dtype=torch.float32):
        self.block_size = config.block_size     # and one slot more, for padding to be written to
        shape = (config.n_layer, rows, config.block_size + 1, config.n_kv_head,
                 config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.pos = torch.zeros(rows, device=device, dtype=torch.long)           # tokens held
        self.tail = torch.full((rows, config.ngrams - 1), -1, device=device)    # the last ids
        self.row = torch.arange(rows, device=device)[:, None]

    def part(self, first, last):
        """-> rows first .. last - 1 as a cache, in the same memory."""
        part = copy.copy(self)
        part.k, part.v = self.k[:, first:last], self.v[:, first:last]
        part.pos, part.tail = self.pos[first:last], self.tail[first:last]
        part.row = self.row[:last - first]
        return part

    def copy_row(self, source, target, count):
        """Let row target hold the first count tokens of row source."""
        for memory in self.k, self.v:
            memory[:, target, :count] = memory[:, source, :count]
        self.pos[target], self.tail[target] = count, self.tail[source]

    def cut(self, row, ids):
        """Let a row hold only its first len(ids) tokens, which are ids."""
        tail = [-1] * self.tail.shape[1] + ids
        self.pos[row] = len(ids)
        self.tail[row] = torch.tensor(tail[len(ids):], device=self.tail.device)

    def place(self, idx):
        """Find slots for idx: (B, T), -1 where a row has no token. -> their positions (B, T)"""
        B, T = idx.shape
        positions = self.pos[:, None] + torch.arange(T, device=idx.device)
        self.lengths, self.span, self.mask = (idx >= 0).sum(1), self.block_size, None
        if idx.device.type == 'cpu':    # elsewhere to look at positions is to wait for the device
            self.span = int((self.pos + self.lengths).max())
            if self.span > self.block_size:
                raise ValueError(f'{self.span} tokens are more than block_size={self.block_size}')
        if idx.device.type != 'cpu' or B * T > 1:   # else one query sees all that there is
            keys = torch.arange(self.span, device=idx.device)
            self.mask = positions[:, None, :, None] >= keys     # (B, 1, T, S)
        self.slots = positions.where(idx >= 0, self.block_size)
        return positions.clamp(max=self.block_size - 1)

    def extend(self, layer, k, v):
        """Write k, v: (B, T, G, D) into their slots. -> all in sight, (B, S, G, D) each"""
        self.k[layer].index_put_((self.row, self.slots), k)
        self.v[layer].index_put_((self.row, self.slots), v)
        return self.k[layer, :, :self.span], self.v[layer, :, :self.span]


class Attention(nn.Module):
    """Causal self-attention: the same lines for training, prefill and decoding."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, self.width = config, layer, config.n_embd // config.n_head
        heads = config.n_head + 2 * config.n_kv_head
        self.c_attn = nn.Linear(config.n_embd, heads * self.width, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, rope, cache):
        B, T, C = x.shape
        H, G = self.config.n_head, self.config.n_kv_head
        qk, v = self.c_attn(x).view(B, T, H + 2 * G, self.width).split((H + G, G), dim=2)
        if self.config.qk_norm:
            qk = rms_norm(qk)
        if rope is not None:
            qk = rotate(qk, rope)
        q, k = qk.split((H, G), dim=2)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)   # (B, H or G, T or S, D)
        if T == 1:  # heads that share a key are as many queries to one head: it is read once
            q = q.reshape(B, G, H // G, self.width)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if cache is None else cache.mask, is_causal=cache is None,
            dropout_p=self.config.dropout if self.training else 0.0, enable_gqa=q.shape[1] != G)
        y = self.c_proj(y.reshape(B, H, T, -1).transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.config.dropout, self.training)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation, self.dropout = ACTIVATIONS[config.activation], config.dropout

    def forward(self, x):
        x = self.c_proj(self.activation(self.c_fc(x)))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.attn = make_norm(config), Attention(config, layer)
        self.ln_2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x, rope, cache):
        x = x + self.attn(self.ln_1(x), rope, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        # GPT-2's names in nanoGPT's order, so that their weights and AdamW's state fit.
        parts = {'wte': nn.Embedding(config.rows, config.n_embd)}
        if config.position == 'learned':
            parts['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        if config.ngrams > 1:
            parts['ngram'] = nn.Embedding(config.ngram_rows, config.n_embd)
        parts['h'] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer = nn.ModuleDict(parts | {'ln_f': make_norm(config)})
        if config.x0:
            self.keep = nn.Parameter(torch.ones(config.n_layer))
            self.again = nn.Parameter(torch.zeros(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, config.rows, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight
        # A bias that is not learned: an id beyond the vocabulary has probability 0.
        no_token = torch.where(torch.arange(config.rows) < config.vocab_size, 0.0, -3e4)
        del self.lm_head.bias
        self.lm_head.register_buffer('bias', no_token, persistent=False)
        rope = rotary(config.block_size, config.n_embd // config.n_head)
        self.register_buffer('rope', rope if config.position == 'rope' else None, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal(0, 0.02), but what writes into the residual stream starts at zero or smaller."""
        zero = ('bias', 'c_proj.weight', 'lm_head.weight') if self.config.zero_init else 'bias'
        for name, p in self.named_parameters():
            if name.endswith(zero):
                p.zero_()
            elif name.endswith('c_proj.weight'):
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                p.normal_(std=0.02)

    def embed(self, idx, tail):
        """idx: (B, T), tail: (B, ngrams - 1) the ids before, -1 for none. -> (B, T, C), all ids"""
        (B, T), recent, key = idx.shape, torch.cat((tail, idx), dim=1), idx.clamp(min=0)
        x, slots = self.transformer.wte(key), []
        for n in range(1, self.config.ngrams):  # a multiplicative hash of the last n + 1 ids
            key = key * 1000003 + recent[:, tail.shape[1] - n:][:, :T] + 1
            slots.append((key * 2654435761 % 2 ** 40 >> 12) % self.config.ngram_rows)
        if slots:   # in one lookup: its backward fills one table of zeros, not one for each n
            slots = torch.stack(slots, dim=-1).flatten(0, 1)
            ngrams = F.embedding_bag(slots, self.transformer.ngram.weight, mode='sum')
            x = x + ngrams.view(B, T, -1)
        return x, recent

    def forward(self, idx, targets=None, weights=None, cache=None):
        """
        idx: (B, T) token ids -> logits, loss.

        Training: targets (B, T), -1 where a token is not in play, or (B, T, K), several for each;
        weights of their shape, 1 if None. Logits are (B, T, V); the loss is the SUM of weight *
        -log p(target) over what is in play, so that whoever adds up several batches divides once.
        Decoding: with a cache, each row of idx goes on where its row of the cache stands, and moves
        it along. Rows of different lengths are padded at the right with -1. Logits are (B, 1, V),
        of each row's last token. Raises ValueError for more than block_size tokens (CPU).
        """
        if cache is None:
            tail = idx.new_full((len(idx), self.config.ngrams - 1), -1)
            positions = torch.arange(idx.shape[1], device=idx.device)[None]
        else:
            tail, positions = cache.tail, cache.place(idx)
        x, recent = self.embed(idx, tail)
        rope = None if self.rope is None else self.rope[:, positions]
        if self.config.position == 'learned':
            x = x + self.transformer.wpe(positions)
        if self.config.norm == 'rms':
            x = rms_norm(x)     # the embedding starts small: so it learns fast
        x = F.dropout(x, self.config.dropout, self.training)
        x0 = x
        for i, block in enumerate(self.transformer.h):
            if self.config.x0:      # as in github.com/KellerJordan/modded-nanogpt
                x = self.keep[i] * x + self.again[i] * x0
            x = block(x, rope, cache)
        if cache is not None:
            last = torch.arange(tail.shape[1], device=idx.device) + cache.lengths[:, None]
            cache.pos += cache.lengths
            cache.tail.copy_(recent.gather(1, last))
            x = x[cache.row, (cache.lengths[:, None] - 1).clamp(min=0)]
        logits = self.lm_head(self.transformer.ln_f(x))
        loss = None
        if targets is not None:
            if targets.dim() == 2:
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                                       ignore_index=-1, reduction='none').view(targets.shape)
            else:
                loss = -logits.float().log_softmax(-1).gather(2, targets.clamp(min=0))
            in_play = targets >= 0
            if weights is not None:     # whatever w is, a token not in play changes nothing
                in_play = weights.where(in_play, 0)
            loss = (loss * in_play).sum()
        return logits[..., :self.config.vocab_size], loss

    def flops_per_token(self, T=None):
        """
        Forward and backward, by the PaLM convention (arXiv:2204.02311, appendix B): 6 per weight of
        a matrix product, 12 * n_layer * C * T for attention over rows of T (None: block_size).
        """
        linears = [m for m in self.modules() if isinstance(m, nn.Linear)]
        attention = 12 * self.config.n_layer * self.config.n_embd * (T or self.config.block_size)
        return 6 * sum(m.weight.numel() for m in linears) + attention

    def configure_optimizers(self, weight_decay, learning_rate, betas, muon_lr=0.0,
                             muon_dtype=torch.bfloat16):
        """
        AdamW for all (in nanoGPT's two groups), or with muon_lr: Muon for the layers' matrices and
        AdamW for the rest. -> list of optimizers, each with its peak rate in .peak_lr
        """
        hidden = [p for p in self.transformer.h.parameters() if muon_lr and p.dim() == 2]
        theirs = set(hidden)
        rest = [p for p in self.parameters() if p not in theirs]
        groups = [dict(params=[p for p in rest if p.dim() >= 2], weight_decay=weight_decay),
                  dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)]
        optimizers = [torch.optim.AdamW([g for g in groups if g['params']], lr=learning_rate,
                                        betas=betas, fused=rest[0].device.type in ('cuda', 'cpu'))]
        if hidden:
            optimizers.append(Muon(hidden, muon_lr, weight_decay=weight_decay, dtype=muon_dtype))
        for optimizer in optimizers:
            optimizer.peak_lr = optimizer.defaults['lr']
        return optimizers

    @classmethod
    def from_pretrained(cls, source, dropout=0.0):
        """OpenAI's GPT-2: one of GPT2_SIZES, or a folder with config.json and model.safetensors."""
        from safetensors.torch import load_file
        if source in GPT2_SIZES:
            from huggingface_hub import snapshot_download
            source = snapshot_download(f'openai-community/{source}',
                                       allow_patterns=['config.json', 'model.safetensors'])
        theirs = json.loads(Path(source, 'config.json').read_text(encoding='utf-8'))
        args = {name: theirs[name] for name in ('n_layer', 'n_head', 'n_embd', 'vocab_size')}
        args |= {'block_size': theirs['n_positions'], 'activation': 'gelu_tanh', 'dropout': dropout}
        model, weights = cls(GPTConfig(**{**GPT2, **args})), {}
        for name, p in load_file(Path(source, 'model.safetensors')).items():
            name = name.removeprefix('transformer.')
            if not name.endswith(('.attn.bias', '.attn.masked_bias')):      # the causal mask
                # GPT-2 keeps the matrices of its layers as (in, out), a Linear as (out, in).
                weights['transformer.' + name] = p.t() if name[0] == 'h' and p.dim() == 2 else p
        model.load_state_dict(weights | {'lm_head.weight': weights['transformer.wte.weight']})
        return model


@torch.no_grad()
def widened(model, vocab_size):
    """-> the same model with room for more tokens; each begins as the mean of those there are."""
    known, weights = model.config.vocab_size, model.state_dict()
    wider = GPT(replace(model.config, vocab_size=vocab_size))
    for name, rows in wider.state_dict().items():
        old = weights[name]
        if name in ('transformer.wte.weight', 'lm_head.weight'):
            rows[:known], rows[known:] = old[:known], old[:known].mean(0)
        else:
            rows.copy_(old)
    return wider


def orthogonalize(X, steps=5):
    """
    X: (matrices, rows <= columns) -> about U V^T for each X = U S V^T (singular values 0.7 to 1.2):
    Newton-Schulz on an odd quintic, with the coefficients of kellerjordan.github.io/posts/muon.
    """
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X


class Muon(torch.optim.Optimizer):
    """
    Momentum, orthogonalized: every direction of a matrix moves by the same amount (Jordan et al.
    2024). Matrices of one shape go through Newton-Schulz together, not one by one as in torch's.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.bfloat16):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group['params']:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                updates, tall = [], shape[0] > shape[1]
                for p in params:
                    if not self.state[p]:
                        self.state[p]['momentum'] = torch.zeros_like(p)
                    momentum = self.state[p]['momentum']
                    momentum.lerp_(p.grad, 1 - group['momentum'])
                    updates.append(p.grad.lerp(momentum, group['momentum']))    # Nesterov's
                X = torch.stack(updates).to(self.dtype)
                X = orthogonalize(X.mT).mT if tall else orthogonalize(X)
                rate = group['lr'] * max(1, shape[0] / shape[1]) ** 0.5     # the tall move further
                for p, update in zip(params, X, strict=True):
                    p.mul_(1 - group['lr'] * group['weight_decay']).add_(update, alpha=-rate)
