"""A masked diffusion language model (MDM) with a sink token, in one file. Read it top to bottom.

FORWARD PROCESS q(xt | x0). A text x0 of T tokens is destroyed by hiding tokens. At noise level t in (0, 1] every token is
replaced by [MASK] with probability t, independently of the others: t near 0 hides almost nothing, t = 1 hides everything.

    q(xt_i | x0_i) = t if xt_i = [MASK],  1 - t if xt_i = x0_i                                      (forward)

REVERSE PROCESS. The model sees xt and predicts, at every hidden place and all at once, a distribution over the clean token.
To go from level t to a lower level s, each hidden token is revealed with probability (t - s) / t, as a draw from that
distribution; a token once revealed stays. `generate` starts from [MASK] and walks t from 1 to 0.

LOSS. Hidden tokens are classified, and each is weighted by 1 / p_mask, the inverse of the chance that it was hidden:

    loss = E_t E_q [ sum over hidden i of  -log p(x0_i | xt) / t ]  >=  -log p(x0)                   (loss)

Without the weight, a text at t = 0.9 would count nine times as much as one at t = 0.1, because nine times as many of its
tokens are in the sum. With it every level counts the same, and the integral over t is an upper bound on -log p(x0).

NO TIME INPUT. The network is not told t. The share of [MASK] in xt already shows it, and the best prediction of a hidden
token given the visible ones does not depend on t at all: q hides tokens without looking at them.

THE SINK (arXiv 2601.19657). Softmax attention must put its mass somewhere, also where a head has nothing to read. So some
token with a small value vector becomes an attention sink, and in an MDM that sink moves from token to token as the text is
denoised. The cure is one more token, which attends only to itself while every token may attend to it:

    M_ij = -inf if i is a sink and j != i, else 0;     attention = softmax(q k^T / sqrt(d) + M) v    (Eq. 5-6)

Because it sees nothing else, the sink's hidden state in every layer is the same for every text and every t: a constant that
the model learns, a fixed place to leave surplus attention.

TWO WAYS TO COMPUTE IT. sink_attention='mask' is the definition: all rows go through attention, with the mask M. 'split' leaves
the sinks' rows out of it: the text's queries attend to [sink K/V; text K/V], which needs no mask, so that the fastest kernels may
run; and what a sink reads is its own value. The sinks' keys and values are constants, so `generate`, and whatever makes many
passes with the same weights, computes them once (`sink_keys_values`). Same parameters, same numbers up to rounding.

NAMES. x0 clean tokens, xt partly hidden tokens, both (B, T); t the noise level; p_mask the probability of being hidden;
masked = is hidden, maskable = may be hidden; B batch, T content tokens, S = T + n_sink, C = n_embd, H heads, V vocabulary.
"""

import math
import os
import pickle
import zipfile
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

# Sizes of SMDM's scaling study, by non-embedding parameters: (n_layer, n_head, n_embd). mlp_hidden is 4 * n_embd, except 75M.
PRESETS = {
    "6M": (6, 4, 256), "19M": (8, 6, 384), "34M": (8, 8, 512), "48M": (9, 9, 576), "66M": (10, 10, 640),
    "75M": (16, 8, 640), "85M": (13, 10, 640), "113M": (12, 12, 768), "142M": (15, 12, 768), "170M": (18, 12, 768),
    "180M": (14, 14, 896), "206M": (16, 14, 896), "231M": (18, 14, 896), "268M": (16, 16, 1024), "302M": (18, 16, 1024),
    "336M": (20, 16, 1024), "472M": (18, 10, 1280), "551M": (21, 10, 1280), "571M": (18, 11, 1408), "629M": (24, 10, 1280),
    "666M": (21, 11, 1408), "717M": (19, 12, 1536), "761M": (24, 11, 1408), "831M": (22, 12, 1536), "944M": (25, 12, 1536),
    "1028M": (20, 14, 1792), "1233M": (24, 14, 1792), "1476M": (22, 16, 2048), "1678M": (25, 16, 2048), "2121M": (28, 17, 2176),
}  # fmt: skip

