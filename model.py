"""
A GPT from top to bottom: config, rotary positions, attention, MLP, block, model, loss, optimizers.
Its defaults are a modern GPT; other settings turn it into GPT-2, Llama, Mistral, Qwen or Mixtral.

Shapes: B rows of T tokens, C = n_embd, H query and G key heads, D = head_width, V ids, S keys.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    vocab_size: int            # the data's: ids 0 .. vocab_size-1; the tables may have more rows
    block_size: int = 1024     # the longest context, in tokens; from 1 to 1e8
    n_layer: int = 12          # blocks; from 1 to 1e4
    n_head: int = 12           # query heads; fewer, wider ones are cheaper; from 1 to 1e4
    n_kv_head: int = 0         # key and value heads, fewer for grouped ones; 0: n_head; at least 0
    n_embd: int = 768          # width; from 1 to 1e7
    head_width: int = 0        # of a head; 0: n_embd / n_head; at least 0
    n_inner: int = 0           # width of an MLP; 0: n_embd times the activation's; at least 0
    n_expert: int = 0          # MLPs that a token may go to (extras/experts.py); 0: one; at least 0
    n_expert_active: int = 2   # of them, those it goes to; at least 1
    n_expert_shared: int = 0   # MLPs beside them, for all tokens; at least 0
    window_pattern: str = 'L'  # L, SL, SSL or SSSL, repeated: S layers see a part; not the last one
    short_window: int = 256    # tokens that S layers see (extras/windows.py); at least 1
    dropout: float = 0.0       # for many epochs over little data; from 0 to 0.99
    bias: bool = False         # biases in Linears and LayerNorms, as in GPT-2
    qkv_bias: bool = False     # biases of queries, keys and values alone, as in Qwen2
    norm: str = 'rms'          # rms (arXiv:1910.07467), rms_gain (with a learned gain) or layer
    norm_eps: float = 0.0      # what a norm adds to a variance; 0: torch's; from 0 to 1
    position: str = 'rope'     # rope (arXiv:2104.09864) or learned
    rope_base: float = 10000.0  # of its angles; at least 1
    rope_factor: float = 1.0   # stretches the slow ones, as in Llama 3.1; at least 1
    qk_norm: bool = True       # normalize queries and keys (arXiv:2302.05442)
    qk_gain: bool = False      # and multiply them by learned gains, as in Qwen3
    activation: str = 'relu2'  # relu2 (arXiv:2109.08668), swiglu (2002.05202), gelu, gelu_tanh
    tied: bool = False         # one table for the embedding and the head
    zero_init: bool = True     # projections into the residual stream, and the head, start at zero
    x0: bool = True            # each block sees the embedding again, with a learned weight
    ngrams: int = 1            # embed the last 2 .. ngrams ids too (arXiv:2501.16975); from 1 to 64
    ngram_rows: int = 32768    # rows of the table that they are hashed into; from 1 to 1e9
    vocab_multiple: int = 64   # token tables have a multiple of this many rows; at least 1

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        if (self.head_width or self.n_embd / self.n_head) % 2:      # rope turns pairs
            raise ValueError(f'n_embd = {self.n_embd} does not divide into n_head = {self.n_head} '
                             'heads of an even width')
        self.head_width = self.head_width or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head={self.n_head}: not a multiple of n_kv_head={self.n_kv_head}')
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} = {getattr(self, name)!r}: choose one of {allowed}')

    @property
    def table_rows(self):
        """Rows of the token tables: vocab_size, rounded up."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def windows(self):
        """Of each layer, the number of tokens that it sees."""
        kinds = (self.window_pattern * self.n_layer)[:self.n_layer - 1] + 'L'
        short = min(self.short_window, self.block_size)
        return [short if kind == 'S' else self.block_size for kind in kinds]


def relu2(x):
    x = F.relu(x)
    return x * x    # not x.square(): its backward is a pow() per element, 7 times slower on a CPU


