"""Our folders in `transformers`, and its Llama and Qwen3 folders here. Skipped where it is not installed:
`pip install transformers==5.24.0`. GGUF files need `pip install gguf` too."""

import dataclasses
import json

import pytest
import torch

import world
from model import GPT, GPTConfig, ScalarModel, generate, to_hf
from test_tokenizer import random_texts
from tokenizer import CHAT_TEMPLATE, render_chat, train_bpe
from training import InputError, load_checkpoint, save_checkpoint

transformers = pytest.importorskip("transformers")
TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Name two birds."},
        {"role": "assistant", "content": "An owl and a wren."}, {"role": "user", "content": "One more?"}]


@pytest.fixture(scope="module")
def documents():
    return world.documents(400, 1)


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_bpe(documents, 1000)


def shaken(model):
    """Every weight random: fresh blocks are the identity, which would hide most mistakes."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return model.eval().requires_grad_(False)


def ours(tokenizer, qk_norm=True, tied=False):
    return shaken(GPT(GPTConfig(tokenizer.vocab_size, context_length=96, layers=2, heads=4, kv_heads=2, width=32,
                                ffn_width=48, qk_norm=qk_norm, tied=tied)))


def test_tokens_are_the_same_on_ten_thousand_strings(tokenizer, documents, tmp_path, measured):
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    real = [line for document in documents for line in document.split("\n") if line][:5000]
    texts = real + [text.replace("<|im_end|>", "") for text in random_texts(10_000 - len(real), seed=9)]
    different = sum(theirs.encode(text, add_special_tokens=False) != tokenizer.encode(text) for text in texts)
    measured("encode, texts of 10,000 that differ", f"transformers {transformers.__version__}", different, 0, peer=True)


@pytest.mark.parametrize("talk, generation_prompt", [(TALK[:3], False), (TALK, True), (TALK[1:2], True)])
def test_chats_are_the_same(talk, generation_prompt, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(talk, add_generation_prompt=generation_prompt, tokenize=False)
    assert theirs.encode(text, add_special_tokens=False) == render_chat(tokenizer, talk, generation_prompt)[0]


@pytest.mark.parametrize("qk_norm, tied", [(True, False), (False, True)])
def test_greedy_text_is_the_same(qk_norm, tied, tokenizer, tmp_path):
    """With the end tokens that generation_config.json names."""
    model = ours(tokenizer, qk_norm, tied)
    save_checkpoint(tmp_path, model, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for seed in range(5):
        prompt = torch.randint(5, 900, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
        expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)[0, 7:].tolist()
        ends = (tokenizer.im_end_id, tokenizer.endoftext_id)
        assert generate(model, [prompt], 40, temperature=0.0, eos_ids=ends)[0][0] == expected


def test_the_reward_model_is_a_sequence_classifier(tokenizer, tmp_path, measured):
    model = shaken(ScalarModel(ours(tokenizer)))
    save_checkpoint(tmp_path, model, tokenizer, reward_shift=0.3, reward_scale=2.0)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert theirs.config.num_labels == 1
    ids, _ = render_chat(tokenizer, TALK[:3])
    error = (theirs(torch.tensor([ids])).logits[0, 0] - model(torch.tensor([ids]))[0, -1]).abs()
    measured("score of the reward model's folder", f"transformers {transformers.__version__}", error, 1e-4, peer=True)


@pytest.mark.parametrize("qk_norm, tied", [(True, False), (False, True)])
def test_the_reward_model_with_a_reader_brings_its_code(qk_norm, tied, tokenizer, tmp_path, measured):
    model = shaken(ScalarModel(ours(tokenizer, qk_norm, tied), shaken(ours(tokenizer, qk_norm, tied))))
    with torch.no_grad():
        model.surprisal.weight.mul_(50)
    save_checkpoint(tmp_path, model, tokenizer, reward_shift=0.3, reward_scale=2.0)
    with pytest.raises(ValueError, match="trust_remote_code"):  # never a model without its reader
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=False)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
    long, short = (render_chat(tokenizer, TALK[:n])[0] for n in (3, 1))
    expected = torch.stack([model(torch.tensor([ids]))[0, -1] for ids in (long, short)])
    padding = [tokenizer.pad_id] * (len(long) - len(short))
    off = [0] * len(padding)
    for row, mask in ((padding + short, off + [1] * len(short)), (short + padding, [1] * len(short) + off)):
        found = theirs(torch.tensor([long, row]), attention_mask=torch.tensor([[1] * len(long), mask]).bool()).logits[:, 0]
        measured("score of a reward model with a reader", f"transformers {transformers.__version__}, our code in the folder",
                 (found - expected).abs().max(), 1e-4, peer=True)
    unmasked = theirs(torch.tensor([long, short + padding])).logits[:, 0]
    assert torch.allclose(unmasked, expected, atol=1e-5)
    theirs.config.pad_token_id = None  # as where <|im_end|> is the padding, too: no guess where a row ends
    assert torch.allclose(theirs(torch.tensor([long])).logits[:, 0], expected[:1], atol=1e-5)
    with pytest.raises(ValueError, match="no padding token"):
        theirs(torch.tensor([long, short + padding]))
    with torch.no_grad():
        model.surprisal.weight.zero_()
    assert (model(torch.tensor([long]))[0, -1] - expected[0]).abs() > 1e-2  # it matters what it is told


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 96}


@pytest.mark.parametrize("kind, settings", [
    ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": False, "rope_theta": 500000.0}),
    ("Llama", {"num_key_value_heads": 2, "head_dim": 24, "rms_norm_eps": 1e-3}),
    ("Qwen3", {"num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True}),
    ("Qwen3", {"num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": False, "rope_theta": 1000.0})])
@pytest.mark.parametrize("how", ["whole", "sharded", "bfloat16"])
def test_their_folders_open_here(kind, settings, how, tokenizer, tmp_path, measured):
    config = getattr(transformers, f"{kind}Config")(vocab_size=tokenizer.vocab_size + 3, **SMALL, **settings)
    theirs = shaken(getattr(transformers, f"{kind}ForCausalLM")(config))
    if how == "bfloat16":
        theirs = theirs.to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, **({"max_shard_size": "40KB"} if how == "sharded" else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == (how == "sharded")
    tokenizer.save(tmp_path)
    model, _, _ = load_checkpoint(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(tokenizer.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        error = (theirs(ids).logits - model(ids)).abs().max()
    measured(f"logits of {kind} folders, {how}", f"transformers {transformers.__version__}", error, 1e-4, peer=True)


@pytest.mark.parametrize("kind, settings, named", [
    ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
    ("Llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
    ("Llama", {"attention_bias": True}, "attention_bias"), ("Llama", {"mlp_bias": True}, "mlp_bias"),
    ("Llama", {"hidden_act": "gelu"}, "hidden_act"), ("Qwen3", {"attention_bias": True}, "attention_bias"),
    ("Qwen2", {}, "model_type 'qwen2'"), ("Mistral", {}, "model_type 'mistral'"), ("Gemma", {}, "model_type 'gemma'")])
def test_what_is_not_implemented_is_refused_by_name(kind, settings, named, tokenizer, tmp_path):
    config = getattr(transformers, f"{kind}Config")(vocab_size=tokenizer.vocab_size, num_key_value_heads=2, **SMALL,
                                                    **settings)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    with pytest.raises(InputError, match=named):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("qk_norm, tied", [(True, False), (False, True)])
def test_a_gguf_file_holds_what_the_folder_holds(qk_norm, tied, tokenizer, tmp_path):
    """Read by gguf alone. llama.cpp's "llama" turns rows 2i and 2i + 1 of a head together, we i and i + half; its
    "qwen3" turns them like us. So rows change places in q and k of the first, and nowhere else."""
    gguf = pytest.importorskip("gguf")
    from tools.export_gguf import export

    model = ours(tokenizer, qk_norm, tied)
    save_checkpoint(tmp_path / "folder", model, tokenizer)
    export(tmp_path / "folder", tmp_path / "f32.gguf", "f32")
    reader = gguf.GGUFReader(tmp_path / "f32.gguf")
    read = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    half = model.config.head_dim // 2
    for layer in range(model.config.layers):
        for kind, heads in (("q", 4), ("k", 2)):
            if not qk_norm:
                stored = read[f"blk.{layer}.attn_{kind}.weight"].view(heads, 2 * half, -1)
                first, second = stored[:, 0::2], stored[:, 1::2]
                read[f"blk.{layer}.attn_{kind}.weight"] = torch.cat([first, second], 1).flatten(0, 1)
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    if qk_norm:
        names |= {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
    pairs = {f"blk.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for i in range(2) for a, b in names.items()}
    pairs |= {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    pairs |= {} if tied else {"output.weight": "lm_head.weight"}
    assert read.keys() == pairs.keys()
    expected = to_hf(model)
    assert all(torch.equal(read[a], expected[b]) for a, b in pairs.items())

    def value(key):
        return reader.fields[key].contents()

    arch = "qwen3" if qk_norm else "llama"
    assert value("general.architecture") == arch
    shape = {"context_length": 96, "block_count": 2, "embedding_length": 32, "feed_forward_length": 48,
             "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8,
             "attention.value_length": 8, "rope.dimension_count": 8, "rope.freq_base": 10000.0,
             "vocab_size": tokenizer.vocab_size}
    assert {key: value(f"{arch}.{key}") for key in shape} == shape
    assert value(f"{arch}.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    vocab = json.loads((tmp_path / "folder" / "tokenizer.json").read_text("utf-8"))["model"]
    assert value("tokenizer.ggml.tokens") == sorted(vocab["vocab"], key=vocab["vocab"].get)
    assert value("tokenizer.ggml.merges") == [" ".join(merge) for merge in vocab["merges"]]
    control = [i for i, kind in enumerate(value("tokenizer.ggml.token_type")) if kind == gguf.TokenType.CONTROL]
    assert control == sorted(tokenizer.specials.values())
    ends = [value(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")]
    assert ends == [tokenizer.endoftext_id, tokenizer.im_end_id, tokenizer.pad_id]
    assert value("tokenizer.chat_template") == CHAT_TEMPLATE and not value("tokenizer.ggml.add_bos_token")


@pytest.mark.parametrize("qk_norm, tied", [(True, False), (False, True)])
@pytest.mark.parametrize("kind, limit", [("f32", 1e-4), ("f16", 0.01), ("q8_0", 0.2)])
def test_logits_of_a_gguf_file(qk_norm, tied, kind, limit, tokenizer, tmp_path, measured):
    pytest.importorskip("gguf")
    from tools.export_gguf import export

    model = ours(tokenizer, qk_norm, tied)
    save_checkpoint(tmp_path / "folder", model, tokenizer)
    export(tmp_path / "folder", tmp_path / "model.gguf", kind)
    # transformers does not read Qwen3's head size from the file.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, head_dim=model.config.head_dim)
    ids = torch.randint(tokenizer.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        error = (theirs(ids).logits - model(ids)).abs().max()
    name = "qwen3" if qk_norm else "llama"
    measured(f"logits of a GGUF file, {name}, {kind}", f"transformers {transformers.__version__}", error, limit,
             peer=True)


def test_a_reward_model_and_an_unknown_rule_are_not_exported(tokenizer, tmp_path):
    pytest.importorskip("gguf")
    from tools.export_gguf import export

    save_checkpoint(tmp_path / "reward", shaken(ScalarModel(ours(tokenizer))), tokenizer)
    with pytest.raises(InputError, match="a reward model"):
        export(tmp_path / "reward", tmp_path / "model.gguf")
    save_checkpoint(tmp_path / "other", ours(tokenizer), dataclasses.replace(tokenizer, pattern=r"\s|\S+"))
    with pytest.raises(InputError, match="no rule for this tokenizer"):
        export(tmp_path / "other", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