LOGITS_AT_ONCE = (
    2**26
)  # how many the loss holds in memory; of more, it computes parts anew in the backward pass


@dataclass
class MDMConfig:
    block_size: int = 2048  # content tokens; sinks come on top
    vocab_size: int = 32000  # real tokens = rows of the output head
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 256
    mlp_hidden: int | None = None  # None: 4 * n_embd
    n_sink: int = 1  # 0 = vanilla MDM, 1 = the paper's sink token
    sink_position: str = "front"  # front or end of the sequence
    sink_zero_value: bool = False  # force the sinks' value vectors to zero (the paper's Table 5)
    gated_attention: bool = False  # multiply the attention output by sigmoid(X W_g) (arXiv 2505.06708)
    sink_attention: str = "mask"  # mask (Eq. 5-6 as they stand) or split (the same, without a mask)

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head} into heads of even width (rotary "
                f"embedding turns pairs); choose n_embd as a multiple of {2 * self.n_head}"
            )
        if self.n_sink < 0:
            raise ValueError(f"n_sink is {self.n_sink}; it must be 0 (vanilla) or more")
        if self.sink_position not in ("front", "end"):
            raise ValueError(f"sink_position is {self.sink_position!r}; it must be 'front' or 'end'")
        if self.sink_attention not in ("mask", "split"):
            raise ValueError(f"sink_attention is {self.sink_attention!r}; it must be 'mask' or 'split'")
        if self.mlp_hidden is None:
            self.mlp_hidden = 4 * self.n_embd
        if self.mlp_hidden < 1:
            raise ValueError(
                f"mlp_hidden is {self.mlp_hidden}; it must be at least 1, or None for 4 * n_embd"
            )
        size = self.table_params() + (2 * self.vocab_size + self.n_sink) * self.n_embd
        if size > 1e12:
            raise ValueError(
                f"a model of {size:.1e} parameters fits nowhere; lower n_layer, n_embd, mlp_hidden or n_sink"
            )

    @property
    def mask_id(self) -> int:
        """Id of [MASK]: the last row of the input embedding. The output head has no such row, so it is never predicted."""
        return self.vocab_size

    @classmethod
    def preset(cls, size: str, **overrides) -> "MDMConfig":
        """A size of the table above, such as '472M'. Raises ValueError for a size that is not in it."""
        if size not in PRESETS:
            raise ValueError(f"no preset {size!r}; there are {', '.join(PRESETS)}")
        n_layer, n_head, n_embd = PRESETS[size]
        shape = {
            "n_layer": n_layer,
            "n_head": n_head,
            "n_embd": n_embd,
            "mlp_hidden": 1600 if size == "75M" else 4 * n_embd,
        }
        return cls(**{**shape, **overrides})

    def table_params(self) -> int:
        """Non-embedding parameters of the vanilla model of this shape, as the table counts them."""
        return (
            self.n_layer * (4 * self.n_embd**2 + 3 * self.n_embd * self.mlp_hidden + 2 * self.n_embd)
            + self.n_embd
        )


def tokens_for_flops(config: MDMConfig, flops: float) -> float:
    """Training tokens D that a budget of C = 6 N D FLOPs buys. N is the table's, also for the gate, whose own weights the
    authors' budget ignores: so every variant of one shape trains on the same number of tokens."""
    return flops / (6 * config.table_params())


# ---------------------------------------------------------------------------------------------------------------------
# The network: a pre-norm transformer that reads in both directions


