"""Train SlimSpec drafters with speculators 0.9, the trainer of the vLLM project (extra ``[train]``).

    prompts.write_prompts  lets a chat target write prompts, with vLLM
    answers.write_answers  lets the target answer prompts, with vLLM
    documents              reads the documents that a drafter learns from, and how many of their tokens are a prompt
    states.write_states    runs the target over documents, and stores its hidden states
    store                  reads and writes the stored states, and checks them before they are trained on
    config                 makes the configuration of a run from the paper's recipe and the flags
    launch.fit             trains a drafter on the states, and writes it in the format that vLLM serves
    plan                   estimates what a run will cost, before it is started
    model                  holds the EAGLE-3 model of speculators with two factors as its head
    trainer, metrics       extend speculators' trainer by checkpoints that survive a kill, and record what it reports
    held_out               measures the acceptance length on held-out answers, as it will be served
    export                 writes the model as a plain Hugging Face folder
    on_cpu                 reorders the slowest operations of training for a CPU
    quiet, replaced        silence the libraries below, and replace parts of speculators that have no switch

``slimspec train --help`` lists the commands. Importing this package is cheap; its modules import torch, transformers
and speculators.
"""
