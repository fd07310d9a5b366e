"""Train SlimSpec drafters with speculators 0.9, the trainer of the vLLM project (extra ``[train]``).

The stages of ``slimspec train`` are ``prompts.write_prompts``, ``answers.write_answers``, ``states.write_states`` and
``launch.fit``. Importing this package is cheap; its modules import torch, transformers and speculators.
"""
