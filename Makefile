# From raw text to an aligned model. `make` runs every stage that is missing or out of date.
#
#   make          the whole pipeline on the embedded data, then out/report/report.html
#   make quick    the same with tiny budgets, to see every stage move
#   make test     the tests
#   make venv     only install, into .venv
#   make ablation SFT without pre-training
#   make clean    forget all results
#
# A stage is done when its `done` stamp is newer than its script and its inputs. A stage that was
# interrupted goes on from its last save.

PYTHON ?= python3
PY     := .venv/bin/python
OUT    ?= out

# Settings of each stage; override on the command line: make PRETRAIN='--steps 2000'
PRETRAIN ?=
SFT      ?=
PAIRS    ?=
REWARD   ?=
DPO      ?=
PPO      ?=
EVALUATE ?=

BASE   := model.py tokenizer.py training.py data.py
WORLD  := world.py world_facts.txt

.DELETE_ON_ERROR:
.PHONY: all quick test venv ablation clean

all: $(OUT)/report/report.json

venv: .venv/installed
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(OUT)/base/done: pretrain.py $(BASE) $(WORLD) | .venv/installed
	$(PY) pretrain.py --data world --out $(@D) --resume $(PRETRAIN)

$(OUT)/sft/done: sft.py $(OUT)/base/done
	$(PY) sft.py --init $(OUT)/base --data world --out $(@D) --resume $(SFT)

$(OUT)/pairs.jsonl: $(OUT)/sft/done
	$(PY) world.py pairs --init $(OUT)/sft --out $@ $(PAIRS)

$(OUT)/reward/done: reward.py $(OUT)/pairs.jsonl
	$(PY) reward.py --init $(OUT)/sft --data $(OUT)/pairs.jsonl --out $(@D) --resume $(REWARD)

$(OUT)/dpo/done: rlhf.py $(OUT)/pairs.jsonl
	$(PY) rlhf.py dpo --init $(OUT)/sft --data $(OUT)/pairs.jsonl --out $(@D) --resume $(DPO)

$(OUT)/ppo/done: rlhf.py $(OUT)/reward/done
	$(PY) rlhf.py ppo --init $(OUT)/sft --reward $(OUT)/reward --data world --out $(@D) --resume $(PPO)

$(OUT)/report/report.json: evaluate.py report.py chat.py $(OUT)/dpo/done $(OUT)/ppo/done
	$(PY) evaluate.py $(OUT)/base $(OUT)/sft $(OUT)/dpo $(OUT)/ppo --reward $(OUT)/reward \
		--data $(OUT)/pairs.jsonl --out $(@D) $(EVALUATE)

quick:
	$(MAKE) OUT=out/quick PRETRAIN='--steps 60 --documents 3000 --layers 2 --width 64' \
		SFT='--conversations 640' PAIRS='--pairs 300 --holdout 100' \
		PPO='--iterations 3 --episodes 32 --eval-prompts 32' \
		EVALUATE='--per-family 10 --best-of 4 --best-of-prompts 10'

# What pre-training is worth: the same fine-tuning from random weights.
ablation: $(OUT)/sft_scratch/done
	$(PY) evaluate.py $(OUT)/sft $(OUT)/sft_scratch --best-of 1 --out $(OUT)/ablation
$(OUT)/sft_scratch/done: $(OUT)/sft/done
	$(PY) sft.py --init $(OUT)/base --from-scratch --data world --out $(@D) --resume $(SFT)

test: .venv/installed
	$(PY) -m pytest -q

clean:
	rm -rf out
