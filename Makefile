# From raw text to an aligned model. `make` runs every stage that is missing or out of date.
#
#   make          the whole pipeline on the embedded data, then out/report/report.html
#   make quick    the same with tiny budgets, to see every stage run
#   make long     a larger model and budget, into out/long
#   make long GOAL=grpo   another target with the settings of long, or of quick; only these two heed GOAL
#   make real DATA=FOLDER   the same scripts on real files, into out/real
#   make test     the tests
#   make test-all the slow ones too: killed runs, planted mistakes (tests/README.md)
#   make notebooks  what `make` has not made yet, then the course: the solved edition to its end, the student's to its first gap
#   make venv     only install, into .venv
#   make ppo      one stage and what it needs: base sft pairs reward dpo ppo grpo report
#   make OUT=out/seed2 SEED=2   another seed for all that training draws: texts, weights, batches, pairs, answers.
#                 Give both with every make for that folder: without SEED it would be made anew, with seed 1
#   make ablation SFT without pre-training
#   make study    what each stage buys and costs, and how alignment fails, into out/study
#   make clean    delete the folder OUT (out) with all that is in it, other runs (out/long, out/s1, …) included
#
# Other targets with OUT=out/long, OUT=out/quick or a folder that was made by hand would make that folder anew, with the
# settings of `make`.
#
# A stage is done when its `done` stamp is newer than its script, its settings and its inputs. A
# stage that was interrupted continues from its last save.

PYTHON ?= python3
PY     := .venv/bin/python
OUT    ?= out
ifneq ($(words $(OUT)) $(OUT) $(findstring %,$(OUT)) $(findstring :,$(OUT)),1 $(firstword $(OUT))  )
$(error OUT='$(OUT)': expected one folder, without spaces, % and :)
endif
# quick and long have folders of their own, unless OUT was given.
own = $(if $(filter file,$(origin OUT)),$(1),$(OUT))

# Settings of each stage, and the stage that PPO goes on from; override on the command line: make PRETRAIN='--steps 2000'
SEED     :=
PRETRAIN ?=
SFT      ?=
PAIRS    ?=
REWARD   ?=
DPO      ?=
PPO      ?=
PPO_FROM ?= sft
GOAL     ?= all
GRPO     ?=
EVALUATE ?=
STUDY    ?=

BASE   := model.py tokenizer.py training.py data.py
WORLD  := world.py world_facts.txt

.DELETE_ON_ERROR:
.NOTPARALLEL: # a stage uses every core; two at once would wait for each other
STAGES := base sft reward dpo ppo grpo
.PHONY: all $(STAGES) pairs report quick long real study notebooks test test-all venv ablation clean FORCE

all report: $(OUT)/report/report.json
pairs: $(OUT)/pairs.jsonl
$(STAGES): %: $(OUT)/%/done

