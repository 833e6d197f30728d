"""A masked diffusion language model (MDM) with a sink token, in one file. Read it from top to bottom.

FORWARD PROCESS q(xt | x0). At noise level t in (0, 1] each token of a text x0 becomes [MASK] with probability
t, independently of the others:
    q(xt_i | x0_i) = t if xt_i = [MASK],  1 - t if xt_i = x0_i

REVERSE PROCESS. The model sees xt and predicts the clean token at every hidden position, all at once. To go
from level t to a lower level s, each hidden token is revealed with probability (t - s) / t, as a draw from
that prediction, and then stays. `generate` starts from [MASK] everywhere and walks t from 1 to 0.

LOSS. Classify the hidden tokens, weighted by 1 / p_mask, the inverse of the probability of being hidden:
    loss = E_t E_q [ sum over hidden i of  -log p(x0_i | xt) / t ]  >=  -log p(x0)
Without the weight, a text at t = 0.9 would count nine times as much as one at t = 0.1, because nine times as
many of its tokens are in the sum. With it every level counts the same, and the mean over t bounds -log p(x0).

NO TIME INPUT. The network is not told t. The share of [MASK] in xt shows it already, and the best prediction
of a hidden token given the visible ones does not depend on t: q hides tokens without looking at them.

THE SINK (arXiv 2601.19657). Softmax attention must put its mass somewhere, even when a head has nothing to
look for. The paper argues that some token with a small value vector then becomes an attention sink, that in
an MDM this sink moves as the text is denoised, and that a model does better with a sink that stays: one more
token, which attends only to itself and which all may attend to:
    M_ij = -inf if i is a sink and j != i, else 0;  attention = softmax(q k^T / sqrt(d) + M) v   (Eq. 5-6)
It sees nothing else, so its hidden state in each layer is a learned constant, the same for all texts and t.

NAMES. x0 clean, xt partly hidden tokens (B, T); t noise level; p_mask probability to be hidden; masked = is
hidden, maskable = may be hidden; B batch, T content tokens, S = T + n_sink, C = n_embd, H heads, V vocabulary
"""

import math
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# SMDM's scaling study, by non-embedding parameters: (n_layer, n_head, n_embd); mlp_hidden of 75M is 1600
PRESETS = {
    "6M": (6, 4, 256), "19M": (8, 6, 384), "34M": (8, 8, 512), "48M": (9, 9, 576), "66M": (10, 10, 640),
    "75M": (16, 8, 640), "85M": (13, 10, 640), "113M": (12, 12, 768), "142M": (15, 12, 768),
    "170M": (18, 12, 768), "180M": (14, 14, 896), "206M": (16, 14, 896), "231M": (18, 14, 896),
    "268M": (16, 16, 1024), "302M": (18, 16, 1024), "336M": (20, 16, 1024), "472M": (18, 10, 1280),
    "551M": (21, 10, 1280), "571M": (18, 11, 1408), "629M": (24, 10, 1280), "666M": (21, 11, 1408),
    "717M": (19, 12, 1536), "761M": (24, 11, 1408), "831M": (22, 12, 1536), "944M": (25, 12, 1536),
    "1028M": (20, 14, 1792), "1233M": (24, 14, 1792), "1476M": (22, 16, 2048), "1678M": (25, 16, 2048),
    "2121M": (28, 17, 2176),
}  # fmt: skip
LOGITS_AT_ONCE = 2**25  # in sampling and scoring: 128 MB of float32