def rope_tables(length: int, head_dim: int, base: float = 10000.0):
    """cos and sin of the rotation angles, each (length, head_dim / 2): pair e turns by position * base^(-2e / head_dim)."""
    frequency = base ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.arange(length).float()[:, None] * frequency
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Rotary position embedding, rotate-half layout: dims e and e + d/2 of x (B, H, S, d) turn together."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, config: MDMConfig):
        super().__init__()
        self.config, self.n_head = config, config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.gate = nn.Linear(config.n_embd, config.n_embd, bias=False) if config.gated_attention else None

    def project(self, x, n_sink=0):
        """x (B, S, C), its first n_sink rows sinks -> q, k, v, each (B, H, S, d), not rotated yet."""
        B, S, C = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if self.config.sink_zero_value and n_sink:
            v = F.pad(v[:, :, n_sink:], (0, 0, n_sink, 0))
        return q, k, v

    def output(self, x, y):
        """What the heads have read, y (B, S, H, d), on its way back into the residual stream; x (B, S, C) is the layer's input."""
        y = y.reshape(x.shape)  # heads side by side
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(x))
        return self.proj(y)

    def forward(self, x, rope, n_sink=0, may_attend=None, before=None, store=None):
        q, k, v = self.project(x, n_sink)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if before is not None:  # keys and values of what is no row of x
            k, v = (
                torch.cat((past.expand(len(x), -1, -1, -1), own), dim=2) for past, own in zip(before, (k, v))
            )
        if store is not None:
            store.append((k, v))
        if n_sink and self.config.sink_attention == "split":
            # Only the text's rows need attention. A softmax over one column is 1: what a sink reads is its own value.
            y = F.scaled_dot_product_attention(q[:, :, n_sink:], k, v, attn_mask=may_attend)
            y = torch.cat((v[:, :, :n_sink].transpose(1, 2), y.transpose(1, 2)), dim=1)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend).transpose(1, 2)
        return self.output(x, y)


class MLP(nn.Module):
    """SwiGLU: w3(silu(w1 x) * w2 x)."""

    def __init__(self, config: MDMConfig):
        super().__init__()
        self.w1 = nn.Linear(config.n_embd, config.mlp_hidden, bias=False)
        self.w2 = nn.Linear(config.n_embd, config.mlp_hidden, bias=False)
        self.w3 = nn.Linear(config.mlp_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    def __init__(self, config: MDMConfig):
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.attn = Attention(config)
        self.norm_2 = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x, *attention):
        x = x + self.attn(self.norm_1(x), *attention)
        return x + self.mlp(self.norm_2(x))


