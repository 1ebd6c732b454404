"""The language model: a decoder-only Transformer, its sampler, and its Hugging Face names.

    model = GPT(GPTConfig(vocab_size=2048))
    logits = model(ids)                                        # (B, T, V)
    answers, logprobs = generate(model, prompts, max_new_tokens=64, eos_ids=(end_id,))

A language model gives Pr(x_t | x_<t), one token at a time (Foundations of Large Language Models,
arXiv 2501.09223, ch. 2). The same network serves every stage: pre-training and fine-tuning read
its logits, RLHF samples from it and recomputes the samples' log-probabilities, and the reward model
and the PPO critic replace its head by a scalar one (`ScalarModel`).

The block is that of Llama and Qwen3: their checkpoints open here (with unscaled RoPE), and ours in other programs.
Left out: biases, sliding windows, RoPE scaling, mixtures of experts. Dropout is left out for a
reason: PPO compares the log-probabilities of a text before and after an update, and with dropout
the two would differ before any update, when their ratio must be 1.

Shapes: B rows, T tokens, C width, H query heads, K key-value heads, D head width, V vocabulary.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    vocab_size: int
    context_length: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None  # as many as heads when not given; fewer = grouped-query attention: a smaller cache
    width: int = 128
    ffn_width: int = 344  # SwiGLU has three matrices: at 8/3 width they cost as much as two at 4 width
    head_dim: int | None = None  # width // heads when not given
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qk_norm: bool = False  # True: Qwen3, False: Llama
    tied: bool = True  # the embedding matrix is also the output head

    def __post_init__(self):
        if self.kv_heads is None:
            self.kv_heads = self.heads
        for name in ("vocab_size", "context_length", "layers", "heads", "kv_heads", "width", "ffn_width"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} {value!r}: expected a whole number from 1")
        if self.head_dim is None:
            if self.width % self.heads:
                raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
            self.head_dim = self.width // self.heads
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if type(self.head_dim) is not int or self.head_dim < 1 or self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim!r}: expected an even whole number, RoPE turns pairs")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"{name} {value!r}: expected a number above 0")


# ---- the network ---------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / rms(x) * weight, its *gain* (Zhang and Sennrich 2019): LayerNorm without the mean and the bias."""

    def __init__(self, size, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        # Written out to be read; F.rms_norm is as fast.
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (x * scale * self.weight).type_as(x)


def rope_tables(config):
    """-> cos, sin (context_length, D) of the angles position * theta^(-2i/D), i < D/2 (arXiv 2104.09864).

    Component i is paired with i + D/2, as in Hugging Face's Llama (the paper pairs 2i with 2i + 1): the
    halves (x1, x2) of a head become (x1 cos - x2 sin, x2 cos + x1 sin) = x * cos + (x2, x1) * sin, with
    the first half of sin negated.
    """
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    angles = torch.arange(config.context_length)[:, None] * frequencies  # (context, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, cos, sin):
    """Rotate heads x (B, T, heads, D) by the angles of their positions."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    swapped = x.roll(x.size(-1) // 2, dims=-1)  # (x2, x1)
    return torch.addcmul(x * cos, swapped, sin)


def attend(q, k, v, mask):
    """softmax(q kᵀ / √D) v: q (B, H, T, D), k and v (B, K, past+T, D) -> (B, H, T, D).

    Without a mask a query sees the keys up to its own position; a single query (T = 1) sees them all.
    (Several tokens after a cache always come with a mask, see `GPT.hidden`.)
    """
    (B, H, T, D), K = q.shape, k.size(1)
    if mask is None and 1 < T <= 512 and q.dtype == torch.bfloat16 and q.is_cpu:
        # Written out: in bf16 on a CPU this takes less than half the time of the fused kernel. That
        # one never holds the matrix of scores, which grows with T², so it gets the long texts.
        later = q.new_full((T, T), -math.inf).triu(1)
        k, v = (t.repeat_interleave(H // K, dim=1).reshape(B * H, T, D) for t in (k, v))
        scores = torch.baddbmm(later, q.reshape(B * H, T, D), k.mT, alpha=D**-0.5)  # (B*H, T, T)
        return (scores.softmax(-1) @ v).view(B, H, T, D)
    # is_causal would align a single query with the first key, not the last.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                          enable_gqa=H != K)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        H, K, D = config.heads, config.kv_heads, config.head_dim
        self.config = config
        self.qkv = nn.Linear(config.width, (H + 2 * K) * D, bias=False)  # one product, not three
        self.out = nn.Linear(H * D, config.width, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(D, config.norm_eps), RMSNorm(D, config.norm_eps)

    def forward(self, x, cos, sin, mask, cache, layer):
        B, T, _ = x.shape
        H, K, D = self.config.heads, self.config.kv_heads, self.config.head_dim
        qk, v = self.qkv(x).view(B, T, H + 2 * K, D).split([H + K, K], dim=2)
        if self.config.qk_norm:
            q, k = qk.split([H, K], dim=2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        q, k = rotate(qk, cos, sin).transpose(1, 2).split([H, K], dim=1)  # (B, H or K, T, D)
        v = v.transpose(1, 2)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.write(layer, k, v)  # (B, K, past+T, D)
        y = attend(q, k, v, mask)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, H * D))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm: each part reads a normalised copy of the residual stream and adds to it."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, cache, layer):
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache, layer)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False  # True: activations inside a block are recomputed, not kept
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        # Every block starts as the identity: depth does not blow up the residual stream, the gradient
        # reaches the embeddings undiminished, and a block contributes only once it helps.
        for block in self.blocks:
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.mlp.down.weight)

    def hidden(self, ids, attention_mask=None, cache=None, extra=None):
        """ids (B, T) int64 -> states (B, T, C) after the final norm, ready for `head`. `extra` (B, T, C) is added to
        the embeddings.

        attention_mask (B, T), or (B, past+T) with a cache: 1 = real token, 0 = padding on either
        side; the state at a padded position is meaningless. None = every token is real. That is faster,
        and correct too if all padding is on the right: causal attention hides it from real tokens.
        Raises ValueError for more tokens than context_length, except with both mask and cache: there
        padding takes up no positions, and `decode` keeps the real tokens within the limit.
        """
        asked = T = ids.size(1)
        past = 0 if cache is None else cache.length
        if past + T > self.config.context_length and (attention_mask is None or cache is None):
            raise ValueError(f"{past + T} tokens, but context_length {self.config.context_length}")
        if attention_mask is None and cache is None and ids.is_cpu and torch.is_autocast_enabled("cpu"):
            # A CPU builds new bf16 kernels for every shape, so lengths are padded to multiples of 8, which saves
            # 14 % of SFT's forward and backward. No token sees the padding to its right, which is cut off at the end.
            ids = F.pad(ids, (0, min(-T % 8, self.config.context_length - T)))
            T = ids.size(1)
        # Positions for RoPE, and the mask: True where a token (row) sees another (column). Mostly there is no mask, and
        # `attend` shows every token itself and its past.
        positions, mask = slice(past, past + T), None
        if attention_mask is not None or (past > 0 and T > 1):
            key = torch.arange(past + T, device=ids.device)  # columns: all tokens so far
            query = key[past:, None]  # rows: the T that are read now
            mask = key <= query  # (T, past+T)
        if attention_mask is not None:  # nobody sees padding, and it takes up no position
            real = attention_mask.bool()  # (B, past+T)
            positions = (real.cumsum(1) - 1).clamp(min=0)[:, past:]  # (B, T)
            # But padding may see itself: a softmax over nothing is NaN, which would spread.
            mask = (mask & real[:, None, :] | (key == query))[:, None]  # (B, 1, T, past+T)
        x = self.embed(ids)  # (B, T, C)
        if extra is not None:
            x = x + F.pad(extra, (0, 0, 0, T - asked))
        cos = self.cos[positions].unsqueeze(-2)  # (T, 1, D) or (B, T, 1, D)
        sin = self.sin[positions].unsqueeze(-2)
        for layer, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, cache, layer, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache, layer)
        if cache is not None:
            cache.length += T
        return self.norm(x[:, :asked])

    def head(self, h):
        """States (..., C) -> logits (..., V). Call it only on the positions you need: V is large."""
        return F.linear(h, self.embed.weight if self.config.tied else self.lm_head.weight)

    def forward(self, ids, attention_mask=None, cache=None):
        """ids (B, T) -> logits (B, T, V); position t predicts token t+1. See `hidden`."""
        return self.head(self.hidden(ids, attention_mask, cache))


def deepen(gpt, extra):
    """A copy of `gpt` with `extra` fresh blocks on top. They start as the identity, so until the
    copy is trained it computes what `gpt` does."""
    config = replace(gpt.config, layers=gpt.config.layers + extra)
    deeper = GPT(config).to(gpt.embed.weight.device)
    deeper.load_state_dict(deeper.state_dict() | gpt.state_dict())
    return deeper


TOLD = 2  # numbers that `surprisals` gives for each token


class ScalarModel(nn.Module):
    """The backbone of `gpt` (not a copy: an untied head is taken away from it) with one number per position in place of
    the logits.

    The reward model reads it at the last real token, the PPO critic everywhere. With a `reader`, a GPT that stays as
    it is, it is also told how likely the reader found each token (`surprisals`).
    """

    def __init__(self, gpt, reader=None):
        super().__init__()
        gpt.lm_head = None  # an untied head is unused here, and would be saved for nothing
        self.config = gpt.config
        self.gpt = gpt
        self.score = nn.Linear(gpt.config.width, 1, bias=False)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(gpt.config.width + 1))  # Stiennon et al. 2020
        self.reader = reader
        if reader is not None:
            reader.requires_grad_(False)
            self.surprisal = nn.Linear(TOLD, gpt.config.width, bias=False)
            nn.init.normal_(self.surprisal.weight, std=0.02)

    def hidden(self, ids, attention_mask=None, told=None):
        """ids (B, T) -> states (B, T, C). `told` (B, T, 2): the reader's surprisals, if they are at hand."""
        if self.reader is None:
            return self.gpt.hidden(ids, attention_mask)
        told = surprisals(self.reader, ids, attention_mask) if told is None else told
        return self.gpt.hidden(ids, attention_mask, extra=self.surprisal(told.to(self.surprisal.weight.dtype)))

    def forward(self, ids, attention_mask=None, told=None):
        """ids (B, T) -> raw rewards (B, T), one after each token: `reward_shift` is not subtracted yet."""
        hidden = self.hidden(ids, attention_mask, told)  # (B, T, C)
        with torch.autocast(ids.device.type, enabled=False):  # in bfloat16, 4.00 and 4.01 are the same number
            return self.score(hidden.to(self.score.weight.dtype)).squeeze(-1)


@torch.no_grad()
def surprisals(gpt, ids, attention_mask=None):
    """What `gpt` thought of each token before it came: ids (B, T) -> (B, T, 2), its log-prob (the surprisal
    with the sign changed), and that log-prob minus the likeliest token's: both 0 or less, in nats. 0 for the first real
    token."""
    states, tokens = gpt.hidden(ids, attention_mask)[:, :-1], ids[:, 1:]  # (B, T-1, C), (B, T-1)
    told = []
    for state, token in zip(states.flatten(0, 1).split(256), tokens.flatten().split(256)):  # all logits may be too many
        logprobs = gpt.head(state).float().log_softmax(-1)  # (256, V)
        said = logprobs.gather(-1, token[:, None]).squeeze(-1)  # (256,)
        told.append(torch.stack([said, said - logprobs.amax(-1)], -1))
    told = torch.cat(told).view(*tokens.shape, TOLD)  # (B, T-1, 2)
    if attention_mask is not None:  # a token after padding is a row's first: nothing predicts it
        told = told * attention_mask[:, :-1, None]
    return F.pad(told, (0, 0, 1, 0))  # (B, T, 2): nothing predicts the first token


def token_logprobs(logits, targets, temperature=1.0):
    """log Pr(targets) at each position: logits (..., V), targets (...) -> (...), in nats.

    Nothing is shifted here: pass logits[:, :-1] with ids[:, 1:]. `temperature` is the sampler's, > 0.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


# ---- inference -----------------------------------------------------------------------------------

class KVCache:
    """Keys and values of the tokens read so far, in two buffers allocated once, at the start."""

    def __init__(self, config, batch, max_len, device, dtype):
        shape = (config.layers, batch, config.kv_heads, max_len, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held; `GPT.hidden` advances it after the last layer

    def write(self, layer, k, v):
        """Append k, v (B, K, T, D) to a layer's; return all of them, (B, K, length+T, D) each."""
        keys, values, end = self.keys[layer], self.values[layer], self.length + k.size(2)
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, rows):
        """Drop every row not in the list `rows`."""
        for buffer in (self.keys, self.values):
            buffer[:, : len(rows), :, : self.length] = buffer[:, rows, :, : self.length]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]