@dataclass
class MDMConfig:
    block_size: int = 2048  # content tokens; the sinks come on top
    vocab_size: int = 32000  # real tokens = rows of the output head
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 256
    mlp_hidden: int | None = None  # None: 4 * n_embd
    n_sink: int = 1  # 0 = vanilla MDM, 1 = the paper's sink token
    sink_position: str = "front"  # rotary positions of the sinks: front or end of the sequence
    sink_zero_value: bool = False  # force the sinks' value vectors to zero (the paper's Table 5)
    sink_attends_all: bool = False  # the sinks attend to all tokens: registers (arXiv 2309.16588)
    gated_attention: bool = False  # multiply the attention output by sigmoid(X W_g) (arXiv 2505.06708)
    sink_attention: str = "mask"  # mask (Eq. 5-6 literally) or split (the same result without a mask)
    shift: bool = False  # position i is predicted from the state of position i - 1, as in a causal model
    n_kv_head: int | None = None  # heads of keys and values, each for a group of queries; None: n_head
    qkv_bias: bool = False  # causal models set the last five: see extras/convert.py
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        self.mlp_hidden = self.mlp_hidden or 4 * self.n_embd
        self.n_kv_head = self.n_kv_head or self.n_head
        sizes = self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_kv_head, self.n_embd
        if min(sizes) < 1 or self.n_sink < 0:
            raise ValueError(f"sizes must be at least 1, and n_sink at least 0; got {self}")
        if self.n_embd % (2 * self.n_head) or self.n_head % self.n_kv_head:
            raise ValueError(f"n_embd / n_head must be even, n_head a multiple of n_kv_head; got {self}")
        if self.sink_position not in ("front", "end") or self.sink_attention not in ("mask", "split"):
            raise ValueError(f"wanted sink_position front or end, sink_attention mask or split; got {self}")

    @property
    def mask_id(self) -> int:
        return self.vocab_size  # last row of the embedding; the head has no such row and never predicts it

    @classmethod
    def preset(cls, size: str, **overrides) -> "MDMConfig":
        """A size of the table above, such as '472M'. Raises ValueError for a size that is not in it."""
        if size not in PRESETS:
            raise ValueError(f"no preset {size!r}; there are {', '.join(PRESETS)}")
        n_layer, n_head, n_embd = PRESETS[size]
        mlp_hidden = 1600 if size == "75M" else None
        return cls(n_layer=n_layer, n_head=n_head, n_embd=n_embd, mlp_hidden=mlp_hidden, **overrides)

    def table_params(self) -> int:
        """Non-embedding parameters of the vanilla model of this shape, as the table counts them."""
        attention = 2 * self.n_embd**2 * (self.n_head + self.n_kv_head) // self.n_head
        per_layer = attention + 3 * self.n_embd * self.mlp_hidden + 2 * self.n_embd
        return self.n_layer * per_layer + self.n_embd


def seed_for(*key) -> int:
    """32 bits from integers. A plain sum would make the stream of one seed a shifted copy of another's."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def apply_rope(x, cos, sin):
    """Rotary position embedding, rotate-half layout: dims e and e + d/2 of x (B, H, S, d) turn together."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def sink_mask(S, n_sink, device=None):
    """(S, S) bool, True where query i may attend to key j: content to every key, a sink only to itself."""
    positions = torch.arange(S, device=device)
    return (positions >= n_sink)[:, None] | (positions[:, None] == positions)


class Attention(nn.Module):
    def __init__(self, config: MDMConfig):
        super().__init__()
        self.config = config
        n_heads = config.n_head + 2 * config.n_kv_head
        self.qkv = nn.Linear(config.n_embd, config.n_embd // config.n_head * n_heads, bias=config.qkv_bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.gate = nn.Linear(config.n_embd, config.n_embd, bias=False) if config.gated_attention else None

    def heads(self, x, cos, sin):
        """x (B, S, C) -> q (B, H, S, d), k and v (B, K, S, d). K = H, but for grouped queries."""
        (B, S, C), H, K = x.shape, self.config.n_head, self.config.n_kv_head
        qkv = self.qkv(x).view(B, S, H + 2 * K, C // H).transpose(1, 2)  # (B, H + 2K, S, d)
        q, k, v = qkv.split((H, K, K), dim=1)
        if self.config.sink_zero_value:
            v = F.pad(v[:, :, self.config.n_sink :], (0, 0, self.config.n_sink, 0))
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def forward(self, x, cos, sin, attn_mask):
        """x (B, S, C), the sinks first -> (B, S, C). attn_mask (S, S) bool: query i may attend to key j."""
        (B, S, C), n_sink = x.shape, self.config.n_sink
        q, k, v = self.heads(x, cos, sin)
        gqa = self.config.n_kv_head < self.config.n_head  # grouped queries
        if n_sink and self.config.sink_attention == "split" and not self.config.sink_attends_all:
            # Content queries attend to every key. A sink attends to one, itself: that softmax is 1, and its
            # output is its own value. No mask is needed, and the fastest kernels stay available.
            y = F.scaled_dot_product_attention(q[:, :, n_sink:], k, v, enable_gqa=gqa)
            sink_y = v[:, :, :n_sink].repeat_interleave(q.size(1) // v.size(1), dim=1)
            y = torch.cat((sink_y, y), dim=2)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, enable_gqa=gqa)
        y = y.transpose(1, 2).reshape(B, S, C)  # heads side by side
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(x))
        return self.proj(y)


class MLP(nn.Module):
    def __init__(self, config: MDMConfig):
        super().__init__()
        self.w1 = nn.Linear(config.n_embd, config.mlp_hidden, bias=False)
        self.w2 = nn.Linear(config.n_embd, config.mlp_hidden, bias=False)
        self.w3 = nn.Linear(config.mlp_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))  # SwiGLU


