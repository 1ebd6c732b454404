"""The network against plain numpy, its caches and masks against themselves, the sampler."""

import json
import math

import numpy as np
import pytest
import torch

from model import (GPT, GPTConfig, KVCache, ScalarModel, attend, config_from_hf, deepen, from_hf, generate,
                   hf_config, sample, stream, surprisals, to_hf, token_logprobs)


def tiny(scale=0.3, **changes):
    """A small GPT with every weight random: the zero initialisation would hide most mistakes."""
    settings = dict(vocab_size=23, context_length=24, layers=2, heads=4, kv_heads=2, width=16,
                    ffn_width=20, head_dim=6, qk_norm=True, tied=False)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**settings, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=scale)
    return model.requires_grad_(False)


def random_ids(*shape, seed=1):
    return torch.randint(0, 23, shape, generator=torch.Generator().manual_seed(seed))


def numpy_logits(state, config, ids):
    """One sequence, one head and one position at a time, from the Hugging Face tensors."""
    w = {name: tensor.double().numpy() for name, tensor in state.items()}
    H, K, D = config.heads, config.kv_heads, config.head_dim

    def norm(x, weight):
        return x / math.sqrt(np.mean(x * x) + config.norm_eps) * weight

    def turn(x, position):
        out = np.empty(D)
        for i in range(D // 2):
            angle = position * config.rope_theta ** (-2 * i / D)
            a, b = x[i], x[i + D // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + D // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = w["model.embed_tokens.weight"][ids]
    for n in range(config.layers):
        p = {k.split(".", 3)[3]: v for k, v in w.items() if k.startswith(f"model.layers.{n}.")}
        normed = np.stack([norm(row, p["input_layernorm.weight"]) for row in x])
        q, k, v = (normed @ p[f"self_attn.{c}_proj.weight"].T for c in "qkv")
        mixed = np.zeros((len(ids), H * D))
        for h in range(H):
            g = h // (H // K)
            queries, keys = q[:, h * D:(h + 1) * D], k[:, g * D:(g + 1) * D]
            values = v[:, g * D:(g + 1) * D]
            if config.qk_norm:
                queries = [norm(row, p["self_attn.q_norm.weight"]) for row in queries]
                keys = [norm(row, p["self_attn.k_norm.weight"]) for row in keys]
            for t in range(len(ids)):
                scores = np.array([turn(queries[t], t) @ turn(keys[s], s) / math.sqrt(D)
                                   for s in range(t + 1)])
                weights = np.exp(scores - scores.max())
                mixed[t, h * D:(h + 1) * D] = weights / weights.sum() @ values[:t + 1]
        x = x + mixed @ p["self_attn.o_proj.weight"].T
        normed = np.stack([norm(row, p["post_attention_layernorm.weight"]) for row in x])
        gate = normed @ p["mlp.gate_proj.weight"].T
        up = normed @ p["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p["mlp.down_proj.weight"].T
    x = np.stack([norm(row, w["model.norm.weight"]) for row in x])
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False, "kv_heads": 4, "tied": True},
                                     {"kv_heads": 1, "rope_theta": 100.0, "norm_eps": 0.1}])
def test_forward_equals_plain_numpy(changes, measured):
    model = tiny(**changes)
    ids = random_ids(2, 9)
    for row, logits in zip(ids, model(ids)):
        expected = numpy_logits(to_hf(model), model.config, row.numpy())
        measured("the whole network", "numpy, one head and one position at a time",
                 np.abs(logits.numpy() - expected).max() / np.abs(expected).max(), 1e-5)


def test_a_token_depends_on_the_past_only():
    model = tiny()
    states = torch.randn(1, 8, 16, requires_grad=True)
    model.embed.forward = lambda ids: states
    model(random_ids(1, 8))[0, 4].sum().backward()
    assert (states.grad[0, :5].abs().sum(-1) > 0).all()
    assert (states.grad[0, 5:] == 0).all()


