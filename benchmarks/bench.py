"""Our code beside others' on the same work, machine and threads, taking turns: medians of 3 or 5 rounds.

    python benchmarks/bench.py --data FOLDER --nanogpt PATH --out benchmarks/results.json
    python benchmarks/bench.py --data FOLDER --rows train sampling          # only these

transformers, TRL and tokenizers are installed into .venv-peers, and everything runs there, ours too, so that all
use one version of torch. --data is the folder for `make real`, with tinyshakespeare.txt added; --nanogpt is a
checkout of github.com/karpathy/nanoGPT. A row whose files are missing is left out, with a message.

The rows of SFT, DPO and PPO do the whole work on both sides, from tokenising to saving; reading the files, PPO's
tokenising and the measurements on held-out rows at the end are counted only on ours. The others run with their own
defaults where nothing is said; in the rows `TRL, by length` of SFT and DPO they also batch rows of like length, as ours
do. Importing is not counted on either side, except in the row `shakespeare`, where both are started from the command line.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
PEERS = ROOT / ".venv-peers"
SHAPE = dict(vocab_size=2048, context_length=512, layers=6, heads=6, kv_heads=6, width=192, ffn_width=512,
             qk_norm=False, tied=True)  # 3.05 M parameters
ROUNDS = 5


def into_peers_environment():
    """Rerun this script in an environment with the others' packages, which the first run creates."""
    python, stamp = PEERS / "bin" / "python", PEERS / "installed"
    if not stamp.exists() or stamp.stat().st_mtime < max(
            path.stat().st_mtime for path in (ROOT / "requirements.txt", HERE / "requirements.txt")):
        subprocess.run([sys.executable, "-m", "venv", PEERS], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", HERE / "requirements.txt"], check=True)
        stamp.touch()
    if Path(sys.prefix) != PEERS:
        sys.exit(subprocess.run([python, *sys.argv]).returncode)


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(amount, rounds=ROUNDS, **runs):
    """Run each in turn, `rounds` times after one warm-up -> {name: [median, least, most] of amount per second}."""
    times = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            seconds = timed(run)
            if turn > 0:
                times[name].append(seconds)
    return {name: [amount / f(seconds) for f in (statistics.median, max, min)] for name, seconds in times.items()}


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def script(main, *flags):
    """Call a stage's main with this command line, in this process, on the CPU like the peers."""
    with quiet():
        sys.argv, kept = [main.__module__, *map(str, flags), "--device", "cpu"], sys.argv
        try:
            main()
        finally:
            sys.argv = kept
            for number in (signal.SIGINT, signal.SIGTERM):  # which a stage keeps for itself
                signal.signal(number, signal.default_int_handler)


class Bench:
    """What the rows share: folders of random weights that both sides open, and the data."""

    def __init__(self, args, work):
        self.data = Path(args.data) if args.data else None
        self.nanogpt = args.nanogpt
        self.work = Path(work)

    def file(self, name):
        if self.data is None or not (self.data / name).exists():
            raise FileNotFoundError(f"{name} (give its folder with --data)")
        return self.data / name

    def texts(self):
        rows = json.loads(self.file("preferences-1100.json").read_text(encoding="utf-8"))
        return [row["instruction"] + "\n" + row.get("input", "") + row["chosen"] + row["rejected"] for row in rows]

    def folder(self, scalar=False):
        """A checkpoint of random weights with a tokeniser of the preferences' texts."""
        import torch

        from model import GPT, GPTConfig, ScalarModel
        from tokenizer import train_bpe
        from training import save_checkpoint
        path = self.work / ("reward" if scalar else "policy")
        if not path.exists():
            torch.manual_seed(1)
            tokenizer = train_bpe(self.texts(), 2048)
            model = GPT(GPTConfig(**SHAPE))
            if scalar:
                save_checkpoint(path, ScalarModel(model), tokenizer, reward_shift=0.0, reward_scale=1.0)
            else:
                save_checkpoint(path, model, tokenizer)
        return path

    def tokenizer(self):
        from transformers import AutoTokenizer
        return AutoTokenizer.from_pretrained(self.folder())

    def trainer_settings(self):
        return dict(output_dir=str(self.work / "trl"), per_device_train_batch_size=16, num_train_epochs=1,
                    use_cpu=True, bf16=self.bf16(), fp16=False, report_to="none", save_strategy="no", logging_steps=10,
                    gradient_checkpointing=False, disable_tqdm=True, dataloader_num_workers=0)

    @staticmethod
    def bf16():
        import torch

        from training import bfloat16_is_fast
        return bfloat16_is_fast(torch.device("cpu"))


# ------------------------------------------------------------------------------------------ rows


def train(bench):
    """A training step: forward, backward, AdamW, 16 windows of 256 tokens."""
    import torch
    import torch.nn.functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    from model import GPT, GPTConfig
    from pretrain import next_token_loss
    from training import adamw, autocast, compiled
    ids = torch.randint(2048, (16, 257))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step(parameters, optimiser, loss_of, precision):
        def run():
            for _ in range(3):
                with precision:
                    loss = loss_of()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
        return run

    def ours(compile=False):
        model = GPT(GPTConfig(**SHAPE))
        loss_of = compiled(next_token_loss, compile, "cpu")
        return step(list(model.parameters()), adamw(model, 1e-3, 0.1),
                    lambda: loss_of(model, inputs, targets), autocast(torch.device("cpu")))

    def theirs(precision, compile=False):
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
            num_key_value_heads=6, max_position_embeddings=512, tie_word_embeddings=True, use_cache=False))
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

        def loss_of():
            logits = model(input_ids=inputs).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return step(list(model.parameters()), optimiser, compiled(loss_of, compile, "cpu"), precision)

    bf16 = torch.autocast("cpu", dtype=torch.bfloat16)
    return compare(3 * 16 * 256, **{
        "ours": ours(), "transformers float32": theirs(contextlib.nullcontext()), "transformers bfloat16": theirs(bf16),
        "ours compiled": ours(True), "transformers compiled float32": theirs(contextlib.nullcontext(), True),
        "transformers compiled bfloat16": theirs(bf16, True)})


