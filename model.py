"""
A GPT, from top to bottom: norm, rotary positions, attention with its KV cache, MLP, block, the model, its optimizers.

One config spans two families. The defaults are the modern one (RMSNorm, rotary positions, QK-norm, ReLU^2, grouped-query
heads, untied head, zero-initialized projections); `GPT2` below is what to change to get GPT-2.

Shapes: B rows, T tokens a row, C = n_embd, H query heads, G key and value heads, D = C / H, V vocabulary, S = keys in sight.
"""
import json
import math
import os
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int = 1024     # the longest context, in tokens
    vocab_size: int = 50257    # ids 0 .. vocab_size-1 are tokens; the tables may have more rows, see vocab_multiple
    n_layer: int = 12
    n_head: int = 6            # fewer, wider heads than GPT-2's: as good, and cheaper on every device
    n_kv_head: int = 0         # key and value heads, shared by groups of query heads (arXiv:2305.13245); 0: n_head
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False         # biases in Linears and LayerNorms, as in GPT-2
    norm: str = 'rms'          # 'rms' (arXiv:1910.07467, no gain) or 'layer'
    position: str = 'rope'     # 'rope' (arXiv:2104.09864) or 'learned'
    qk_norm: bool = True       # normalize queries and keys (arXiv:2302.05442)
    activation: str = 'relu2'  # 'relu2' (arXiv:2109.08668), 'gelu' or 'gelu_tanh' (OpenAI's GPT-2)
    tied: bool = False         # one table for the embedding and the head
    zero_init: bool = True     # projections into the residual stream and the head start at zero
    ngrams: int = 1            # embed the last 2 .. ngrams tokens too, hashed into one table (arXiv:2501.16975)
    ngram_rows: int = 16384    # rows of that table
    vocab_multiple: int = 64   # rows of the tables are rounded up to this; a matrix product likes round sizes

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_embd % self.n_head or (self.position == 'rope' and self.n_embd // self.n_head % 2):
            raise ValueError(f'n_embd = {self.n_embd} does not divide into n_head = {self.n_head} heads of an even width')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head = {self.n_head} does not divide into groups for n_kv_head = {self.n_kv_head}')
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} = {getattr(self, name)!r}: choose one of {", ".join(allowed)}')

    @property
    def rows(self):
        """Rows of the token tables: vocab_size rounded up."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


def relu2(x):
    x = F.relu(x)
    return x * x    # not x.square(): on a CPU its backward is a call of pow() per element, together 7 times slower


ACTIVATIONS = {
    'relu2': relu2,
    'gelu': F.gelu,
    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),
}
CHOICES = {'norm': ('rms', 'layer'), 'position': ('rope', 'learned'), 'activation': tuple(ACTIVATIONS)}

GPT2_SIZES = {'gpt2': (12, 12, 768), 'gpt2-medium': (24, 16, 1024), 'gpt2-large': (36, 20, 1280),
              'gpt2-xl': (48, 25, 1600)}     # n_layer, n_head, n_embd

# What turns the modern default into GPT-2 (nanoGPT's flavour; OpenAI's weights want 'gelu_tanh').
GPT2 = dict(bias=True, norm='layer', position='learned', qk_norm=False, activation='gelu', tied=True, zero_init=False,
            vocab_multiple=1)


class Norm(nn.Module):
    """x: (..., C) -> (..., C), brought to unit root-mean-square ('rms', no parameters) or LayerNorm with a gain."""

    def __init__(self, config):
        super().__init__()
        self.eps = None if config.norm == 'rms' else 1e-5
        self.weight = nn.Parameter(torch.ones(config.n_embd)) if config.norm == 'layer' else None
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.norm == 'layer' and config.bias else None

    def forward(self, x):
        if self.weight is None:
            return F.rms_norm(x, x.shape[-1:])
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


def rotary(positions, width, base=10000.0):
    """positions: (B or 1, T) -> cos, sin: (B or 1, T, 1, width/2), the angles of rotary embeddings (arXiv:2104.09864)."""
    frequencies = base ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    angles = positions[:, :, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """x: (B, T, heads, D), each pair (x1[i], x2[i]) turned by its angle."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).type_as(x)