def test_new_blocks_are_the_identity():
    model = GPT(GPTConfig(vocab_size=23, context_length=8, layers=2, width=16, ffn_width=20))
    ids = random_ids(1, 8)
    assert torch.equal(model.hidden(ids), model.norm(model.embed(ids)))
    assert 0.015 < model.embed.weight.std() < 0.025


def test_a_deeper_copy_starts_as_the_same_function():
    model, ids = tiny(), random_ids(2, 9)
    deeper = deepen(model, 2)
    assert len(deeper.blocks) == len(model.blocks) + 2 == deeper.config.layers
    assert torch.equal(deeper(ids), model(ids))
    deeper.embed.weight.data.zero_()
    assert not torch.equal(deeper(ids), model(ids))  # a copy
    deeper = deepen(model, 1)
    deeper(ids).sum().backward()
    assert deeper.blocks[-1].mlp.down.weight.grad.any()  # the new block learns at once
    assert deepen(model, 0).config == model.config


def test_padding_and_batch_do_not_matter():
    model = tiny()
    rows = [random_ids(length, seed=length) for length in (3, 7, 5)]
    alone = [model(row[None])[0] for row in rows]
    for side in ("left", "right"):
        ids, mask = torch.full((3, 9), 11), torch.zeros(3, 9, dtype=torch.int64)
        for i, row in enumerate(rows):
            where = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
            ids[i, where], mask[i, where] = row, 1
        together = model(ids, mask)
        assert together.isfinite().all()
        for i in range(3):
            torch.testing.assert_close(together[i, mask[i] == 1], alone[i], atol=1e-5, rtol=1e-5)
    unmasked = model(ids)  # still padded on the right: causality alone protects real tokens
    torch.testing.assert_close(unmasked[0, :3], alone[0], atol=1e-5, rtol=1e-5)