def swiglu(x):
    gate, x = x.chunk(2, dim=-1)
    return F.silu(gate) * x


# name: function, width of its output in n_embd, how many times as wide its input is (2 if gated)
ACTIVATIONS = {'relu2': (relu2, 4, 1), 'gelu': (F.gelu, 4, 1), 'gelu_tanh': (nn.GELU('tanh'), 4, 1),
               'swiglu': (swiglu, 8 / 3, 2)}
NORMS = {'rms': lambda c: nn.RMSNorm(c.n_embd, c.norm_eps or None, elementwise_affine=False),
         'rms_gain': lambda c: nn.RMSNorm(c.n_embd, c.norm_eps or None),
         'layer': lambda c: nn.LayerNorm(c.n_embd, c.norm_eps or 1e-5, bias=c.bias)}
CHOICES = {'norm': tuple(NORMS), 'position': ('rope', 'learned'), 'activation': tuple(ACTIVATIONS),
           'window_pattern': ('L', 'SL', 'SSL', 'SSSL')}
# What turns the modern default into GPT-2 (nanoGPT's; OpenAI's weights want gelu_tanh).
GPT2 = dict(bias=True, norm='layer', position='learned', qk_norm=False, activation='gelu',
            tied=True, zero_init=False, x0=False, vocab_multiple=1)


def rotary(config):
    """-> (2, block_size, 1, D): cos and signed sin of each position's angles, for rotate()."""
    speeds = config.rope_base ** (-torch.arange(0, config.head_width, 2) / config.head_width)
    if config.rope_factor > 1:  # of what turns less than 4 times in 8,192 tokens; all, if once
        kept = (8192 * speeds / (2 * math.pi) - 1).div(3).clamp(0, 1)
        speeds = speeds * (kept + (1 - kept) / config.rope_factor)
    angles = torch.outer(torch.arange(config.block_size), speeds)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), 1), torch.cat((sin, -sin), 1)))[:, :, None]


