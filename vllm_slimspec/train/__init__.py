"""Training SlimSpec drafters on vLLM's own trainer, speculators 0.9 (extra ``[train]``).

    states.write_states    run the target over documents, keep the hidden states that a drafter learns from
    store                  those states on disk, checked before they are trained on
    launch.fit             train a drafter on them and write it in the format that vLLM serves
    model                  the EAGLE-3 model of speculators with two factors for a head
    export                 that model as a plain Hugging Face folder
    quiet                  one progress bar a stage, ours

``python -m vllm_slimspec.train states|fit --help``. Importing this package is cheap; its modules import torch,
transformers and speculators.
"""
