"""Peak memory of a DPO step for models of real shapes, with the flags that save memory.

    python tools/memory.py            # on a GPU if there is one; a CPU takes some minutes, and 20 GB for the largest

Each case is a process of its own: random weights of that shape, 4 pairs with 256 tokens a side, half of
them the answer, two steps (the first creates AdamW's moments), then the peak memory. What to expect:

    trained weights      16 bytes each: weight, gradient and two moments, in float32
    frozen weights        4 bytes each (--lora)
    activations           per token about 4 · layers · (9 width + 3 feed-forward) bytes; with --recompute
                          only those of one block, and 4 · layers · width
    bfloat16              half the activations, but 2 bytes more per weight, for its copy in bfloat16: together
                          with --recompute it saves time, not memory
    logits                about 16 bytes per answer token and word of the vocabulary
    Python and torch      0.3 GB on a CPU (on a GPU only tensors are counted)
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
SHAPES = {
    "SmolLM2-135M": dict(vocab_size=49152, layers=30, width=576, heads=9, kv_heads=3, ffn_width=1536),
    "SmolLM2-360M": dict(vocab_size=49152, layers=32, width=960, heads=15, kv_heads=5, ffn_width=2560),
    "Qwen3-0.6B": dict(vocab_size=151936, layers=28, width=1024, heads=16, kv_heads=8, head_dim=128, ffn_width=3072,
                       qk_norm=True)}
CASES = {"no flag": {}, "--micro-batch 1": {"micro": 1}, "and --recompute": {"micro": 1, "recompute": True},
         "and --dtype bfloat16": {"micro": 1, "recompute": True, "dtype": "bfloat16"},
         "and --lora 8": {"micro": 1, "recompute": True, "dtype": "bfloat16", "lora": 8}}


def step(shape, micro=None, recompute=False, dtype="float32", lora=None):
    """Two steps of DPO -> (parameters, peak GiB)."""
    import torch

    import rlhf
    from data import EncodedPair
    from lora import add_lora
    from model import GPT, GPTConfig
    from training import adamw, autocast, micro_batches
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = GPT(GPTConfig(context_length=512, **shape)).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    model.recompute = recompute
    if lora:
        add_lora(model, lora)
    optimiser = adamw(model, 1e-5)
    row = torch.randint(5, 999, (4, 256)).tolist()
    pairs = [EncodedPair(ids[:128], ids[128:], ids[:127:-1]) for ids in row]
    zero = torch.zeros(2, len(pairs), device=device)
    for _ in range(2):
        for rows, weight in micro_batches(range(len(pairs)), micro):
            with autocast(device, dtype):
                chosen, rejected = rlhf.pair_logprobs(model, [pairs[i] for i in rows], 0, device).chunk(2)
            (weight * rlhf.dpo_loss(chosen, rejected, *zero[:, rows], 0.1)[0]).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    if device.type == "cuda":
        return parameters, torch.cuda.max_memory_allocated() / 2**30
    import resource  # Windows lacks it: there this runs only on a GPU
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return parameters, peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux


def main():
    if len(sys.argv) == 3:  # how it calls itself
        print(json.dumps(step(SHAPES[sys.argv[1]], **CASES[sys.argv[2]])))
        return
    if len(sys.argv) > 1:  # --help
        print(__doc__)
        return
    print("| GiB, peak | parameters | " + " | ".join(CASES) + " |\n" + "|---" * (len(CASES) + 2) + "|")
    for name in SHAPES:
        found = []
        for case in CASES:
            ran = subprocess.run([sys.executable, __file__, name, case], capture_output=True, text=True)
            found.append(json.loads(ran.stdout) if ran.returncode == 0 else [0, float("nan")])
            if ran.returncode:  # perhaps out of memory, which leaves no word
                print(f"{name}, {case}: exit status {ran.returncode} {ran.stderr.strip()[-200:]}", file=sys.stderr)
        parameters = max(count for count, _ in found)
        print(f"| {name} | {parameters / 1e6:.0f} M | " + " | ".join(f"{gb:.1f}" for _, gb in found) + " |", flush=True)


if __name__ == "__main__":
    main()
