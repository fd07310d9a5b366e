"""Training SlimSpec drafters on vLLM's own trainer, speculators 0.9 (extra ``[train]``).

    answers.write_answers  let the target answer prompts, with vLLM
    documents              what a drafter learns from, and how much of it is a prompt
    states.write_states    run the target over documents, keep the hidden states that a drafter learns from
    store                  those states on disk, checked before they are trained on
    launch.fit             train a drafter on them and write it in the format that vLLM serves
    plan                   what a run will come to, on paper
    model                  the EAGLE-3 model of speculators with two factors for a head
    trainer, metrics       speculators' trainer with checkpoints that survive a kill, and what it reports
    held_out               the acceptance length of held-out answers, as it will be served
    export                 that model as a plain Hugging Face folder
    quiet, replaced        one progress bar a stage, ours; what speculators has no switch for

``slimspec train --help`` lists the commands. Importing this package is cheap; its modules
import torch, transformers and speculators.
"""