def test_padding_is_safe_in_any_attention_kernel(monkeypatch):
    """torch's CPU kernel turns a query without keys into 0, the textbook softmax into NaN."""
    def textbook(q, k, v, attn_mask, **_):
        scores = q @ k.repeat_interleave(q.size(1) // k.size(1), 1).mT / math.sqrt(q.size(-1))
        weights = scores.masked_fill(~attn_mask, -math.inf).softmax(-1)
        return weights @ v.repeat_interleave(q.size(1) // k.size(1), 1)

    model, ids, mask = tiny(), random_ids(1, 6), torch.tensor([[0, 0, 1, 1, 1, 1]])
    expected = model(ids, mask)
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", textbook)
    torch.testing.assert_close(model(ids, mask), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_written_out_is_the_fused_one(kv_heads):
    """In bfloat16 on a CPU: to its rounding, values and gradients, of the past only."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, heads, 40, 8).bfloat16().requires_grad_() for heads in (4, kv_heads, kv_heads))
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    ours, fused = attend(q, k, v, None), attend(*exact, None)
    assert ours.dtype == torch.bfloat16 and (ours.float() - fused).abs().max() < 0.03
    weights = torch.randn(fused.shape)
    (ours.float() * weights).sum().backward(), (fused * weights).sum().backward()
    for x, y in zip((q, k, v), exact):
        assert (x.grad.float() - y.grad).abs().max() < 0.02 * y.grad.abs().max()


def test_bfloat16_forward_is_the_float32_one_to_its_rounding():
    """With a length that is rounded up inside, one that the context does not let, and one token too many."""
    for qk_norm, length in ((False, 13), (True, 13), (True, 21)):
        model, ids = tiny(context_length=21, qk_norm=qk_norm), random_ids(2, length)
        exact = model(ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(ids)
            assert rounded.shape == exact.shape
            assert 0 < (rounded - exact).abs().max() < 0.06 * exact.abs().max()
            with pytest.raises(ValueError, match="22 tokens, but context_length 21"):
                model(random_ids(2, 22))


@pytest.mark.parametrize("reader", [False, True])
def test_scalar_model_ignores_padding(reader):
    model = ScalarModel(tiny(), tiny(1.0, layers=1) if reader else None)
    ids = random_ids(1, 6)
    value = model(ids)
    assert value.shape == (1, 6)
    pad = torch.full((1, 3), 11)
    left = model(torch.cat([pad, ids], 1), torch.tensor([[0] * 3 + [1] * 6]))
    right = model(torch.cat([ids, pad], 1), torch.tensor([[1] * 6 + [0] * 3]))
    torch.testing.assert_close(left[:, 3:], value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(right[:, :6], value, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = model(ids)  # the states are, the number read off them is not
    assert coarse.dtype == torch.float32 and not torch.equal(coarse, coarse.bfloat16().float())
    for kind, error in ((torch.float64, 1e-5), (torch.bfloat16, 0.2)):  # as whoever wants more, or less, may have it
        torch.testing.assert_close(model.to(kind)(ids).float(), value, atol=error, rtol=0)
    torch.manual_seed(0)
    wide = ScalarModel(GPT(GPTConfig(vocab_size=5, layers=1, width=1024)))
    assert wide.score.weight.std().item() == pytest.approx(1025 ** -0.5, rel=0.1)


def test_surprisals_are_what_the_reader_thought_of_each_token():
    reader, ids = tiny(), random_ids(3, 9)
    found = surprisals(reader, ids)
    assert found.shape == (3, 9, 2) and not found[:, 0].any()
    for b in range(3):
        for t in range(1, 9):
            p = reader(ids[b:b + 1, :t])[0, -1].double().softmax(-1)  # from what came before, and nothing else
            assert torch.allclose(found[b, t].double(), torch.stack([p[ids[b, t]], p[ids[b, t]] / p.max()]).log(), atol=1e-5)


def test_a_scalar_model_is_told_what_its_reader_thought():
    model, ids = ScalarModel(tiny(), tiny(1.0, layers=1).requires_grad_(True)), random_ids(2, 7)
    value = model(ids)
    model.gpt.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids).sum().backward()  # 7 tokens, which are padded to 8 there
    assert model.surprisal.weight.grad.any() and all(p.grad is None for p in model.reader.parameters())
    with torch.no_grad():
        model.surprisal.weight.zero_()
        assert torch.allclose(model(ids), model.score(model.gpt.hidden(ids)).squeeze(-1)) and not torch.allclose(model(ids), value)


def test_what_the_reader_thought_can_be_kept(monkeypatch):
    model, ids = ScalarModel(tiny(), tiny(1.0, layers=1)), random_ids(2, 7)
    value, kept = model(ids), surprisals(model.reader, ids)
    monkeypatch.setattr(model.reader, "hidden", None)  # it is not asked again
    assert torch.allclose(model(ids, told=kept), value, atol=1e-6) and not torch.allclose(model(ids, told=kept - 1), value)


@pytest.mark.parametrize("padded", [False, True])
def test_cached_equals_uncached(padded):
    model = tiny()
    ids = random_ids(3, 12)
    mask = (torch.arange(12) >= torch.tensor([[0], [2], [4]])).long() if padded else None
    full = model(ids, mask)
    cache = KVCache(model.config, 3, 12, "cpu", torch.float32)
    start, pieces = 0, []
    for end in (5, 8, 9, 10):  # a prompt, a chunk, two single tokens
        pieces.append(model(ids[:, start:end], None if mask is None else mask[:, :end], cache))
        start = end
    cache.keep([0, 2])
    assert cache.keys.shape[1] == 2 and cache.length == 10
    kept = None if mask is None else mask[[0, 2]]
    last = model(ids[[0, 2], 10:], kept, cache)
    got, want = torch.cat(pieces, 1), full[:, :10]
    if padded:
        got, want = got[mask[:, :10] == 1], want[mask[:, :10] == 1]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, full[[0, 2], 10:], atol=1e-5, rtol=1e-5)


PROMPTS = [random_ids(length, seed=length).tolist() for length in (3, 8, 5, 1, 6)]


def test_a_temperature_that_cannot_divide_is_greedy():
    logits = 50 * torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    for temperature in (1e-37, 1e-40):
        ids, logprobs = sample(logits, temperature, None, None, None)
        assert torch.equal(ids, logits.argmax(-1)) and torch.equal(logprobs, logits.log_softmax(-1).amax(-1))


def test_greedy_is_argmax_of_the_full_forward():
    model = tiny()
    answers, logprobs = generate(model, PROMPTS, 10, temperature=0)
    for prompt, answer, logps in zip(PROMPTS, answers, logprobs):
        text = list(prompt)
        for logp in logps:
            distribution = model(torch.tensor([text]))[0, -1].log_softmax(-1)
            text.append(distribution.argmax().item())
            assert logp == pytest.approx(distribution.max().item(), abs=1e-4)
        assert text[len(prompt):] == answer and len(answer) == 10


def test_recorded_logprobs_are_those_of_a_full_forward():
    model = tiny()
    answers, logprobs = generate(model, PROMPTS * 4, 12, temperature=0.7, eos_ids=(4, 9),
                                 generator=torch.Generator().manual_seed(0))
    assert len({len(answer) for answer in answers}) > 3  # rows did leave at different times
    for prompt, answer, logps in zip(PROMPTS * 4, answers, logprobs):
        ids = torch.tensor([prompt + answer])
        again = token_logprobs(model(ids)[:, :-1], ids[:, 1:], temperature=0.7)
        again = again[0, len(prompt) - 1:]
        torch.testing.assert_close(torch.tensor(logps), again, atol=1e-4, rtol=0)


def test_rows_stop_at_their_own_end():
    model = tiny()
    free, _ = generate(model, PROMPTS, 10, temperature=0)
    eos_ids = (free[0][2], free[2][4])
    answers, logprobs = generate(model, PROMPTS, 10, temperature=0, eos_ids=eos_ids)
    for row, answer, logps in zip(free, answers, logprobs):
        ends = [i for i, token in enumerate(row) if token in eos_ids]
        assert answer == (row[:ends[0] + 1] if ends else row)
        assert len(logps) == len(answer)


def test_rows_stop_where_the_context_ends():
    model = tiny()
    prompts = [[1] * 20, [2] * 23, [3] * 4] * 3 + [[4]] * 9
    answers, _ = generate(model, prompts, 10, temperature=0)
    assert [len(answer) for answer in answers] == [4, 1, 10] * 3 + [10] * 9
    assert answers[0] == generate(model, [[1] * 20], 10, temperature=0)[0][0]
    for bad in ([1] * 24, []):
        with pytest.raises(ValueError, match="prompt 1"):
            generate(model, [[1], bad], 10)
    with pytest.raises(ValueError, match="25 tokens"):
        model(random_ids(1, 25))
    assert generate(model, [], 5) == ([], []) and generate(model, [[1]], 0) == ([[]], [[]])


def test_stream_equals_generate_and_leaves_gradients_on():
    model = tiny()
    options = dict(temperature=0.9, top_k=9, top_p=0.9, eos_ids=(4,))
    head = model.head
    model.head = lambda h: head(h) if not torch.is_grad_enabled() else pytest.fail("grad is on")
    streamed = []
    for token in stream(model, PROMPTS[1], 10, **options,
                        generator=torch.Generator().manual_seed(3)):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        streamed.append(token)
    answers, _ = generate(model, PROMPTS[1:2], 10, **options,
                          generator=torch.Generator().manual_seed(3))
    assert streamed == answers[0]


def test_same_generator_same_text():
    model = tiny()
    runs = [generate(model, PROMPTS, 8, generator=torch.Generator().manual_seed(seed))
            for seed in (5, 5, 6)]
    assert runs[0] == runs[1] and runs[0][0] != runs[2][0]


# Temperature 2 flattens these to sqrt(p): a sampler that truncates first keeps another set.
PROBS = torch.tensor([0.05, 0.4, 0.2, 0.0, 0.25, 0.1])


@pytest.mark.parametrize("temperature, top_k, top_p, allowed", [
    (1.0, None, None, [0, 1, 2, 4, 5]),
    (2.0, None, None, [0, 1, 2, 4, 5]),
    (1.0, 2, None, [1, 4]),
    (1.0, None, 0.6, [1, 4]),
    (2.0, None, 0.6, [1, 2, 4]),
    (1.0, 3, 0.7, [1, 4]),  # of the three kept, 0.4 / 0.85 and 0.25 / 0.85 reach 0.7
    (1.0, 99, 1.0, [0, 1, 2, 4, 5]),
    (1.0, None, 0.01, [1]),
])
def test_sampling_frequencies_and_logprobs(temperature, top_k, top_p, allowed, measured):
    expected = torch.zeros(6)
    expected[allowed] = PROBS[allowed] ** (1 / temperature)
    expected /= expected.sum()
    n = 20000
    logits = PROBS.log().expand(n, 6)
    ids, logprobs = sample(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0))
    assert set(ids.tolist()) == set(allowed)
    torch.testing.assert_close(logprobs.exp(), expected[ids])
    counts = ids.bincount(minlength=6)[allowed]
    chi_square = ((counts - n * expected[allowed]) ** 2 / (n * expected[allowed])).sum()
    measured("sampler, χ² of 20,000 draws", "the softmax, cut off by hand", chi_square, 20)  # p < 0.0005


@pytest.mark.parametrize("extreme, expected", [(0.0, 3), (1 - 2 ** -24, 1)])
def test_no_draw_lands_on_an_impossible_token(monkeypatch, extreme, expected):
    monkeypatch.setattr("torch.rand", lambda *shape, **_: torch.full(shape, extreme))
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 1.0, -math.inf]])
    ids, _ = sample(logits, 1.0, None, None, None)
    assert ids.item() == expected


def test_top_k_keeps_exactly_k_of_equals():
    ids, _ = sample(torch.zeros(500, 6), 1.0, 2, None, torch.Generator().manual_seed(0))
    assert len(set(ids.tolist())) == 2


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}])
def test_generate_refuses_bad_options(options):
    with pytest.raises(ValueError, match="out of range"):
        generate(tiny(), [[1]], 2, **options)


def test_token_logprobs():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[0, 1, 4], [2, 2, 3]])
    expected = (logits / 0.5).softmax(-1).log()
    got = token_logprobs(logits, targets, temperature=0.5)
    for b in range(2):
        for t in range(3):
            assert got[b, t].item() == pytest.approx(expected[b, t, targets[b, t]].item(), 1e-4)
    assert token_logprobs(logits.double(), targets).dtype == torch.float64
    assert token_logprobs(logits.bfloat16(), targets).dtype == torch.float32


@pytest.mark.parametrize("changes", [{}, {"tied": True, "qk_norm": False, "kv_heads": 4}])
@pytest.mark.parametrize("scalar", [False, True, "with a reader"])
def test_hugging_face_roundtrip(changes, scalar):
    reader = tiny(1.0, layers=1, **changes) if scalar == "with a reader" else None
    model = ScalarModel(tiny(**changes), reader) if scalar else tiny(**changes)
    state = to_hf(model)
    assert ("lm_head.weight" in state) == (not scalar and not model.config.tied)
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert not {t.untyped_storage().data_ptr() for t in state.values()} & {p.untyped_storage().data_ptr() for p in model.parameters()}
    config = config_from_hf(json.loads(json.dumps(hf_config(model.config))))
    assert config == model.config
    other = GPT(config)
    other = ScalarModel(other, reader and GPT(reader.config)) if scalar else other
    other.load_state_dict(from_hf(state, config, reader and reader.config))
    assert torch.equal(model(random_ids(2, 7)), other(random_ids(2, 7)))


def test_from_hf_is_strict():
    model = tiny(tied=True)
    state = to_hf(model)
    name = "model.layers.1.self_attn.k_proj.weight"
    missing = {key: value for key, value in state.items() if key != name}
    with pytest.raises(ValueError, match=f"missing {name}"):
        from_hf(missing, model.config)
    with pytest.raises(ValueError, match="unexpected model.extra"):
        from_hf({**state, "model.extra": torch.zeros(1)}, model.config)
    with pytest.raises(ValueError, match=rf"{name} is \(11, 16\), expected \(12, 16\)"):
        from_hf({**state, name: state[name][:11]}, model.config)
    embedding = state["model.embed_tokens.weight"]
    from_hf({**state, "lm_head.weight": embedding.clone()}, model.config)
    with pytest.raises(ValueError, match="unexpected lm_head.weight"):
        from_hf({**state, "lm_head.weight": embedding + 1}, model.config)


def test_config_reads_both_places_of_rope_theta():
    values = hf_config(tiny(rope_theta=5e5).config, pad_token_id=3, num_labels=1)
    assert values["architectures"] == ["Qwen3ForSequenceClassification"]
    assert values["pad_token_id"] == 3 and values["model_type"] == "qwen3"
    for dropped in ("rope_theta", "rope_parameters"):
        rest = {key: value for key, value in values.items() if key != dropped}
        assert config_from_hf(rest).rope_theta == 5e5
    assert config_from_hf({**values, "rope_theta": 1e4}).rope_theta == 5e5  # as transformers 5 has it
    llama = hf_config(tiny(qk_norm=False).config)
    assert llama["architectures"] == ["LlamaForCausalLM"]
    del llama["num_key_value_heads"], llama["tie_word_embeddings"], llama["rms_norm_eps"]
    config = config_from_hf({**llama, "rope_scaling": None})
    assert (config.kv_heads, config.tied, config.norm_eps) == (4, False, 1e-6)
    assert GPTConfig(5, heads=6, width=12).kv_heads == 6


@pytest.mark.parametrize("change, named", [
    ({"model_type": "gpt2"}, "model_type 'gpt2'"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
    ({"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": {"rope_type": "default"}}, "rope_type 'llama3'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_parameters .*yarn"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
])
def test_config_refuses_by_name(change, named):
    values = {**hf_config(tiny().config), "rope_parameters": None, **change}
    with pytest.raises(ValueError, match=named):
        config_from_hf(values)


def test_config_names_what_is_missing():
    values = hf_config(tiny().config)
    del values["hidden_size"]
    with pytest.raises(ValueError, match="hidden_size"):
        config_from_hf(values)
    for bad in ({"kv_heads": 3}, {"head_dim": 5}, {"head_dim": None, "width": 18}):
        with pytest.raises(ValueError):
            tiny(**bad)


@pytest.mark.parametrize("qk_norm, scalar", [(False, False), (True, False), (False, True)])
def test_transformers_gives_the_same_logits(tmp_path, qk_norm, scalar, measured):
    transformers = pytest.importorskip("transformers")
    save_file = pytest.importorskip("safetensors.torch").save_file
    model = tiny(qk_norm=qk_norm, tied=not qk_norm, rope_theta=500.0)
    extra = {"pad_token_id": 0}
    if scalar:
        model, extra = ScalarModel(model).requires_grad_(False), {**extra, "num_labels": 1}
    save_file(to_hf(model), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model.config, **extra)))
    auto = (transformers.AutoModelForSequenceClassification if scalar
            else transformers.AutoModelForCausalLM)
    theirs, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = random_ids(2, 9).clamp(min=1)
    ours = model(ids)[:, -1:] if scalar else model(ids)
    with torch.no_grad():
        error = (theirs(ids).logits - ours).abs().max()
    measured("logits and scores of our folders", f"transformers {transformers.__version__}", error, 1e-4, peer=True)