SHAKESPEARE = ("--vocab-size 260 --context-length 64 --layers 3 --width 96 --heads 3 --ffn-width 256 "
               "--batch-size 16 --steps 280 --warmup 10 --tied").split()


def shakespeare(bench):
    """Seconds from process start to the end of 280 steps, which must bring the loss on the last tenth of
    tinyshakespeare, by characters, below 1.886."""
    from data import pack_documents
    from pretrain import heldout_loss
    from training import load_policy
    text = bench.file("tinyshakespeare.txt").read_text(encoding="utf-8")
    if not bench.nanogpt:
        raise FileNotFoundError("nanoGPT (give its folder with --nanogpt)")
    folder = bench.work / "nanogpt"
    shutil.copytree(bench.nanogpt, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git", "out*"))
    shutil.copy(bench.file("tinyshakespeare.txt"), folder / "data/shakespeare_char/input.txt")
    found = {"ours": [], "nanoGPT": []}
    for _ in range(3):
        out = bench.work / "shakespeare"
        seconds = timed(lambda: subprocess.run(
            [sys.executable, ROOT / "pretrain.py", "--data", bench.file("tinyshakespeare.txt"), "--holdout", "0.1",
             "--device", "cpu", "--out", out, *SHAKESPEARE], capture_output=True, check=True))
        model, tokenizer = load_policy(out)
        tokens, text_bytes = pack_documents([text[int(0.9 * len(text)):]], tokenizer)
        loss = heldout_loss(model, tokens[1:], text_bytes)[0]
        if loss > 1.886:
            raise RuntimeError(f"found a loss of {loss:.3f} after {' '.join(SHAKESPEARE)}, expected 1.886 or less")
        found["ours"].append((seconds, loss, sum(p.numel() for p in model.parameters())))
        found["nanoGPT"].append(run_nanogpt(folder))
    rows = {}
    for name, runs in found.items():
        seconds, loss, parameters = sorted(runs)[1]
        rows[name] = [seconds, min(runs)[0], max(runs)[0]]
        rows[f"{name}, loss"], rows[f"{name}, parameters"] = loss, parameters
    return rows


def run_nanogpt(folder):
    """nanoGPT's README's CPU recipe -> (seconds from process start, loss over the whole validation split, size)."""
    subprocess.run([sys.executable, "data/shakespeare_char/prepare.py"], cwd=folder, check=True, capture_output=True)
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False",
               "--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4",
               "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"]
    seconds = timed(lambda: subprocess.run(command, cwd=folder, check=True, capture_output=True))
    measure = ("import torch, pickle, numpy as np; from model import GPT, GPTConfig\n"
               "c = torch.load('out-shakespeare-char/ckpt.pt', map_location='cpu', weights_only=False)\n"
               "m = GPT(GPTConfig(**c['model_args'])); m.load_state_dict(c['model']); m.eval()\n"
               "v = torch.from_numpy(np.fromfile('data/shakespeare_char/val.bin', dtype=np.uint16).astype(np.int64))\n"
               "n = (len(v) - 1) // 64; x, y = v[:n * 64].view(n, 64), v[1:n * 64 + 1].view(n, 64)\n"
               "with torch.no_grad(): loss = sum(m(a, b)[1].item() * len(a) for a, b in zip(x.split(64), y.split(64))) / n\n"
               "print('RESULT', loss, sum(p.numel() for p in m.parameters()))")
    said = subprocess.run([sys.executable, "-c", measure], cwd=folder, check=True, capture_output=True, text=True)
    loss, parameters = said.stdout.split("RESULT")[1].split()
    return seconds, float(loss), int(parameters)