def truncate(logits, top_k, top_p):
    """Keep the top_k likeliest tokens and, of these, the smallest set that holds at least top_p
    of their probability; set the other logits to -inf. logits (B, V) -> (B, V)."""
    values, order = logits.sort(dim=-1, descending=True)
    if top_k is not None:
        values[:, top_k:] = -math.inf
    if top_p is not None:
        probs = values.softmax(-1)
        # Compare the mass *before* each token, so the token that crosses top_p stays in.
        values[probs.cumsum(-1) - probs >= top_p] = -math.inf
    return torch.empty_like(logits).scatter_(-1, order, values)


def sample(logits, temperature, top_k, top_p, generator):
    """logits (B, V) -> token ids (B,) and their log-probs (B,) under the sampling distribution.

    Temperature 0 takes the likeliest token; its log-prob is then the one at temperature 1. So does any below 1e-6,
    where sampling would do the same and, for the tiniest, the division would overflow.
    """
    logits = logits.float()
    if temperature < 1e-6:
        ids = logits.argmax(-1)
        logprobs = logits.log_softmax(-1)
    else:
        logits = logits / temperature
        if top_k is not None or top_p is not None:
            logits = truncate(logits, top_k, top_p)
        logprobs = logits.log_softmax(-1)
        # Inverse-CDF sampling: the token whose step of the CDF contains u. 0 < u <= the total, so u
        # falls neither past the end nor on a step of height 0. 25 times faster than multinomial.
        cdf = logprobs.exp().cumsum(-1)  # (B, V)
        u = 1 - torch.rand(len(cdf), 1, device=cdf.device, generator=generator)
        ids = torch.searchsorted(cdf, u * cdf[:, -1:]).squeeze(-1)
    return ids, logprobs.gather(-1, ids[:, None]).squeeze(-1)


