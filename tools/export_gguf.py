"""Convert one of our checkpoint folders to a GGUF file, for llama.cpp and the programs built on it.

    pip install gguf                               # `make` does not install it
    python tools/export_gguf.py out/sft sft.gguf
    python tools/export_gguf.py out/sft sft.gguf --type q8_0

Types: f32 is exact, f16 halves the file, q8_0 has 8 bits per weight and one scale per 32 weights. Vectors
(the norms) stay f32, and with q8_0 a matrix whose row length is not a multiple of 32 is stored as f16.

The rules by which tokenizers cut text into words are built into llama.cpp, and a file only names one. None of
them is ours; "tekken" comes nearest: its chunks may be longer than ours, where no token of ours would cross the
border anyway. With the world's tokenizer all of 200 documents of the world, all of 2,317 stories of TinyStories and
7,218 of 7,222 speeches of tinyshakespeare get the same ids (under "smollm" and "qwen2" 7,038 and 7,002 of the speeches).
The differences are words like 'tis (we keep "tis" whole), and words with capitals inside, which tekken cuts in two.
Given the same ids, llama.cpp (llama-cpp-python 0.3.36) reproduces our logits to 2e-5 from an f32 file if its cache is
f32 too (type_k=0, type_v=0).

Left out: reward models, composing accents first (NFC, as Qwen does), and tokenizers whose rule is none of ours, GPT-2's,
SmolLM's, Qwen's and Llama 3's.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import to_hf
from tokenizer import (CHAT_TEMPLATE, ENDOFTEXT, GPT2_PATTERN, GPT2_SINGLE_DIGITS_PATTERN, IM_END, IM_START, PATTERN,
                       _to_chars)
from training import InputError, load_policy

QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
RULES = {PATTERN: "tekken", GPT2_PATTERN: "gpt-2", GPT2_SINGLE_DIGITS_PATTERN: "smollm", QWEN_PATTERN: "qwen2",
         QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama-bpe"}


def interleave(weight, heads):
    """The rows of q or k in the order of llama.cpp's "llama", which rotates rows 2i and 2i + 1 of a head together.
    We, like Hugging Face, rotate row i with row i + half. llama.cpp's "qwen3" does so too and needs none of this."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def export(folder, path, kind="f16"):
    """Writes the file. InputError for what cannot be exported."""
    import gguf

    folder = Path(folder)
    model, tokenizer = load_policy(folder, chats=False)  # refuses a reward model
    if tokenizer.pattern not in RULES:
        raise InputError(f"{folder}: llama.cpp has no rule for this tokenizer, which cuts by {tokenizer.pattern!r}")
    c = model.config
    writer = gguf.GGUFWriter(path, "qwen3" if c.qk_norm else "llama")
    writer.add_name(folder.resolve().name)
    writer.add_context_length(c.context_length)
    writer.add_block_count(c.layers)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.ffn_width)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)
    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[file_types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    # A model may have more rows than its tokenizer has tokens; llama.cpp wants a name for each.
    words = {i: (f"[unused {i}]", gguf.TokenType.UNUSED) for i in range(c.vocab_size)}
    words |= {i: (_to_chars(token), gguf.TokenType.NORMAL) for token, i in tokenizer.ranks.items()}
    words |= {i: (name, gguf.TokenType.USER_DEFINED if name in tokenizer.plain else gguf.TokenType.CONTROL)
              for name, i in tokenizer.specials.items()}
    writer.add_tokenizer_model("gpt2")  # its name for byte-level BPE
    writer.add_tokenizer_pre(RULES[tokenizer.pattern])
    writer.add_token_list([words[i][0] for i in range(c.vocab_size)])
    writer.add_token_types([words[i][1] for i in range(c.vocab_size)])
    vocab = gguf.SpecialVocab(folder, load_merges=True)  # the merges, the roles of tokens, the chat template
    jinja = folder / "chat_template.jinja"
    if jinja.exists():  # as chat.py has it
        vocab.chat_template = jinja.read_text("utf-8")
    elif not vocab.chat_template and IM_START in tokenizer.specials:
        vocab.chat_template = CHAT_TEMPLATE
    if IM_END in tokenizer.specials:
        vocab.special_token_ids.setdefault("eos", tokenizer.specials[IM_END])
    if ENDOFTEXT in tokenizer.specials:
        vocab.special_token_ids.setdefault("bos", tokenizer.specials[ENDOFTEXT])
    vocab.add_special_token = {"bos": False}  # a chat starts with <|im_start|> alone, as in training
    vocab.add_to_gguf(writer, quiet=True)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3 if c.qk_norm else gguf.MODEL_ARCH.LLAMA, c.layers)
    for name, tensor in to_hf(model).items():  # a tied head is not written again: llama.cpp uses the embedding
        array = tensor.float().numpy()
        heads = {"q_proj": c.heads, "k_proj": c.kv_heads}.get(name.split(".")[-2])
        if heads and not c.qk_norm:
            array = interleave(array, heads)
        stored = "f32" if array.ndim == 1 else "f16" if kind == "q8_0" and array.shape[-1] % 32 else kind
        stored = gguf.GGMLQuantizationType[stored.upper()]
        writer.add_tensor(names.get_name(name, [".weight"]), gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(p.numel() for p in model.parameters())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint: a Llama or Qwen3 folder")
    parser.add_argument("gguf", type=Path, help="the file to write")
    parser.add_argument("--type", choices=("f32", "f16", "q8_0"), default="f16", help="weight type (default: f16)")
    options = parser.parse_args()
    try:
        count = export(options.folder, options.gguf, options.type)
    except ImportError as error:
        sys.exit(f"error: {error.name} is missing; pip install gguf")
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {options.gguf}: {count:,} parameters as {options.type}")


if __name__ == "__main__":
    main()