class MDM(nn.Module):
    """Predicts the clean tokens from a partly hidden text. Vanilla, sink and gate are flags of the config."""

    def __init__(self, config: MDMConfig):
        super().__init__()
        self.config = config
        seed = int(
            torch.randint(2**31, (), device="cpu")
        )  # taken before the layers below draw numbers of their own
        self.wte = nn.Embedding(config.vocab_size + 1, config.n_embd)  # the last row is [MASK]
        self.sink = nn.Parameter(torch.empty(config.n_sink, config.n_embd)) if config.n_sink else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)  # not tied to wte
        cos, sin = rope_tables(config.block_size + config.n_sink, config.n_embd // config.n_head)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self._init_weights(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _init_weights(self, generator):
        """SMDM's initialisation. The tensors that only some variants have come last, so that from one seed a vanilla, a sink
        and a gate model start with equal values in all that they share."""
        C, n_layer = self.config.n_embd, self.config.n_layer
        for name, p in sorted(
            self.named_parameters(), key=lambda item: item[0] == "sink" or "gate" in item[0]
        ):
            if "norm" in name or "ln_f" in name:
                p.fill_(1.0)
            elif name.endswith(("proj.weight", "w3.weight")):  # they write into the residual stream
                p.normal_(std=1 / (math.sqrt(C) * n_layer), generator=generator)
            else:
                p.normal_(std=math.sqrt(2 / (5 * C)), generator=generator)

    @property
    def device(self):
        return self.lm_head.weight.device

    def forward(self, xt, only=None, targets=None, **where):
        """xt (B, T) token ids, mask_id where hidden -> logits (B, T, vocab_size) for the content positions.

        only      (N,) places, counted through all rows: the output head at these alone -> (N, vocab_size)
        targets   (N,) clean tokens at these places: their -log p instead of logits -> (N,) float32
        where     lengths, sinks, before, store of hidden_states
        """
        x = self.hidden_states(xt, **where)
        if only is not None:
            x = x.flatten(0, 1).index_select(0, only)
        return self.lm_head(self.ln_f(x)) if targets is None else self.nll(x, targets)

    def hidden_states(self, xt, lengths=None, sinks=None, before=None, store=None):
        """What the last block gives for the content positions, (B, T, C).

        lengths   (B,) tokens of each row; what stands behind them is padding, which changes nothing before it
        sinks     what sink_keys_values gave, for passes that share it; None: the sinks go through the layers with the text
        before    keys and values of the sinks and of the text left of xt, for each layer, as a pass over the whole text stored
                  them: then xt is the rest of that text alone
        store     a list, which gets each layer's keys and values (B, H, S, d): the sinks', then the text's
        """
        n_sink, device = self.config.n_sink, xt.device
        start = before[0][0].size(2) - n_sink if before is not None else 0
        T = start + xt.size(1)
        if T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens exceeds block_size {self.config.block_size}")
        x, may_attend, rope = self.wte(xt), None, self.rotations(T, lengths)
        if before is None and sinks is not None:
            before = [(apply_rope(k, *(table[..., :n_sink, :] for table in rope)), v) for k, v in sinks]
        n_rows = n_sink if before is None else 0  # of x that are sinks
        rope = [table[..., n_sink + start - n_rows :, :] for table in rope]
        if n_rows:
            x = torch.cat((self.sink.expand(len(x), -1, -1), x), dim=1)  # (B, S, C)
        if n_rows and self.config.sink_attention == "mask":
            # Row i may attend to column j: a content row sees everything, a sink's row sees only itself (Eq. 5-6).
            is_content = torch.arange(n_sink + T, device=device) >= n_sink
            may_attend = is_content[:, None] | torch.eye(n_sink + T, dtype=torch.bool, device=device)
        if lengths is not None:
            visible = torch.arange(start, T, device=device) < lengths[:, None]
            visible = F.pad(visible, (n_sink + start, 0), value=True)[
                :, None, None
            ]  # (B, 1, 1, S): these columns
            may_attend = visible if may_attend is None else may_attend & visible
        for block, kv in zip(self.blocks, before or [None] * len(self.blocks)):
            x = block(x, rope, n_rows, may_attend, kv, store)
        return x[:, n_rows:]

    def rotations(self, T, lengths=None):
        """cos and sin for the sinks and for a text of T tokens behind them, (S, d/2), or (B, 1, S, d/2) if rows differ.

        Sinks are always the first rows: attention knows no order but these angles. sink_position='front' gives them the places
        0.. and the text those behind; 'end' gives the text 0.., and the sinks those behind each row's last token."""
        n_sink, tables = self.config.n_sink, (self.rope_cos, self.rope_sin)
        if self.config.sink_position == "front":
            return [table[: n_sink + T] for table in tables]
        place, end = torch.arange(-n_sink, T, device=self.device), T if lengths is None else lengths[:, None]
        place = torch.where(place < 0, place + n_sink + end, place)  # (S,) or (B, S)
        return [table[place] if lengths is None else table[place][:, None] for table in tables]

    def sink_keys_values(self):
        """The sinks' keys (not rotated yet) and values in every layer, each (1, H, n_sink, d), for many passes with the same
        weights; None if there are no sinks, or if the mask of 'mask' needs them in the sequence."""
        if not self.config.n_sink or self.config.sink_attention == "mask":
            return None
        x, keys_values = self.sink[None], []
        for block in self.blocks:
            normed = block.norm_1(x)
            _, k, v = block.attn.project(normed, self.config.n_sink)
            keys_values.append((k, v))
            x = x + block.attn.output(normed, v.transpose(1, 2))  # what a sink reads is its own value
            x = x + block.mlp(block.norm_2(x))
        return keys_values

    def nll(self, x, targets):
        """-log p of targets (N,) where the last block gives x (N, C): (N,) float32. Memory does not grow with N * V: above
        LOGITS_AT_ONCE the backward pass computes the logits anew, part by part."""
        n = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        if len(x) <= n:
            return self.nll_of_part(x, targets)
        parts = zip(x.split(n), targets.split(n))
        return torch.cat(
            [
                recompute(self.nll_of_part, *part, use_reentrant=False, preserve_rng_state=False)
                for part in parts
            ]
        )

    def nll_of_part(self, x, targets):
        return F.cross_entropy(self.lm_head(self.ln_f(x)).float(), targets, reduction="none")

    def num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; by default, as in the table of sizes, without token and sink embeddings and output head."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding:
            n -= (
                self.wte.weight.numel()
                + self.lm_head.weight.numel()
                + self.config.n_sink * self.config.n_embd
            )
        return n

    def flops_per_token(self, T: int) -> float:
        """FLOPs of one forward and backward pass per content token, for MFU: 6 per weight (but the input embedding, which is a
        look-up), and 12 * n_layer * n_embd * T for the two products of attention (PaLM, appendix B). The head counts half: it runs
        where a token is hidden, which is half of them on average."""
        weights = self.num_params() + self.lm_head.weight.numel() / 2
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * T

    @classmethod
    def from_checkpoint(cls, checkpoint) -> "MDM":
        """The model of a checkpoint: a path, or what load_checkpoint returned. Raises ValueError where there is none, or where
        its weights are not those of its model_config."""
        if not isinstance(checkpoint, dict):
            checkpoint = load_checkpoint(checkpoint)
        try:
            model = cls(MDMConfig(**checkpoint["model_config"]))
            model.load_state_dict(checkpoint["model"])
        except (RuntimeError, TypeError) as error:  # other shapes or names; other settings than MDMConfig has
            raise ValueError(
                f"the checkpoint's weights are not those of its model_config: {str(error)[:300]}"
            ) from error
        return model

    @classmethod
    def from_smdm(cls, state_dict, n_head: int, block_size: int = 2048) -> "MDM":
        """Weights in the layout of the authors' code and of SMDM's released checkpoints. All but n_head and block_size is
        read off the shapes. Raises ValueError for a state dict of another kind."""
        w = {name: torch.as_tensor(tensor) for name, tensor in state_dict.items()}
        if "transformer.wte.weight" not in w or "lm_head.weight" not in w:
            raise ValueError(
                f"not an SMDM state dict: wanted transformer.wte.weight and lm_head.weight, got {sorted(w)[:3]}..."
            )
        wte, head = w.pop("transformer.wte.weight"), w.pop("lm_head.weight")
        V, C = head.shape
        if len(wte) - V not in (1, 2):
            raise ValueError(
                f"wte has {len(wte)} rows for {V} tokens; wanted {V} + 1 (mask) or {V} + 2 (mask, sink)"
            )
        model = cls(
            MDMConfig(
                block_size=block_size,
                vocab_size=V,
                n_layer=1 + max(int(name.split(".")[2]) for name in w if name.startswith("transformer.h.")),
                n_head=n_head,
                n_embd=C,
                mlp_hidden=len(w["transformer.h.0.mlp.swiglu.w1.weight"]),
                n_sink=len(wte) - V - 1,
                gated_attention="transformer.h.0.attn.gate.weight" in w,
            )
        )
        ours = {"wte.weight": wte[: V + 1], "lm_head.weight": head}
        if len(wte) == V + 2:
            ours["sink"] = wte[V + 1 :]
        for name, tensor in w.items():
            if name.endswith("attn.attn.weight"):  # rows grouped by head, then q, k, v -> all q, all k, all v
                if tensor.shape != (3 * C, C):
                    raise ValueError(
                        f"{name} is {tuple(tensor.shape)}, wanted {(3 * C, C)}: grouped queries are not supported"
                    )
                tensor = tensor.view(n_head, 3, C // n_head, C).transpose(0, 1).reshape(3 * C, C)
            name = (
                name.replace("attn.attn.", "attn.qkv.")
                .replace("swiglu.", "")
                .replace("transformer.h.", "blocks.")
            )
            ours[name.removeprefix("transformer.")] = tensor
        model.load_state_dict(ours)
        return model


def load_checkpoint(path) -> dict:
    """A checkpoint as train.py writes it: model (weights), optimizer, scaler, model_config, run_config, step, best_val_loss and
    meta (the data set's, with its tokenizer). A folder stands for its ckpt.pt. Raises ValueError if that is not what is there."""
    if os.path.isdir(path):
        path = os.path.join(path, "ckpt.pt")
    if not os.path.isfile(path):
        raise ValueError(
            f"no checkpoint at {path}; train one with python train.py --out_dir={os.path.dirname(path) or '.'}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = (
                archive.testzip()
            )  # torch.load does not compare a part's checksum; the first part that is damaged
        checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it holds other things than tensors and plain values, which could run code"
        ) from error
    except Exception as error:  # whatever a damaged file can do
        raise ValueError(
            f"{path} cannot be read as a checkpoint (cut off, or another kind of file?): {str(error)[:300]}"
        ) from error
    if damaged:
        raise ValueError(
            f"{path} is damaged: {damaged} in it has another checksum than when it was saved; take best.pt or a copy"
        )
    kinds = {"model": dict, "model_config": dict, "meta": (dict, type(None)), "step": int}
    if not (
        isinstance(checkpoint, dict)
        and all(isinstance(checkpoint.get(key, ...), kind) for key, kind in kinds.items())
    ):
        raise ValueError(
            f"{path} is no checkpoint of train.py; for SMDM's released weights there is MDM.from_smdm"
        )
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion: the forward process, the loss, the reverse process


def mask_tokens(x0, p_mask, maskable, mask_id, noise=None):
    """Forward process q(xt | x0): each maskable token independently becomes [MASK] with probability p_mask.

    x0 and maskable (B, T); p_mask (B, 1); noise (B, T) uniform numbers, drawn here if not given. Returns xt, masked (B, T)."""
    if noise is None:
        noise = torch.rand(x0.shape, device=x0.device)
    masked = (noise < p_mask) & maskable
    return torch.where(masked, mask_id, x0), masked


def noise_levels(t, eps=1e-3):
    """p_mask = (1 - eps) t + eps: the linear schedule, kept off 0 so that 1 / p_mask stays finite."""
    return (1 - eps) * t + eps


def weighted_nll(model, x0, xt, masked, p_mask):
    """Sum over each row's hidden tokens of -log p(x0_i | xt) / p_mask, in nats: (B,), float32, on the model's device.

    x0, xt, masked (B, T), p_mask (B, 1). Keep them on the CPU: then the number of hidden tokens is known without waiting for a
    GPU, and while it works on one batch the next one is on its way."""
    device = getattr(model, "module", model).device  # DDP keeps the model in .module
    places = masked.flatten().nonzero()[:, 0]
    batch = xt, places, x0.flatten()[places], p_mask.expand_as(x0).flatten()[places]
    if device.type == "cuda" and xt.device.type == "cpu":
        batch = (tensor.pin_memory() for tensor in batch)  # what is pinned is copied while the GPU works
    xt, places, targets, p_mask = (tensor.to(device, non_blocking=device.type == "cuda") for tensor in batch)
    nll = model(xt, only=places, targets=targets) / p_mask
    return nll.new_zeros(x0.numel()).scatter(0, places, nll).view(x0.shape).sum(dim=1)


def diffusion_loss(model, x0, maskable, stratified=False, random_length=0.0):
    """One draw of the upper bound on -log p(x0), in nats per maskable token: a scalar.

    Divided by all maskable tokens of the batch, hidden or not; so pretraining (everything is maskable) and fine-tuning
    (the prompt is not) are the same line.

    x0, maskable (B, T)   clean tokens, on the CPU; which of them may be hidden
    stratified            t = (u + i/B) mod 1 over the rows: less noise, the same mean. The authors draw t independently.
    random_length         share of batches cut to a random length in 1..T, which keeps short texts in distribution (SMDM: 0.01)
    """
    B, T = x0.shape
    if random_length and torch.rand(()) < random_length:
        T = int(torch.randint(1, T + 1, ()))
        x0, maskable = x0[:, :T], maskable[:, :T]
    if stratified:
        t = (torch.rand(1, 1, device=x0.device) + torch.arange(B, device=x0.device)[:, None] / B) % 1
    else:
        t = torch.rand(B, 1, device=x0.device)
    p_mask = noise_levels(t)
    mask_id = getattr(model, "module", model).config.mask_id  # DDP keeps the model in .module
    xt, masked = mask_tokens(x0, p_mask, maskable, mask_id)
    return weighted_nll(model, x0, xt, masked, p_mask).sum() / maskable.sum().clamp(min=1)


def guided_logits(model, x, given, cfg_scale, **where):
    """Unsupervised classifier-free guidance: un + (1 + w)(cond - un), where un sees [MASK] in place of the given tokens.
    where: what else MDM.forward takes."""
    logits = model(x, **where).float()
    if cfg_scale == 0.0:
        return logits
    unconditional = model(torch.where(given, model.config.mask_id, x), **where).float()
    return unconditional + (1 + cfg_scale) * (logits - unconditional)


def sample_tokens(logits, temperature, generator=None):
    """A token for each row of logits (N, V) and the model's probability of it, both (N,). Gumbel-max in float64: the argmax of
    logits + temperature * Gumbel noise is a draw from softmax(logits / temperature), and temperature 0 is the argmax."""
    logits = noisy = logits.double()
    if temperature > 0.0:
        uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64, device=logits.device)
        noisy = logits - temperature * torch.log(-torch.log(uniform))
    tokens = noisy.argmax(dim=-1)
    return tokens, logits.softmax(dim=-1).gather(-1, tokens[:, None])[:, 0]