@torch.inference_mode()
def decode(model, prompts, max_new_tokens, temperature, top_k, top_p, eos_ids, generator):
    """Yield, at each step, [(row, token id, log-prob)] for the rows that are still running."""
    context = model.config.context_length
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ValueError(f"prompt {row} has {len(prompt)} tokens, not 1 to {context - 1}")
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and top_p <= 0):
        raise ValueError(f"temperature {temperature}, top_k {top_k} or top_p {top_p} out of range: expected at least 0, "
                         "at least 1, above 0")
    lengths = [len(prompt) for prompt in prompts]
    limits = [min(max_new_tokens, context - length) for length in lengths]  # new tokens at most, row by row
    width, steps = max(lengths, default=0), max(limits, default=0)
    weight = model.embed.weight
    # Padding goes on the left, so that every row's next token lands in the same column.
    padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    ids = torch.tensor(padded, device=weight.device)  # (B, width)
    mask = None
    if min(lengths, default=0) < width:
        first = width - torch.tensor(lengths, device=weight.device)[:, None]  # (B, 1): where the row's text begins
        mask = torch.arange(width + steps, device=weight.device) >= first  # (B, width+steps)
    cache = KVCache(model.config, len(prompts), width + steps, weight.device, weight.dtype)
    rows = list(range(len(prompts)))  # rows[b] is the prompt that the batch's row b continues
    done = [False] * len(prompts)  # by prompt: one that is done may stay in the batch for a while
    for step in range(1, steps + 1):
        seen = None if mask is None else mask[:, : cache.length + ids.size(1)]
        h = model.hidden(ids, seen, cache)[:, -1]  # the prompt at the first step, then one token
        ids, logprobs = sample(model.head(h), temperature, top_k, top_p, generator)
        drawn = list(zip(rows, ids.tolist(), logprobs.tolist()))
        yield [item for item in drawn if not done[item[0]]]
        for row, token, _ in drawn:
            done[row] = done[row] or token in eos_ids or step == limits[row]
        # Dropping rows copies the cache, so wait until a quarter of them are done, but never let a
        # row run past the context: there is no position left for it.
        kept = [b for b, row in enumerate(rows) if not done[row]]
        if not kept:
            return
        if len(kept) <= 0.75 * len(rows) or any(step == limits[row] for row in rows):
            rows = [rows[b] for b in kept]
            ids = ids[kept]
            mask = None if mask is None else mask[kept]
            cache.keep(kept)
        ids = ids[:, None]


