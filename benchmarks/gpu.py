"""Speed on a GPU: a training step at GPT-2's size beside nanoGPT's, and decoding against the memory bandwidth.

    python benchmarks/gpu.py --nanogpt PATH     # a checkout of github.com/karpathy/nanoGPT; without it ours alone

124 M parameters, context 1,024, bfloat16, torch.compile, fused AdamW, random tokens, as nanoGPT's bench.py does it:
ours and theirs take turns, and the median of the rounds counts. MFU is the share of the *measured* rate of a large
bfloat16 matrix product: 6 N + 12 · layers · width · context operations a token, N without position embeddings, as
nanoGPT counts it (causal attention does half of the second term, so this flatters both alike).

Decoding reads every weight and the cache once a step, so a step takes at least those bytes / the measured bandwidth.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import GPT, GPTConfig, generate
from pretrain import next_token_loss
from training import adamw, compiled, muon_and_adam

GPT2 = dict(vocab_size=50304, context_length=1024, layers=12, heads=12, kv_heads=12, width=768, ffn_width=2048)
ROUNDS, STEPS = 5, 10


def seconds(work, repeats):
    """Seconds of one call, the GPU's queue emptied before and after."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def ceilings():
    """Measured (bfloat16 matrix operations a second, bytes moved a second)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds(lambda: a @ b, 10)
    rate = 2 * 8192**3 / statistics.median(seconds(lambda: a @ b, 10) for _ in range(5))
    source = torch.empty(2**31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds(lambda: target.copy_(source), 3)
    return rate, 2 * 2**31 / statistics.median(seconds(lambda: target.copy_(source), 5) for _ in range(5))


def stepper(loss_of, optimisers, parameters, ids):
    """-> a function that does one training step."""
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in optimisers:
            with torch.autocast("cuda", dtype=torch.bfloat16):  # for Muon
                optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return loss.item()

    return step


def ours(ids, muon=False):
    model = GPT(GPTConfig(**GPT2)).cuda()
    optimisers = muon_and_adam(model, 0.02, 0.02, 0.004, 0.1) if muon else [adamw(model, 1e-4, 0.01)]
    loss_of = compiled(next_token_loss, True, torch.device("cuda"))
    return stepper(lambda x, y: loss_of(model, x, y), optimisers, list(model.parameters()), ids)


def nanogpt(path, ids):
    import importlib.util
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(path) / "model.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    model = theirs.GPT(theirs.GPTConfig(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768,
                                        dropout=0.0, bias=False)).cuda()
    optimiser = model.configure_optimizers(1e-2, 1e-4, (0.9, 0.95), "cuda")
    fast = torch.compile(model)
    return stepper(lambda x, y: fast(x, y)[1], [optimiser], list(model.parameters()), ids)


def training(rate, batch, path):
    ids = torch.randint(50304, (batch, 1025), device="cuda")
    torch.set_float32_matmul_precision("high")  # as nanoGPT does
    runs = {"ours": ours(ids)}
    if path:
        runs["nanoGPT"] = nanogpt(path, ids)
    runs["ours, Muon"] = ours(ids, muon=True)
    first = {}
    for name, step in runs.items():  # compile
        start = time.perf_counter()
        seconds(step, 1)
        first[name] = time.perf_counter() - start
        seconds(step, STEPS)
    times = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, step in runs.items():
            times[name].append(seconds(step, STEPS))
    # Both have a vocabulary of 50,304, width 768 and 12 blocks; SwiGLU at 2,048 has as many weights as GELU at 3,072.
    flops = 6 * (50304 * 768 + 12 * 12 * 768**2) + 12 * 12 * 768 * 1024
    rows = {}
    for name, found in times.items():
        tokens = batch * 1024 / statistics.median(found)
        rows[name] = {"tokens_per_second": round(tokens), "mfu": round(tokens * flops / rate, 4),
                      "spread": [round(batch * 1024 / t) for t in (max(found), min(found))],
                      "first_step_seconds": round(first[name], 1)}
    return rows


@torch.inference_mode()
def decoding(bandwidth):
    model = GPT(GPTConfig(**GPT2)).cuda().bfloat16()
    weights = 2 * sum(p.numel() for p in model.parameters())
    rows, new, prompt = {}, 128, 32
    for batch in (1, 256):
        prompts = [list(range(100, 100 + prompt))] * batch
        def work():
            return generate(model, prompts, new, eos_ids=())
        work()
        taken = statistics.median(seconds(work, 1) for _ in range(5))
        cache = 2 * 2 * 12 * 768 * (prompt + new / 2) * batch  # keys and values, on average
        rows[batch] = {"tokens_per_second": round(batch * new / taken),
                       "share_of_limit": round(new * (weights + cache) / bandwidth / taken, 4)}
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", help="folder of nanoGPT, whose model.py is measured beside ours")
    parser.add_argument("--batch", type=int, default=32, help="windows of 1,024 tokens a step (default: 32)")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device here")
    rate, bandwidth = ceilings()
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
             "bf16_tflops": round(rate / 1e12, 1), "copy_gb_per_second": round(bandwidth / 1e9)}
    print(json.dumps(found), flush=True)
    found["decoding"] = decoding(bandwidth)
    print(json.dumps(found["decoding"]), flush=True)
    found["training"] = training(rate, args.batch, args.nanogpt)
    print(json.dumps(found["training"], indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