class KVCache:
    """
    Keys and values of every layer for a fixed number of rows, and how many tokens each row holds.

    Rows are independent: each has its own position, so prompts of different lengths decode side by side. What lies
    beyond pos is never read. Slot block_size is where padding is written. tail holds each row's last ids, for n-grams.
    """

    def __init__(self, config, rows, device='cpu', dtype=torch.float32):
        shape = (config.n_layer, rows, config.block_size + 1, config.n_kv_head, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.pos = torch.zeros(rows, device=device, dtype=torch.long)
        self.tail = torch.full((rows, config.ngrams - 1), -1, device=device)
        self.index = torch.arange(rows, device=device)[:, None]

    def reset(self, row):
        self.pos[row] = 0
        self.tail[row] = -1

    def extend(self, layer, k, v, slots, span):
        """Write k, v: (B, T, G, D) into slots: (B, T) and return the first span of all, (B, span, G, D) each."""
        self.k[layer].index_put_((self.index, slots), k)
        self.v[layer].index_put_((self.index, slots), v)
        return self.k[layer, :, :span], self.v[layer, :, :span]


@dataclass
class Where:
    """What every layer needs to know about the tokens of this pass: worked out once, in GPT.forward."""
    positions: torch.Tensor            # (B or 1, T): each token's place in its row
    rope: tuple = None                 # cos, sin
    mask: torch.Tensor = None          # (B, 1, T, S): which keys a query sees; None: all (one query), or causal
    cache: KVCache = None
    slots: torch.Tensor = None         # (B, T): where in the cache these tokens go
    span: int = 0                      # S: how much of the cache to look at


class Attention(nn.Module):
    """Causal self-attention; with a cache, the same lines serve prefill and decoding."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.n_head, self.n_kv_head, self.width = config.n_head, config.n_kv_head, config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.width, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, where):
        B, T, C = x.shape
        qk, v = self.c_attn(x).split(((self.n_head + self.n_kv_head) * self.width, self.n_kv_head * self.width), dim=2)
        qk = qk.view(B, T, self.n_head + self.n_kv_head, self.width)
        v = v.view(B, T, self.n_kv_head, self.width)
        if self.config.qk_norm:
            qk = F.rms_norm(qk, (self.width,))
        if where.rope is not None:
            qk = rotate(qk, *where.rope)
        q, k = qk.split((self.n_head, self.n_kv_head), dim=2)
        if where.cache is not None:
            k, v = where.cache.extend(self.layer, k, v, where.slots, where.span)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)   # (B, H, T, D), (B, G, S, D) twice
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=where.mask, is_causal=where.cache is None,
            dropout_p=self.config.dropout if self.training else 0.0, enable_gqa=self.n_head != self.n_kv_head)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.config.dropout, self.training)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation, self.dropout = ACTIVATIONS[config.activation], config.dropout

    def forward(self, x):
        return F.dropout(self.c_proj(self.activation(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.attn = Norm(config), Attention(config, layer)
        self.ln_2, self.mlp = Norm(config), MLP(config)

    def forward(self, x, where):
        x = x + self.attn(self.ln_1(x), where)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(      # GPT-2's and nanoGPT's names, so that their weights fit
            wte=nn.Embedding(config.rows, config.n_embd),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=Norm(config)))
        if config.position == 'learned':
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        if config.ngrams > 1:
            self.transformer.ngram = nn.Embedding(config.ngram_rows, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.rows, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight
        # A bias that no logit of an id beyond the vocabulary survives, in training and sampling alike.
        no_token = torch.where(torch.arange(config.rows) < config.vocab_size, 0.0, -3e4)
        self.register_buffer('no_token', no_token, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal(0, 0.02) as GPT-2, except: what writes into the residual stream starts at zero, or scaled down."""
        config = self.config
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                p.zero_()
            elif name.endswith('c_proj.weight'):
                p.zero_() if config.zero_init else p.normal_(std=0.02 / math.sqrt(2 * config.n_layer))
            elif name == 'lm_head.weight' and config.zero_init:
                p.zero_()
            elif p.dim() == 2:
                p.normal_(std=0.02)

    def forward(self, idx, targets=None, weights=None, cache=None):
        """
        idx: (B, T) token ids -> logits, loss.

        Training: targets (B, T), -1 where a token is not in play; weights (B, T), 1 if None. Logits are (B, T, V) and the
        loss is the SUM of weight * -log p(target) over the tokens in play: whoever adds up several batches divides once.
        Decoding: with a cache each row of idx goes on where its row of the cache stands, and the cache moves along. Rows
        may be of different lengths, padded at the right with -1. Logits are (B, 1, V), of each row's last token.
        """
        B, T = idx.shape
        tail = idx.new_full((B, self.config.ngrams - 1), -1) if cache is None else cache.tail
        recent = torch.cat((tail, idx), dim=1)
        if cache is None:
            where = Where(torch.arange(T, device=idx.device)[None])
        else:
            positions, lengths = cache.pos[:, None] + torch.arange(T, device=idx.device), (idx >= 0).sum(1)
            span, alone = self.config.block_size, False
            if idx.device.type == 'cpu':            # elsewhere a look at the positions would wait for the device
                span, alone = int((cache.pos + lengths).max()), B == T == 1
                if span > self.config.block_size:
                    raise ValueError(f'{span} tokens in a row do not fit into block_size = {self.config.block_size}')
            mask = None if alone else positions[:, None, :, None] >= torch.arange(span, device=idx.device)
            slots = positions.where(idx >= 0, self.config.block_size)
            where = Where(positions.clamp(max=self.config.block_size - 1), None, mask, cache, slots, span)
            idx = idx.clamp(min=0)
        x, key = self.transformer.wte(idx), idx
        for n in range(1, self.config.ngrams):      # a multiplicative hash of the last n + 1 ids; -1: before the row
            key = key * 1000003 + recent[:, tail.shape[1] - n:][:, :T] + 1
            x = x + self.transformer.ngram((key * 2654435761 % 2 ** 40 >> 12) % self.config.ngram_rows)
        if self.config.position == 'learned':
            x = x + self.transformer.wpe(where.positions)
        else:
            where.rope = rotary(where.positions, self.config.n_embd // self.config.n_head)
        if self.config.norm == 'rms':
            x = F.rms_norm(x, x.shape[-1:])         # the embedding starts small: normalized, it learns fast
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x, where)
        if cache is not None:
            cache.pos += lengths
            cache.tail = recent.gather(1, lengths[:, None] + torch.arange(tail.shape[1], device=idx.device))
            x = x.gather(1, (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[2]))
        logits = F.linear(self.transformer.ln_f(x), self.lm_head.weight, self.no_token)
        loss = None
        if targets is not None:
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1, reduction='none')
            loss = (losses if weights is None else losses * weights.flatten()).sum()
        return logits[..., :self.config.vocab_size], loss

    def configure_optimizers(self, weight_decay, learning_rate, betas, muon_lr=0.0, muon_dtype=torch.bfloat16):
        """
        AdamW for all (two groups, nanoGPT's order), or with muon_lr Muon for the layers' matrices and AdamW for the rest.
        -> a list of optimizers, each with its peak rate in .peak_lr, for a schedule to scale.
        """
        params = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        hidden = [p for name, p in params if muon_lr and '.h.' in name and p.dim() == 2]
        taken = set(map(id, hidden))
        rest = [p for name, p in params if id(p) not in taken]
        groups = [dict(params=[p for p in rest if p.dim() >= 2], weight_decay=weight_decay),
                  dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)]
        fused = rest[0].device.type in ('cuda', 'cpu')
        optimizers = [torch.optim.AdamW([g for g in groups if g['params']], lr=learning_rate, betas=betas, fused=fused)]
        if hidden:
            optimizers.append(Muon(hidden, lr=muon_lr, weight_decay=weight_decay, dtype=muon_dtype))
        for optimizer in optimizers:
            optimizer.peak_lr = optimizer.defaults['lr']
        return optimizers

    def set_dropout(self, dropout):
        for module in self.modules():
            if hasattr(module, 'dropout'):
                module.dropout = dropout

    @classmethod
    def from_pretrained(cls, source):
        """OpenAI's GPT-2: source is one of GPT2_SIZES, or a folder with config.json and model.safetensors."""
        from huggingface_hub import hf_hub_download
        from safetensors.torch import load_file
        path = source
        if source in GPT2_SIZES:
            path = os.path.dirname(hf_hub_download(f'openai-community/{source}', 'config.json'))
            hf_hub_download(f'openai-community/{source}', 'model.safetensors')
        with open(os.path.join(path, 'config.json'), encoding='utf-8') as file:
            theirs = json.load(file)
        model = cls(GPTConfig(**{**GPT2, 'activation': 'gelu_tanh'}, n_layer=theirs['n_layer'], n_head=theirs['n_head'],
                              n_embd=theirs['n_embd'], block_size=theirs['n_positions'], vocab_size=theirs['vocab_size']))
        weights = {}
        for name, p in load_file(os.path.join(path, 'model.safetensors')).items():
            if name.endswith(('.attn.bias', '.attn.masked_bias')):      # the causal mask
                continue
            # GPT-2 keeps its matrices as (in, out), a Linear as (out, in).
            transposed = p.dim() == 2 and '.h.' in '.' + name
            weights['transformer.' + name.removeprefix('transformer.')] = p.t() if transposed else p
        weights['lm_head.weight'] = weights['transformer.wte.weight']
        model.load_state_dict(weights)
        return model

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Forward and backward, by the PaLM convention (arXiv:2204.02311, appendix B): 6 per weight of a matrix product,
        and 12 * n_layer * C * T for attention over a full block. Tables that are only looked up cost nothing."""
        c = self.config
        products = self.lm_head.weight.numel() + sum(m.weight.numel() for b in self.transformer.h
                                                     for m in b.modules() if isinstance(m, nn.Linear))
        return 6 * products + 12 * c.n_layer * c.n_embd * c.block_size


def orthogonalize(X, steps=5):
    """
    X: (matrices, rows <= columns) -> about U V^T for each, where X = U S V^T (singular values land in about 0.7 .. 1.2).
    Newton-Schulz iteration on an odd quintic, coefficients by Keller Jordan (kellerjordan.github.io/posts/muon).
    """
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X


class Muon(torch.optim.Optimizer):
    """
    Momentum, orthogonalized: every direction of a weight matrix moves by the same amount (Jordan et al. 2024).
    Matrices of one shape go through Newton-Schulz together, which is faster than torch.optim.Muon's one by one.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.bfloat16):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group['params']:
                shapes.setdefault(tuple(sorted(p.shape)), []).append(p)
            for params in shapes.values():
                updates = []
                for p in params:
                    momentum = self.state[p].setdefault('momentum', torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group['momentum'])
                    update = p.grad.lerp(momentum, group['momentum'])       # Nesterov's look ahead
                    updates.append((update.mT if p.shape[0] > p.shape[1] else update).to(self.dtype))
                for p, update in zip(params, orthogonalize(torch.stack(updates))):
                    update = update.mT if p.shape[0] > p.shape[1] else update
                    scale = max(1, p.shape[0] / p.shape[1]) ** 0.5          # a tall matrix may move further
                    p.mul_(1 - group['lr'] * group['weight_decay']).add_(update, alpha=-group['lr'] * scale)