def surest(confidence, k):
    """Which are the k most confident of N places? (N,) -> bool (N,). Ties go to the left."""
    chosen = torch.zeros_like(confidence, dtype=torch.bool)
    chosen[confidence.argsort(descending=True, stable=True)[:k]] = True
    return chosen


def check_decoding(
    steps,
    temperature=0.0,
    remasking="confidence",
    cfg_scale=0.0,
    threshold=None,
    block_length=None,
    prefix_cache=False,
):
    """ValueError if options of generate are out of range, or do not go together."""
    if remasking not in ("confidence", "random"):
        raise ValueError(f"remasking is {remasking!r}; it must be 'confidence' or 'random'")
    if remasking == "random" and (threshold is not None or block_length is not None):
        raise ValueError(
            "threshold and block_length choose by confidence; leave them out with remasking='random'"
        )
    if prefix_cache and (block_length is None or cfg_scale):
        raise ValueError("prefix_cache needs a block_length, and works without cfg_scale only")
    if not (steps >= 1 and 0 <= temperature < math.inf and 0 <= cfg_scale < math.inf):
        raise ValueError(
            f"wanted steps >= 1, temperature >= 0, cfg_scale >= 0; got {steps}, {temperature}, {cfg_scale}"
        )
    if threshold is not None and not 0 <= threshold <= 1 or block_length is not None and block_length < 1:
        raise ValueError(f"wanted threshold in 0..1 and block_length >= 1; got {threshold}, {block_length}")