def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos_ids=(), generator=None):
    """Continue every prompt (a list of id lists, any lengths) until one of eos_ids.

    -> (id lists, including the end token if it came; lists of their log-probs, floats in nats, under
    the very distribution that was sampled from: after temperature, top_k and top_p). temperature 0 is
    greedy (its log-probs are those at temperature 1). A row also ends at max_new_tokens or when the
    context is full. `generator` must be on the model's device. Raises ValueError for an empty prompt or one
    that fills the context.
    """
    answers, logprobs = [[] for _ in prompts], [[] for _ in prompts]
    for drawn in decode(model, prompts, max_new_tokens, temperature, top_k, top_p, eos_ids, generator):
        for row, token, logprob in drawn:
            answers[row].append(token)
            logprobs[row].append(logprob)
    return answers, logprobs


def stream(model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos_ids=(), generator=None):
    """Like `generate` for one prompt, but yields each token id as it is drawn."""
    for drawn in decode(model, [prompt], max_new_tokens, temperature, top_k, top_p, eos_ids, generator):
        yield drawn[0][1]


# ---- Hugging Face names --------------------------------------------------------------------------

def hf_layout(config, scalar=False, reader=None):
    """Our name -> {Hugging Face name: shape}; if several, ours is theirs stacked along dim 0. `scalar`: of a
    ScalarModel; `reader` is the GPTConfig of its reader, which no model of Hugging Face's has: those names are ours."""
    C, D, F_ = config.width, config.head_dim, config.ffn_width
    queries, keys = (config.heads * D, C), (config.kv_heads * D, C)
    layout = {"embed.weight": {"model.embed_tokens.weight": (config.vocab_size, C)}}
    for i in range(config.layers):
        layer = {
            "attention_norm": {"input_layernorm": (C,)},
            "attention.qkv": {"self_attn.q_proj": queries, "self_attn.k_proj": keys,
                              "self_attn.v_proj": keys},
            "attention.out": {"self_attn.o_proj": queries[::-1]},
            "mlp_norm": {"post_attention_layernorm": (C,)},
            "mlp.gate_up": {"mlp.gate_proj": (F_, C), "mlp.up_proj": (F_, C)},
            "mlp.down": {"mlp.down_proj": (C, F_)},
        }
        if config.qk_norm:
            layer["attention.q_norm"] = {"self_attn.q_norm": (D,)}
            layer["attention.k_norm"] = {"self_attn.k_norm": (D,)}
        for ours, theirs in layer.items():
            layout[f"blocks.{i}.{ours}.weight"] = {
                f"model.layers.{i}.{name}.weight": shape for name, shape in theirs.items()
            }
    layout["norm.weight"] = {"model.norm.weight": (C,)}
    if scalar:
        layout = {f"gpt.{ours}": theirs for ours, theirs in layout.items()}
        layout["score.weight"] = {"score.weight": (1, C)}
    elif not config.tied:
        layout["lm_head.weight"] = {"lm_head.weight": (config.vocab_size, C)}
    if reader:
        layout["surprisal.weight"] = {"surprisal.weight": (C, TOLD)}
        for ours, theirs in hf_layout(reader).items():
            layout[f"reader.{ours}"] = {f"reader.{name}": shape for name, shape in theirs.items()}
    return layout