venv: .venv/installed
.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 10) and sys.exit("Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(if $(wildcard $@),,$(if $(wildcard .venv/ours),--clear)) .venv # a failed one may have another Python
	$(if $(wildcard .venv/ours),touch .venv/ours,$(if $(wildcard .venv/pyvenv.cfg),,touch .venv/ours))
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# Escapes what will stand between single quotes.
quoted = $(subst ','\'',$(1))
also = $(call quoted,$($(1)))

# The settings of a stage, in a file that changes only when they do: changed settings cause a new run.
seeded = $(if $(SEED),--seed $(SEED) )$(1)
SETTINGS_base = $(call seeded,$(PRETRAIN))
SETTINGS_sft = $(call seeded,$(SFT))
SETTINGS_pairs = $(call seeded,$(PAIRS))
SETTINGS_reward = $(call seeded,--surprisal $(REWARD))
SETTINGS_dpo = $(call seeded,$(DPO))
SETTINGS_ppo = $(call seeded,$(PPO))
SETTINGS_grpo = $(call seeded,$(GRPO))
SETTINGS_report = $(EVALUATE)
# Also noted there, but no flag. (Not with its folder, which can be spelled in several ways.)
FROM_ppo = $(if $(filter-out sft,$(PPO_FROM)),from $(PPO_FROM): )
$(OUT)/%/settings: FORCE
	@mkdir -p $(@D)
	@echo '$(call quoted,$(FROM_$*)$(SETTINGS_$*))' | cmp -s - $@ || { rm -f $(@D)/training_state.pt; \
		echo '$(call quoted,$(FROM_$*)$(SETTINGS_$*))' > $@; }

# A stage continues from its last save only if nothing that it is made from is newer than the save.
FORGET = @for f in $^; do [ ! "$$f" -nt $(@D)/training_state.pt ] || rm -f $(@D)/training_state.pt; done

$(OUT)/base/done: pretrain.py $(BASE) $(WORLD) $(OUT)/base/settings | .venv/installed
	$(FORGET)
	$(PY) pretrain.py --data world --out $(@D) --resume $(SETTINGS_base)

$(OUT)/sft/done: sft.py lora.py $(OUT)/sft/settings $(OUT)/base/done
	$(FORGET)
	$(PY) sft.py --init $(OUT)/base --data world --out $(@D) --resume $(SETTINGS_sft)

$(OUT)/pairs.jsonl: $(OUT)/pairs/settings $(OUT)/sft/done
	$(PY) world.py pairs --init $(OUT)/sft --out $@ $(SETTINGS_pairs)

$(OUT)/reward/done: reward.py tools/reward_with_reader.py $(OUT)/reward/settings $(OUT)/pairs.jsonl
	$(FORGET)
	$(PY) reward.py --init $(OUT)/sft --data $(OUT)/pairs.jsonl --out $(@D) --resume $(SETTINGS_reward)

$(OUT)/dpo/done: rlhf.py reward.py $(OUT)/dpo/settings $(OUT)/pairs.jsonl
	$(FORGET)
	$(PY) rlhf.py dpo --init $(OUT)/sft --data $(OUT)/pairs.jsonl --replay-data world --out $(@D) --resume $(SETTINGS_dpo)

$(OUT)/ppo/done: rlhf.py $(OUT)/ppo/settings $(OUT)/$(PPO_FROM)/done $(OUT)/reward/done
	$(FORGET)
	$(PY) rlhf.py ppo --init $(OUT)/$(PPO_FROM) --reward $(OUT)/reward --data world --replay-data world \
		--out $(@D) --resume $(SETTINGS_ppo)

$(OUT)/grpo/done: rlhf.py $(OUT)/grpo/settings $(OUT)/reward/done
	$(FORGET)
	$(PY) rlhf.py grpo --init $(OUT)/sft --reward $(OUT)/reward --data world --replay-data world \
		--out $(@D) --resume $(SETTINGS_grpo)

$(OUT)/report/report.json: evaluate.py $(OUT)/report/settings report.py chat.py $(OUT)/dpo/done $(OUT)/ppo/done
	$(PY) evaluate.py $(OUT)/base $(OUT)/sft $(OUT)/dpo $(OUT)/ppo --reward $(OUT)/reward \
		--data $(OUT)/pairs.jsonl --out $(@D) $(SETTINGS_report)

quick:
	$(MAKE) $(GOAL) OUT=$(call own,out/quick) \
		PRETRAIN='--steps 300 --documents 3000 --vocab-size 2048 --width 64 --ffn-width 192 $(call also,PRETRAIN)' \
		SFT='--conversations 1000 --lr 0.01 --embed-lr 0.01 --head-lr 0.002 $(call also,SFT)' \
		PAIRS='--pairs 500 --holdout 150 $(call also,PAIRS)' \
		PPO='--iterations 3 --episodes 32 --eval-prompts 32 $(call also,PPO)' \
		EVALUATE='--per-family 10 --best-of 4 --best-of-per-family 3 $(call also,EVALUATE)'

# The larger model reads four windows of pre-training text in a step of SFT: on held-out prompts other than the report's,
# 53 % of its samples were right (with one window 50 %), and it refused 38 % of the harmful requests (with one 31 %).
# Why its PPO goes on from DPO, and what it practises on: README, "A larger model".
long:
	$(MAKE) $(GOAL) OUT=$(call own,out/long) PRETRAIN='--steps 7500 --documents 200000 --layers 4 --width 192 --heads 6 \
		--ffn-width 576 $(call also,PRETRAIN)' SFT='--conversations 18000 --replay 4 $(call also,SFT)' \
		PAIRS='--pairs 20600 $(call also,PAIRS)' PPO_FROM=$(if $(filter file,$(origin PPO_FROM)),dpo,$(PPO_FROM)) \
		PPO='--iterations 80 --families all harmful harmful harmful howto howto howto $(call also,PPO)'

# What pre-training is worth: SFT on the same demonstrations from random weights, at rates as high as those
# of pre-training, since the low ones of SFT would not even teach the format.
ablation: $(OUT)/ablation/report.json
$(OUT)/ablation/report.json: evaluate.py report.py chat.py $(OUT)/sft_scratch/done
	$(PY) evaluate.py $(OUT)/sft $(OUT)/sft_scratch --best-of 1 --out $(OUT)/ablation
$(OUT)/sft_scratch/done: sft.py $(OUT)/sft/settings $(OUT)/sft/done
	$(FORGET)
	$(PY) sft.py --init $(OUT)/base --from-scratch --data world --out $(@D) --resume $(SETTINGS_sft) \
		--lr 0.02 --embed-lr 0.02 --head-lr 0.004 --adam-eps 1e-8

# Continues where it stopped: study.py looks at what is done. For a larger model (`make study OUT=out/long`
# would first train the small one in that folder; what it trains itself has the settings of `make`, not of `make long`):
# python study.py --runs out/long --out out/long/study --conversations 18000
study: all
	$(PY) study.py --runs $(OUT) --out $(OUT)/study $(call seeded,$(STUDY))

# Real files: TinyStories, Alpaca-style instructions, and two sets of preferences (Alpaca keys and
# Anthropic HH). The preferences are row-aligned with the instructions, so the last 110 rows of both
# are held out, and of these each stage drops the prompts that also occur in training. These answers are unlike
# the stories, so SFT and DPO take higher learning rates than in the world, and SFT the usual Adam epsilon.
# Finished stages are kept: to train anew, remove the folder.
REAL = $(OUT)/real
real: .venv/installed
	@for file in tinystories-train-2mb.txt instructions-1100.json preferences-1100.json hh-harmless-test.jsonl.gz; do \
		test -f "$(DATA)/$$file" || { echo "usage: make real DATA=FOLDER; found no $$file in '$(DATA)'"; exit 2; }; done
	@mkdir -p $(REAL); test -e $(REAL)/data || (cd "$(DATA)" && pwd) > $(REAL)/data
	@(cd "$(DATA)" && pwd) | cmp -s - $(REAL)/data || { echo "$(REAL) was made from other data; remove it first"; exit 2; }
	test -e $(REAL)/base/done || $(PY) pretrain.py --data "$(DATA)/tinystories-train-2mb.txt" --holdout 0.05 --out $(REAL)/base \
		--context-length 512 --batch-size 2 --steps 1200 --vocab-size 4096 --resume $(call seeded,)
	test -e $(REAL)/sft/done || $(PY) sft.py --init $(REAL)/base --data "$(DATA)/instructions-1100.json" --holdout 110 \
		--epochs 3 --batch-size 16 --lr 0.01 --embed-lr 0.01 --head-lr 0.002 \
		--adam-eps 1e-8 --out $(REAL)/sft --resume $(call seeded,)
	test -e $(REAL)/reward/done || $(PY) reward.py --init $(REAL)/sft --data "$(DATA)/preferences-1100.json" --holdout 110 \
		--out $(REAL)/reward --resume $(call seeded,)
	test -e $(REAL)/reward_hh/done || $(PY) reward.py --init $(REAL)/sft --data "$(DATA)/hh-harmless-test.jsonl.gz" --holdout 312 \
		--out $(REAL)/reward_hh --resume $(call seeded,)
	test -e $(REAL)/dpo/done || $(PY) rlhf.py dpo --init $(REAL)/sft --data "$(DATA)/preferences-1100.json" --holdout 110 \
		--epochs 2 --lr 2e-4 --out $(REAL)/dpo --resume $(call seeded,)
	test -e $(REAL)/ppo/done || $(PY) rlhf.py ppo --init $(REAL)/sft --reward $(REAL)/reward --data "$(DATA)/preferences-1100.json" \
		--holdout 110 --iterations 20 --episodes 64 --beta 0.1 --max-new-tokens 96 \
		--out $(REAL)/ppo --resume $(call seeded,)

# The solved edition must end with every check passed; the student's must stop at its first gap.
notebooks: all
	RUN=$(OUT) $(PY) -m pytest -q tests/test_notebooks.py

# Test files run in parallel, one core each: most tests are too small for two threads.
test: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# With killed runs, scripts as processes and planted mistakes; writes what it found into tests/README.md.
test-all: .venv/installed
	$(PY) -m pytest -q --slow --write-readme
	$(PY) tests/mutants.py

clean:
	rm -rf $(OUT)