def rotate(x, rope):
    """x: (B, T, heads, D), each pair (x[i], x[i + D/2]) turned by its angle."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).type_as(x)


@dataclass
class Context:
    """Where the tokens of a batch stand and which keys each may see: one for all blocks."""
    positions: torch.Tensor    # (B or 1, T), of the tokens, which are the queries
    keys: torch.Tensor         # (S), positions of the keys
    tail: torch.Tensor         # (B, ngrams - 1), the ids before idx, -1 for none
    mask: torch.Tensor = None  # (B, 1, T, S), True where a query may see a key; None: up to its own
    rope: torch.Tensor = None  # (2, B or 1, T, 1, D), the angles of these positions for rotate()
    attend: object = F.scaled_dot_product_attention     # what reads them; see extras/windows.py
    cache: object = None       # where keys and values of earlier tokens are kept; see sample.py


class Attention(nn.Module):
    """Causal self-attention: the same lines for training, prefill and decoding."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, self.width = config, layer, config.head_width
        heads, bias = config.n_head + 2 * config.n_kv_head, config.bias or config.qkv_bias
        self.c_attn = nn.Linear(config.n_embd, heads * self.width, bias)
        self.c_proj = nn.Linear(config.n_head * self.width, config.n_embd, bias=config.bias)
        if config.qk_gain:
            self.q_gain, self.k_gain = (nn.Parameter(torch.ones(self.width)) for _ in range(2))

    def forward(self, x, context):
        B, T, _ = x.shape
        H, G = self.config.n_head, self.config.n_kv_head
        qk, v = self.c_attn(x).view(B, T, H + 2 * G, self.width).split((H + G, G), dim=2)
        if self.config.qk_norm:
            qk = F.rms_norm(qk, (self.width,), eps=self.config.norm_eps or None)
        if self.config.qk_gain:
            qk = qk * torch.cat((self.q_gain.expand(H, -1), self.k_gain.expand(G, -1)))
        if context.rope is not None:
            qk = rotate(qk, context.rope)
        q, k = qk.split((H, G), dim=2)
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)   # (B, H or G, T or S, D)
        if T == 1:  # heads that share a key become queries of one head, so that it is read once
            q = q.reshape(B, G, H // G, self.width)
        y = context.attend(
            q, k, v, attn_mask=context.mask, is_causal=context.mask is None and T > 1,
            dropout_p=self.config.dropout * self.training, enable_gqa=q.shape[1] != G)
        y = self.c_proj(y.reshape(B, H, T, -1).transpose(1, 2).flatten(2))
        return F.dropout(y, self.config.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation, width, inputs = ACTIVATIONS[config.activation]
        hidden = config.n_inner or int(width * config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, inputs * hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(self.activation(self.c_fc(x)))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.attn = NORMS[config.norm](config), Attention(config, layer)
        self.ln_2, self.mlp = NORMS[config.norm](config), MLP(config)
        if config.n_expert:
            from extras.experts import Experts
            self.mlp = Experts(self.mlp, config)

    def forward(self, x, context):
        x = x + self.attn(self.ln_1(x), context)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        # GPT-2's names in nanoGPT's order, so that their weights and AdamW's state fit.
        parts = {'wte': nn.Embedding(config.table_rows, config.n_embd)}
        if config.position == 'learned':
            parts['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        if config.ngrams > 1:
            parts['ngram'] = nn.Embedding(config.ngram_rows, config.n_embd)
        parts['h'] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer = nn.ModuleDict(parts | {'ln_f': NORMS[config.norm](config)})
        if config.x0:
            self.keep = nn.Parameter(torch.ones(config.n_layer))
            self.again = nn.Parameter(torch.zeros(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, config.table_rows, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight
        self.register_buffer('rope', rotary(config), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal(0, 0.02), but what writes into the residual stream starts at 0 or narrower."""
        zero = ('bias', 'c_proj.weight', 'lm_head.weight') if self.config.zero_init else 'bias'
        for name, p in self.named_parameters():
            if name.endswith(zero):
                p.zero_()
            elif p.dim() >= 2:
                writers = 2 * self.config.n_layer if name.endswith('c_proj.weight') else 1
                p.normal_(std=0.02 / math.sqrt(writers))

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

    def make_context(self, idx, cache):
        """Positions and mask for idx: (B, T), which goes on where cache (None: nothing) ends."""
        if cache is None:
            positions = torch.arange(idx.shape[1], device=idx.device)[None]
            tail = idx.new_full((len(idx), self.config.ngrams - 1), -1)
            context = Context(positions, positions[0], tail)
        else:
            positions, keys = cache.place(idx)
            most = self.config.block_size - 1
            context = Context(positions.clamp(max=most), keys, cache.tail, cache=cache)
            if idx.device.type != 'cpu' or idx.numel() > 1:     # else one query, which sees all
                context.mask = positions[:, None, :, None] >= keys      # (B, 1, T, S)
        if self.config.position == 'rope':
            context.rope = self.rope[:, context.positions]
        return context

    def forward(self, idx, targets=None, weights=None, cache=None):
        """idx: (B, T) token ids -> logits, loss.
        Training: targets (B, T), -1 where a token is not in play, or (B, T, K), several for each;
        weights of their shape, 1 if None. Logits are (B, T, V); the loss is the SUM, not the mean,
        of weight * -log p(target) over what is in play.
        Decoding: with a cache, each row of idx, padded at the right with -1, continues its row.
        Logits are (B, 1, V), of each row's last token. On a CPU, ValueError beyond block_size."""
        context = self.make_context(idx, cache)
        contexts = [context] * self.config.n_layer
        if 'S' in self.config.window_pattern:
            from extras.windows import contexts_of
            contexts = contexts_of(self.config, context)
        x, recent = self.embed(idx, context.tail)
        if self.config.position == 'learned':
            x = x + self.transformer.wpe(context.positions)
        if self.config.norm == 'rms':
            x = F.rms_norm(x, (x.shape[-1],))   # the embedding starts small, so that it learns fast
        x0 = x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.transformer.h):
            if self.config.x0:      # as in github.com/KellerJordan/modded-nanogpt
                x = self.keep[i] * x + self.again[i] * x0
            x = block(x, contexts[i])
        if cache is not None:
            x = cache.advance(x, recent)    # (B, 1, C), each row's last token
        logits = self.lm_head(self.transformer.ln_f(x))[..., :self.config.vocab_size]
        loss = None if targets is None else weighted_loss(logits, targets, weights)
        return logits, loss

    def parameter_groups(self, muon):
        """-> the layers' matrices if muon is on (else none), all other matrices, the rest"""
        groups = [], [], []
        for name, p in ((name, p) for name, p in self.named_parameters() if p.requires_grad):
            hidden = muon and name.startswith('transformer.h.') and '.router.' not in name
            groups[2 if p.dim() < 2 else 0 if hidden else 1].append(p)
        return groups

    def configure_optimizers(self, weight_decay, learning_rate, betas, muon_lr=0.0,
                             muon_dtype=torch.bfloat16):
        """AdamW (in nanoGPT's two groups), with muon_lr Muon for the layers' matrices. -> a list"""
        hidden, matrices, rest = self.parameter_groups(muon_lr > 0)
        groups = [dict(params=matrices, weight_decay=weight_decay),
                  dict(params=rest, weight_decay=0.0)]
        optimizers = [torch.optim.AdamW([g for g in groups if g['params']], learning_rate, betas,
                                        fused=matrices[0].device.type in ('cuda', 'cpu'))]
        if hidden:
            optimizers.append(Muon(hidden, muon_lr, weight_decay=weight_decay, dtype=muon_dtype))
        return optimizers


def token_log_probs(logits, targets):
    """logits: (B, T, V), targets: (B, T) or (B, T, K), -1 where not in play
    -> log p(target), of targets' shape, 0 where not in play"""
    if targets.dim() == 2:
        return -F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1,
                                reduction='none').view(targets.shape)
    log_p = logits.float().log_softmax(-1).gather(2, targets.clamp(min=0))
    return log_p.where(targets >= 0, 0)


def weighted_loss(logits, targets, weights=None):
    """-> minus the sum of w * log p(target) over the targets in play: the loss of every stage"""
    log_p = token_log_probs(logits, targets)    # 0 where not in play, whatever w is there
    return -(log_p if weights is None else weights.where(targets >= 0, 0) * log_p).sum()


def orthogonalize(X, steps=5):
    """X: (matrices, rows <= columns) -> about U V^T of each U S V^T (singular values 0.7 to 1.2) by
    Newton-Schulz on an odd quintic, with the coefficients of kellerjordan.github.io/posts/muon."""
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: every direction of a matrix moves by the same amount (Jordan et al.
    2024). Matrices of one shape go through Newton-Schulz together, not one by one as in torch's."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.bfloat16):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype, self.orthogonalize = dtype, orthogonalize

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes = {}
            for p in group['params']:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                updates, tall = [], shape[-2] > shape[-1]
                for p in params:
                    if not self.state[p]:
                        self.state[p]['momentum'] = torch.zeros_like(p)
                    momentum = self.state[p]['momentum']
                    momentum.lerp_(p.grad, 1 - group['momentum'])
                    updates.append(p.grad.lerp(momentum, group['momentum']))    # Nesterov's
                X = torch.stack(updates).to(self.dtype).flatten(0, -3)  # of experts, all
                X = self.orthogonalize(X.mT).mT if tall else self.orthogonalize(X)
                rate = group['lr'] * max(1, shape[-2] / shape[-1]) ** 0.5   # tall ones move further
                for p, update in zip(params, X.view(-1, *shape), strict=True):
                    p.mul_(1 - group['lr'] * group['weight_decay']).add_(update, alpha=-rate)