def to_hf(model):
    """GPT or ScalarModel -> {Hugging Face name: tensor}, copies on the CPU, for `model.safetensors`."""
    state, named, reader = model.state_dict(), {}, getattr(model, "reader", None)
    for ours, theirs in hf_layout(model.config, isinstance(model, ScalarModel), reader and reader.config).items():
        parts = state[ours].split([shape[0] for shape in theirs.values()])
        named.update((name, part.to("cpu", copy=True)) for name, part in zip(theirs, parts))
    return named


def from_hf(state, config, reader=None):
    """Undo `to_hf`: -> state_dict of a GPT, or of a ScalarModel if there is a `score.weight`; `reader` is the
    GPTConfig of its reader. Raises ValueError naming every tensor that is missing, unknown or of the wrong shape."""
    state = dict(state)
    layout = hf_layout(config, "score.weight" in state, reader)
    expected = {name: shape for theirs in layout.values() for name, shape in theirs.items()}
    head, embedding = state.get("lm_head.weight"), state.get("model.embed_tokens.weight")
    if config.tied and head is not None and embedding is not None and torch.equal(head, embedding):
        del state["lm_head.weight"]  # some checkpoints store a tied head twice
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [f"{name} is {tuple(state[name].shape)}, expected {shape}"
                 for name, shape in expected.items()
                 if name in state and tuple(state[name].shape) != shape]
    if problems:
        raise ValueError("; ".join(problems))
    return {ours: torch.cat([state[name] for name in theirs]) for ours, theirs in layout.items()}