def sampling(bench, batch):
    """96 tokens after a prompt of 32, at temperature 1."""
    import torch
    from transformers import LlamaForCausalLM

    from model import GPT, GPTConfig, from_hf, generate
    theirs = LlamaForCausalLM.from_pretrained(bench.folder(), dtype=torch.float32).eval()
    ours = GPT(GPTConfig(**SHAPE))
    ours.load_state_dict(from_hf(theirs.state_dict(), ours.config))
    prompts = torch.randint(5, 2000, (batch, 32))
    theirs.generation_config.eos_token_id = None

    def run_theirs():
        with torch.inference_mode():
            theirs.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_new_tokens=96,
                            min_new_tokens=96, top_k=0, top_p=1.0, pad_token_id=0)
    return compare(96 * batch, **{"ours": lambda: generate(ours, prompts.tolist(), 96), "transformers": run_theirs})


def sft(bench):
    """One epoch over 1,000 conversations, batches of 16, from opening the files to the saved checkpoint."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    import sft
    rows = json.loads(bench.file("preferences-1100.json").read_text(encoding="utf-8"))
    messages = [{"messages": [{"role": "user", "content": "\n".join(filter(None, (row["instruction"], row.get("input"))))},
                              {"role": "assistant", "content": row["chosen"]}]} for row in rows]
    path = bench.work / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in messages), encoding="utf-8")
    completions = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in messages[:-100]]

    def theirs(order):
        with quiet():
            settings = SFTConfig(max_length=512, completion_only_loss=True, train_sampling_strategy=order,
                                 **bench.trainer_settings())
            trainer = SFTTrainer(AutoModelForCausalLM.from_pretrained(bench.folder()), settings,
                                 train_dataset=Dataset.from_list(completions), processing_class=bench.tokenizer())
            trainer.train()
            trainer.save_model()
    return compare(1000, rounds=3, **{
        "TRL": lambda: theirs("random"), "TRL, by length": lambda: theirs("group_by_length"), "ours": lambda: script(
            sft.main, "--init", bench.folder(), "--data", path, "--holdout", 100, "--out", bench.work / "sft")})


def dpo(bench):
    """One epoch over some 1,000 pairs, batches of 16, from opening the files to the saved checkpoint."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    import rlhf
    rows = json.loads(bench.file("preferences-1100.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if "" != row["chosen"].strip() != row["rejected"].strip() != ""]  # ours drops the rest
    pairs = [{"prompt": [{"role": "user", "content": "\n".join(filter(None, (row["instruction"], row.get("input"))))}],
              **{kind: [{"role": "assistant", "content": row[kind]}] for kind in ("chosen", "rejected")}} for row in rows]
    path = bench.work / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    dtype = "bfloat16" if bench.bf16() else "float32"

    # TRL groups by a column: characters are enough to tell which rows are of like length.
    pairs = [pair | {"length": sum(len(row[key]) for key in ("instruction", "chosen", "rejected"))}
             for pair, row in zip(pairs, rows)]

    def theirs(order):
        with quiet():
            settings = DPOConfig(max_length=512, beta=0.1, precompute_ref_log_probs=True, train_sampling_strategy=order,
                                 remove_unused_columns=False, **bench.trainer_settings())
            trainer = DPOTrainer(AutoModelForCausalLM.from_pretrained(bench.folder()),
                                 AutoModelForCausalLM.from_pretrained(bench.folder()), settings,
                                 train_dataset=Dataset.from_list(pairs[:-100]),
                                 processing_class=bench.tokenizer())
            trainer.train()
            trainer.save_model()

    def ours():
        script(rlhf.dpo, "--init", bench.folder(), "--data", path, "--holdout", 100, "--batch-size", 16, "--beta", 0.1, "--nll", 0,
               "--dtype", dtype, "--out", bench.work / "dpo")
    return compare(len(pairs) - 100, rounds=3, **{
        "TRL": lambda: theirs("random"), "TRL, by length": lambda: theirs("group_by_length"), "ours": ours})


def ppo(bench, iterations=3, episodes=64):
    """Iterations of 64 answers of 48 tokens, 4 epochs of 4 minibatches; policy, reference, reward model, critic.
    TRL's trainer ignores bf16=True; accelerate's environment variable puts its policy and critic in bfloat16 where
    they are updated. Ours also reads the reference's log-probs and the values in it; both sample in float32."""
    import copy

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    import rlhf
    rows = json.loads(bench.file("preferences-1100.json").read_text(encoding="utf-8"))
    path = bench.work / "prompts.jsonl"
    path.write_text("".join(json.dumps({"instruction": row["instruction"], "output": "."}) + "\n" for row in rows),
                    encoding="utf-8")
    reward = bench.folder(scalar=True)
    tokenizer = bench.tokenizer()
    ids = [tokenizer.apply_chat_template([{"role": "user", "content": row["instruction"]}],
                                         add_generation_prompt=True, return_dict=False)
           for row in rows]

    def theirs(bf16):
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
        with quiet():
            tokenizer.padding_side = "left"
            settings = bench.trainer_settings() | {"per_device_train_batch_size": episodes}
            settings = PPOConfig(response_length=48, num_ppo_epochs=4, num_mini_batches=4, temperature=1.0,
                                 total_episodes=iterations * episodes, num_sample_generations=0,
                                 learning_rate=3e-4, **settings)
            model = AutoModelForCausalLM.from_pretrained(bench.folder())
            model.generation_config.eos_token_id = None
            score = AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1)
            trainer = PPOTrainer(settings, tokenizer, model, copy.deepcopy(model), score,
                                 Dataset.from_list([{"input_ids": row} for row in ids if len(row) < 64]),
                                 copy.deepcopy(score), eval_dataset=Dataset.from_list([{"input_ids": ids[0]}] * 16))
            trainer.train()
            trainer.save_model()

    def ours(dtype):
        script(rlhf.ppo, "--init", bench.folder(), "--reward", reward, "--data", path, "--holdout", 16,
               "--eval-prompts", 16, "--iterations", iterations, "--episodes", episodes, "--epochs", 4,
               "--minibatches", 4, "--dtype", dtype, "--max-new-tokens", 48,
               "--stop-kl", 1000, "--max-kl", 1e6, "--samples-every", 1000, "--out", bench.work / "ppo")
    torch.manual_seed(1)
    runs = {"TRL float32": lambda: theirs(False), "ours float32": lambda: ours("float32")}
    if bench.bf16():
        runs |= {"TRL bfloat16": lambda: theirs(True), "ours bfloat16": lambda: ours("bfloat16")}
    return compare(iterations * episodes, rounds=3, **runs)


def bpe(bench):
    """Learning 4,096 tokens from 2 MB of stories, in MB of text a second."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from tokenizer import train_bpe
    text = bench.file("tinystories-train-2mb.txt").read_text(encoding="utf-8")
    stories = text.split("<|endoftext|>")

    def theirs():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=4096, show_progress=False, special_tokens=["<|endoftext|>"],
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        tokenizer.train_from_iterator(stories, trainer)
    return compare(len(text.encode()) / 1e6, **{"ours": lambda: train_bpe(stories, 4096), "tokenizers": theirs})


def encode(bench):
    """Tokenising 2 MB of stories, a story at a time, in MB a second."""
    from tokenizer import train_bpe
    text = bench.file("tinystories-train-2mb.txt").read_text(encoding="utf-8")
    stories = text.split("<|endoftext|>")
    tokenizer = train_bpe(stories, 4096)

    def theirs():  # a list of the ids, as ours
        return [tokenizer.encoding.encode_ordinary(story) for story in stories]
    return compare(len(text.encode()) / 1e6, **{"ours": lambda: [tokenizer.encode(story) for story in stories], "tiktoken": theirs})


ROWS = {  # name: (measure, unit of `ours` and theirs; seconds: lower is better)
    "train": (train, "tokens/s"),
    "shakespeare": (shakespeare, "seconds"),
    "sampling, batch 1": (lambda bench: sampling(bench, 1), "tokens/s"),
    "sampling, batch 128": (lambda bench: sampling(bench, 128), "tokens/s"),
    "SFT": (sft, "conversations/s"),
    "DPO": (dpo, "pairs/s"),
    "PPO": (ppo, "episodes/s"),
    "BPE training": (bpe, "MB/s"),
    "encoding": (encode, "MB/s"),
}


def machine():
    """Processor, threads and the measured rate of a large matrix product, in GFLOP/s."""
    import torch
    rates = {}
    for kind in (torch.float32, torch.bfloat16):
        a = torch.randn(2048, 2048).to(kind)
        a @ a
        rates[str(kind).split(".")[1]] = round(2 * 2048**3 / min(timed(lambda: a @ a) for _ in range(5)) / 1e9)
    name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
                 if line.startswith("model name")), platform.processor()) if Path("/proc/cpuinfo").exists() else ""
    return {"processor": name or platform.machine(), "threads": torch.get_num_threads(), "matrix GFLOP/s": rates,
            "torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of real files, as for `make real`")
    parser.add_argument("--nanogpt", help="folder of nanoGPT")
    parser.add_argument("--rows", nargs="+", help=f"some of {', '.join(ROWS)}; the beginning of a name is enough")
    parser.add_argument("--out", help="JSON file; rows in it that are not measured now are kept")
    args = parser.parse_args()
    into_peers_environment()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import warnings
    warnings.filterwarnings("ignore")

    import training
    training.keep_freed_memory()
    found = json.loads(Path(args.out).read_text("utf-8")) if args.out and Path(args.out).exists() else {"rows": {}}
    here = machine()
    print(json.dumps(here))
    for name, (measure, unit) in ROWS.items():
        if args.rows and not name.startswith(tuple(args.rows)):
            continue
        try:
            with tempfile.TemporaryDirectory(prefix="bench-") as work:
                rows = measure(Bench(args, work))
        except FileNotFoundError as error:
            print(f"{name}: left out, {error} is missing", flush=True)
            continue
        except Exception as error:  # the other rows need not wait for it to be mended
            said = getattr(error, "stderr", None) or b""  # of a process
            print(f"{name}: failed, {error!r} {said[-500:]!r}", flush=True)
            continue
        found["rows"][name] = {"unit": unit, "machine": here, **rows}
        for who, value in rows.items():
            shown = (f"{value[0]:,.1f} ({value[1]:,.1f} to {value[2]:,.1f}) {unit}" if isinstance(value, list)
                     else f"{value:,.3f}")
            print(f"{name:20} {who:32} {shown}", flush=True)
        if args.out:
            Path(args.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