@torch.no_grad()
def generate(
    model, x, steps, temperature=0.0, remasking="confidence", cfg_scale=0.0, threshold=None, block_length=None, prefix_cache=False,
    seeds=None, eot_id=None, on_step=None, lengths=None,
):  # fmt: skip
    """The reverse process: fills every mask_id in x. Prompt tokens may stand anywhere, so infilling is the same call.

    x             (B, T) token ids on the model's device, mask_id where text is wanted
    steps         denoising steps of a row; it takes fewer where every place is filled before
    temperature   0 takes the likeliest token, 1 draws from the model's distribution
    remasking     'confidence': of the predicted tokens keep the surest, ceil(still hidden / steps left) a step
                  'random': the exact reverse process; at level t = 1 - step/steps each hidden token is revealed with
                  probability (t - s) / t = 1 / (steps left), whatever the model thinks of it
    cfg_scale     w of unsupervised classifier-free guidance; 0 is off, and else each step costs two forward passes
    threshold     with 'confidence': keep also every token that the model gives more than this probability (arXiv 2505.22618)
    block_length  with 'confidence': fill the text from left to right, so many places (hidden or not) at a time
    prefix_cache  with block_length: compute keys and values left of a block at its first step only. An approximation: they are
                  not told what the block's tokens became. All rows then work on the same block.
    seeds         B integers, the rows' own random streams (default: from torch's generator); a row's text does not depend on
                  what else is in the batch
    eot_id        if given, a row is complete as soon as it has written this token and nothing before it is hidden: what is
                  hidden behind it is filled with it too, and the row is not computed any further
    on_step       called with x (B, T) after every step
    lengths       (B,) tokens of each row, where they differ; what stands behind them is padding

    Returns the filled rows (B, T) and the number of forward passes. Raises ValueError for options out of range.
    """
    check_decoding(steps, temperature, remasking, cfg_scale, threshold, block_length, prefix_cache)
    if seeds is not None and len(seeds) != len(x):
        raise ValueError(f"{len(seeds)} seeds for {len(x)} rows; wanted one for each")
    (B, T), device, mask_id = x.shape, x.device, model.config.mask_id
    place = torch.device("cpu") if device.type == "mps" else device  # decisions take float64, which MPS lacks
    if seeds is None:
        seeds = torch.randint(2**31, (B,)).tolist()
    streams = [torch.Generator(place).manual_seed(seed) for seed in seeds]
    given, x, n_forward = x != mask_id, x.clone(), 0
    steps_left = torch.full((B,), min(steps, 2**62), device=device)
    block = torch.arange(T, device=device) // min(block_length or T, T)  # (T,) the block of each place
    sinks = model.sink_keys_values()  # the same at every step
    cached_block, cached_rows, cache = (
        None,
        None,
        [],
    )  # each layer's keys and values left of that block, for those rows
    while (hidden := x == mask_id).any():
        rows = hidden.any(dim=1).nonzero()[:, 0]  # those that are not complete
        if prefix_cache:
            now = torch.where(hidden[rows], block, T).amin(
                dim=1
            )  # the first block of each row that has something hidden
            rows, now = rows[now == now.min()], int(now.min())
        hidden = hidden[rows]
        k = -(
            -hidden.sum(dim=1) // steps_left[rows]
        )  # how many to reveal at least: ceil(hidden / steps left)
        last = torch.where(hidden & (hidden.cumsum(dim=1) <= k[:, None]), block, 0).amax(
            dim=1
        )  # block of the k-th from the left
        wanted = hidden & (block <= last[:, None])

        start, where = 0, {"sinks": sinks, "lengths": None if lengths is None else lengths[rows]}
        if prefix_cache and now == cached_block:  # run over the block and what is right of it
            stay = torch.isin(cached_rows, rows)
            cached_rows, cache = rows, [(keys[stay], values[stay]) for keys, values in cache]
            start, where["before"] = now * block_length, cache
        elif prefix_cache:
            where["store"] = store = []
        only = wanted[:, start:].flatten().nonzero()[:, 0]
        logits = guided_logits(
            model, x[rows, start:], given[rows, start:], cfg_scale, only=only, **where
        )  # (N, V)
        n_forward += 1 if cfg_scale == 0.0 else 2
        if prefix_cache and now != cached_block:
            left = model.config.n_sink + now * block_length
            cached_block, cached_rows = now, rows
            cache = [(keys[:, :, :left], values[:, :, :left]) for keys, values in store]

        # row by row: independent of the others, and little memory for a large V
        for r, row_wanted, row_k, row_logits in zip(
            rows.tolist(), wanted, k.tolist(), logits.split(wanted.sum(dim=1).tolist())
        ):
            places = row_wanted.nonzero()[:, 0]
            tokens, confidence = sample_tokens(row_logits.to(place), temperature, streams[r])
            if remasking == "confidence":
                reveal = surest(confidence - 2 * block[places].to(place), row_k)  # block by block
                if threshold is not None:
                    reveal |= confidence > threshold
            else:
                reveal = torch.rand(len(places), generator=streams[r], device=place) < 1 / steps_left[r].to(
                    place
                )
            x[r, places[reveal.to(device)]] = tokens[reveal].to(device)
        steps_left[rows] -= 1
        if eot_id is not None:
            hidden = x == mask_id
            ends = (
                (x == eot_id) & ~given & (hidden.cumsum(dim=1) == 0)
            )  # end-of-text with nothing hidden before it
            x = x.masked_fill(hidden & ends.any(dim=1, keepdim=True), eot_id)
        if on_step is not None:
            on_step(x.clone())
    return x, n_forward