def hf_config(config, **extra):
    """GPTConfig -> the dict of `config.json`; `extra` is added (num_labels=1: a ScalarModel)."""
    family = "Qwen3" if config.qk_norm else "Llama"
    task = "ForSequenceClassification" if "num_labels" in extra else "ForCausalLM"
    return {
        "architectures": [family + task],
        "model_type": family.lower(),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,  # where older readers look
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **extra,
    }


def config_from_hf(values):
    """The dict of a `config.json` -> GPTConfig. Raises ValueError naming what is not implemented."""
    # The first is of older files, the second of newer ones; scaling that either asks for counts.
    ropes = [values.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    types = [rope.get("rope_type", rope.get("type", "default")) for rope in ropes]
    found = {"hidden_act": "silu", **values, "rope_type": types[1] if types[0] == "default" else types[0],
             "rope_parameters": [value for value in ropes[1].values() if isinstance(value, dict)],  # one for each layer type
             "layer_types": sorted({*(values.get("layer_types") or ())} - {"full_attention"})}
    implemented = {"model_type": ["llama", "qwen3"], "hidden_act": ["silu"], "rope_type": ["default"],
                   **dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window"), [None, False]),
                   **dict.fromkeys(("rope_parameters", "layer_types"), [[]])}
    for name, allowed in implemented.items():
        if found.get(name) not in allowed:
            wanted = " or ".join("none" if value == [] else repr(value) for value in allowed)
            raise ValueError(f"config.json: {name} {found.get(name)!r} is not implemented; expected {wanted}")
    qk_norm = values["model_type"] == "qwen3"
    try:
        return GPTConfig(
            vocab_size=values["vocab_size"],
            context_length=values["max_position_embeddings"],
            layers=values["num_hidden_layers"],
            heads=values["num_attention_heads"],
            kv_heads=values.get("num_key_value_heads"),
            width=values["hidden_size"],
            ffn_width=values["intermediate_size"],
            head_dim=values.get("head_dim") or (128 if qk_norm else None),  # Qwen3's default
            rope_theta=ropes[1].get("rope_theta") or values.get("rope_theta") or 10000.0,
            norm_eps=values.get("rms_norm_eps", 1e-6),
            qk_norm=qk_norm,
            tied=values.get("tie_word_embeddings", False),
        )
    except KeyError as key:
        raise ValueError(f"config.json: {key} is missing") from None