class Block(nn.Module):
    def __init__(self, config: MDMConfig):
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm_2 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attn_mask):
        x = x + self.attn(self.norm_1(x), cos, sin, attn_mask)
        return x + self.mlp(self.norm_2(x))


class MDM(nn.Module):
    """Predicts the clean tokens of a partly hidden text. Vanilla, sink and gate are flags of the config."""

    @torch.random.fork_rng(devices=[])  # the layers below draw numbers that init_weights replaces
    def __init__(self, config: MDMConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size + 1, config.n_embd)  # the last row is [MASK]
        self.sink = nn.Parameter(torch.empty(config.n_sink, config.n_embd)) if config.n_sink else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)  # not tied to wte
        d = config.n_embd // config.n_head
        frequency = config.rope_base ** (-torch.arange(0, d, 2) / d)  # of pair e: base^(-2e/d)
        angle = torch.arange(config.block_size + config.n_sink)[:, None] * frequency
        self.register_buffer("rope_cos", angle.cos(), persistent=False)
        self.register_buffer("rope_sin", angle.sin(), persistent=False)
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed):
        """SMDM's initialisation. Each tensor has its own generator, seeded by (seed, name): models of one
        seed start equal in all that they share."""
        for name, p in self.named_parameters():
            owner = self.get_submodule(name.rpartition(".")[0])
            if name != "sink" and not isinstance(owner, (nn.Linear, nn.Embedding)):
                continue  # norms, and what a change adds, keep what their constructors made
            generator = torch.Generator().manual_seed(seed_for(seed, *name.encode()))
            if name.endswith(".bias"):
                p.zero_()
            elif name.endswith(("attn.proj.weight", "mlp.w3.weight")):  # into the residual stream
                p.normal_(std=1 / (math.sqrt(self.config.n_embd) * self.config.n_layer), generator=generator)
            else:
                p.normal_(std=math.sqrt(2 / (5 * self.config.n_embd)), generator=generator)

    def forward(self, xt, masked=None, targets=None):
        """xt (B, T) ids, mask_id where hidden -> logits (B, T, V), or only where masked (B, T): (N, V).
        With masked and targets (N,), the clean tokens there: -log p of each, (N,) float32. masked is on the
        CPU, so that N is known without waiting for a GPU."""
        x = self.trunk(xt)
        logits = self.head(x if masked is None else x[masked])
        return logits if targets is None else self.nll(logits, targets)

    def trunk(self, xt):
        """Embedding, sinks, blocks: (B, T) ids -> (B, T, C). Its shape is fixed: train.py compiles it."""
        (B, T), n_sink = xt.shape, self.config.n_sink
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens exceeds block_size {self.config.block_size}")
        x, positions, attn_mask = self.wte(xt), torch.arange(n_sink + T, device=xt.device), None
        if n_sink:
            x = torch.cat((self.sink.expand(B, -1, -1), x), dim=1)  # (B, S, C): the sinks are the first rows
            if self.config.sink_attention == "mask" and not self.config.sink_attends_all:
                attn_mask = sink_mask(n_sink + T, n_sink, xt.device)
            if self.config.sink_position == "end":  # attention knows the order from these angles alone
                positions = positions.roll(n_sink)  # sinks T, T + 1, ...; content 0, 1, ...
        cos, sin = self.rope_cos[positions], self.rope_sin[positions]
        for block in self.blocks:
            x = block(x, cos, sin, attn_mask)
        x = x[:, n_sink:]
        # nothing stands before position 0, which is predicted from its own state
        return torch.cat((x[:, :1], x[:, :-1]), dim=1) if self.config.shift else x

    def head(self, x):
        return self.lm_head(self.ln_f(x))  # (..., C) -> logits (..., V)

    def nll(self, logits, targets):
        return F.cross_entropy(logits.float(), targets, reduction="none")  # (N, V), (N,) -> (N,) float32

    def num_params(self, non_embedding: bool = True) -> int:
        """Parameters; by default, as in the table of sizes, without embeddings, sinks and output head."""
        left_out = ("wte", "sink", "lm_head") if non_embedding else ()
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith(left_out))

    @classmethod
    def from_checkpoint(cls, checkpoint) -> "MDM":
        """The model of a checkpoint, a path or a dict of load_checkpoint."""
        checkpoint = checkpoint if isinstance(checkpoint, dict) else load_checkpoint(checkpoint)
        model = cls(MDMConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
        return model


def load_checkpoint(path) -> dict:
    """What train.py saved, from a file or a folder's ckpt.pt: model, model_config, run_config, step, meta (of
    the data, with the tokenizer); to resume also optimizer, best_val_loss, losses, wandb_id.
    Raises ValueError if it cannot be read."""
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise ValueError(f"no checkpoint at {path}; train a model first: python train.py --out_dir=...")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or "model_config" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of train.py; python -m extras.convert reads SMDM's")
    return checkpoint


def mask_tokens(x0, p_mask, maskable, mask_id, noise=None):
    """Forward process q(xt | x0): each maskable token becomes [MASK] with probability p_mask (B, 1).
    x0, maskable (B, T); noise (B, T) uniform numbers, drawn here by default. Returns xt, masked (B, T)."""
    noise = torch.rand(x0.shape) if noise is None else noise
    masked = (noise < p_mask) & maskable
    return torch.where(masked, mask_id, x0), masked


def noise_levels(t, eps=1e-3):
    """p_mask = (1 - eps) t + eps: the linear schedule, kept off 0 so that 1 / p_mask stays finite."""
    return (1 - eps) * t + eps


def weighted_nll(model, x0, xt, masked, p_mask):
    """Sum over each row's hidden tokens of -log p(x0_i | xt) / p_mask, in nats: (B,) on the model's device.
    x0, xt, masked (B, T) and p_mask (B, 1) are on the CPU: no GPU is asked how many tokens are hidden."""
    device = next(model.parameters()).device
    nll = model(xt.to(device), masked, x0[masked].to(device))
    nll = nll / p_mask.expand_as(x0)[masked].to(device)  # (N,)
    return nll.new_zeros(x0.shape).masked_scatter(masked.to(device), nll).sum(dim=1)


def nll_at(model, x0, maskable, t, noise=None):
    """Hides x0 at noise levels t (B, 1) and returns its weighted_nll (B,). All else as in mask_tokens."""
    p_mask = noise_levels(t).float()
    xt, masked = mask_tokens(x0, p_mask, maskable, model.config.mask_id, noise)
    return weighted_nll(model, x0, xt, masked, p_mask)


def diffusion_loss(model, x0, maskable, stratified=False, random_length=0.0):
    """One draw of the upper bound on -log p(x0), in nats per maskable token, hidden or not: a scalar.
    Pretraining (all tokens are maskable) and fine-tuning (the prompt is not) are the same line.
    x0, maskable (B, T) on the CPU. stratified: t = (u + i/B) mod 1 over the rows, less noise and the same
    mean (the authors: independent t). random_length: share of batches cut to a random length (SMDM: 0.01)."""
    B, T = x0.shape
    if random_length and torch.rand(()) < random_length:
        T = int(torch.randint(1, T + 1, ()))
        x0, maskable = x0[:, :T], maskable[:, :T]
    t = (torch.rand(1, 1) + torch.arange(B)[:, None] / B) % 1 if stratified else torch.rand(B, 1)
    return nll_at(model, x0, maskable, t).sum() / maskable.sum().clamp(min=1)


def guided_logits(model, x, masked, given, cfg_scale=0.0):
    """Yields logits of the N masked positions of x (B, T), in pieces of bounded size: slice, (n, V) float32.
    cfg_scale w is classifier-free guidance: un + (1 + w)(cond - un), un with [MASK] for the given tokens."""
    device = next(model.parameters()).device
    cond = model.trunk(x.to(device))[masked]  # (N, C)
    if cfg_scale:
        un = model.trunk(torch.where(given, model.config.mask_id, x).to(device))[masked]
    n = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for piece in (slice(start, start + n) for start in range(0, len(cond), n)):
        logits = model.head(cond[piece]).float()
        if cfg_scale:
            un_logits = model.head(un[piece]).float()
            logits = un_logits + (1 + cfg_scale) * (logits - un_logits)
        yield piece, logits


def sample_tokens(logits, temperature, uniform):
    """A token for each row of logits (N, V) and the model's probability of it, both (N,) on the CPU: the
    argmax at temperature 0, else where the cumulative softmax(logits / temperature) passes uniform (N,)."""
    logits = logits.cpu() if logits.device.type == "mps" else logits  # MPS has no float64
    tokens = logits.argmax(dim=-1)
    if temperature > 1e-6:  # float32 cannot divide by much less
        cumulative = (logits / temperature).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        point = uniform.to(logits.device)[:, None] * cumulative[:, -1:]  # the sum is 1 up to rounding
        tokens = torch.searchsorted(cumulative, point, right=True)[:, 0].clamp(max=logits.size(1) - 1)
    return tokens.cpu(), logits.double().softmax(dim=-1).gather(1, tokens[:, None])[:, 0].cpu()


@torch.no_grad()
def generate(model, x, steps, temperature=0.0, remasking="confidence", threshold=None, cfg_scale=0.0,
             seeds=None, eot_id=None, on_step=None):  # fmt: skip
    """The reverse process: fills every mask_id in x (B, T). Given tokens may stand anywhere, for infilling.

    steps        denoising steps; a row takes fewer if it is filled before
    temperature  0 takes the likeliest token, 1 draws from the model's distribution
    remasking    'confidence': of the predicted tokens keep the surest, ceil(hidden / steps left) in each step
                 'random': the exact reverse process, which keeps each with (t - s) / t = 1 / steps left
    threshold    with 'confidence': keep also every token above this probability (arXiv 2505.22618)
    cfg_scale    w of guided_logits; above 0, a step is two forward passes
    seeds        B integers, one random stream a row: a row does not depend on the rest of the batch
    eot_id       if given, a row ends with the first such token it writes, once nothing is hidden before it:
                 it fills what is hidden behind it, and tokens that were written there earlier stay
    on_step      called with x (B, T) after every step
    Returns the filled rows (B, T) and each row's forward passes (B,), on the CPU. Raises ValueError."""
    if steps < 1 or temperature < 0 or cfg_scale < 0:
        raise ValueError(f"{steps=}, {temperature=}, {cfg_scale=}: wanted at least 1, 0 and 0")
    if remasking not in ("confidence", "random"):
        raise ValueError(f"remasking is {remasking!r}; it must be 'confidence' or 'random'")
    if threshold is not None and (remasking == "random" or not 0 <= threshold <= 1):
        raise ValueError(f"threshold {threshold} must lie in 0..1 and needs remasking='confidence'")
    (B, T), mask_id = x.shape, model.config.mask_id
    seeds = torch.randint(2**31, (B,)).tolist() if seeds is None else seeds
    streams = [np.random.default_rng(seed) for seed in seeds]
    x = x.cpu().clone()  # a step's decisions are a few small operations on all rows at once
    given, passes = x != mask_id, torch.zeros(B, dtype=torch.long)
    for steps_left in range(steps, 0, -1):
        active = (x == mask_id).any(dim=1).nonzero()[:, 0]  # the rows that are not complete
        if len(active) == 0:
            break
        passes[active] += 2 if cfg_scale else 1
        xt = x[active]
        masked = xt == mask_id
        uniform = np.stack([streams[row].random((2, T)) for row in active.tolist()], axis=1)
        uniform = torch.from_numpy(uniform)  # (2, R, T): for tokens, for positions
        # 1. predict every masked token
        tokens, confidence = xt.clone(), torch.full(xt.shape, -1.0, dtype=torch.float64)
        b, i = masked.nonzero(as_tuple=True)
        for piece, logits in guided_logits(model, xt, masked, given[active], cfg_scale):
            at = b[piece], i[piece]
            tokens[at], confidence[at] = sample_tokens(logits, temperature, uniform[0][at])
        # 2. choose row by row what to keep
        if remasking == "random":
            keep = uniform[1] < 1 / steps_left
        else:
            rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0 is the surest
            keep = rank < (masked.sum(dim=1, keepdim=True) / steps_left).ceil()
        if threshold is not None:
            keep |= confidence > threshold
        # 3. write
        x[active] = torch.where(keep & masked, tokens, xt)
        if eot_id is not None:
            x = end_rows(x, given, eot_id, mask_id)
        if on_step is not None:
            on_step(x.clone())
    return x, passes


def end_rows(x, given, eot_id, mask_id):
    """Fills what is hidden behind an end-of-text that was written, once nothing is hidden before it."""
    masked = x == mask_id
    ends = (x == eot_id) & ~given & (masked.cumsum(dim=1) == 0)
    return torch.where(masked & ends.any(dim=1, keepdim=True), eot_id, x)
