"""Joint distillation: starting from a converted drafter, its head, fc and layer learn the target's choices together.

This step of conversion uses the trainer of :mod:`vllm_slimspec.train`, so it is in neither of the two packages. Like
speculators, the trainer continues from a drafter folder in speculators' layout.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vllm_slimspec.convert.distill import Loss
from vllm_slimspec.convert.heads import Factors
from vllm_slimspec.convert.speculators import speculators_config
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint, write_checkpoint
from vllm_slimspec.drafters.source import Drafter
from vllm_slimspec.engine.head_states import HeadStates
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.spec import DOWN, UP

_EMBEDDINGS = "embed_tokens.weight"


@dataclass(frozen=True)
class JointRecipe:
    """The settings of joint distillation. All others have the defaults of :func:`vllm_slimspec.train.launch.fit`."""

    steps: int  # the number of optimizer steps, each over total_seq_len tokens
    loss: Loss = "kl"
    lr: float = 4e-4
    seed: int = 0
    data: Path | None = None  # a folder from `slimspec train states`; None: the recorded answers, not the held-out ones
    flags: Mapping[str, Any] = field(default_factory=dict)  # other flags of `speculators train`

    def train(self, drafter: Drafter, factors: Factors, target: str, states: HeadStates, folder: Path) -> Drafter:
        """Continue the training of a whole drafter from the given factors, and return it with factors in their dtype.

        A run that was killed continues in ``folder``. The trained drafter is written to ``folder/drafter``. The states
        must have been recorded with this target, a Hugging Face folder or id, and the answers stored beside them.

        Raises:
            CheckpointError: speculators cannot train this body, or the answers were not stored.
            ValueError: a flag is not allowed.
        """
        from speculators.models.utils import resolve_target_layer_ids

        from vllm_slimspec.train.config import LOSSES
        from vllm_slimspec.train.launch import fit
        from vllm_slimspec.train.states import write_states
        from vllm_slimspec.train.store import read_identity

        trained = folder / "drafter"
        if not trained.exists():
            layer_ids = resolve_target_layer_ids(drafter.config.get("eagle_aux_hidden_state_layer_ids"), target)
            if self.data is not None and (found := read_identity(Path(self.data))["layer_ids"]) != layer_ids:
                raise CheckpointError(
                    f"{self.data}: holds the states of layers {found}, but this drafter reads layers {layer_ids}; "
                    "write the states again with --target-layer-ids"
                )
            _write_start(drafter, factors, target, folder / "start")
            if self.data is None:
                dtype = self.flags.get("hidden_states_dtype", "auto")
                write_states(
                    target, states.documents(held_out=False), folder / "data", layer_ids=layer_ids, dtype=dtype
                )
            flags = {
                "max_steps": self.steps,
                "epochs": self.steps,  # more than needed, so that max_steps ends the training
                "scheduler_warmup_steps": self.steps // 20,
                "loss_fn": LOSSES[self.loss],
                "lr": self.lr,
                "seed": self.seed,
                **self.flags,
            }
            start, data = str(folder / "start"), self.data or folder / "data"
            fit(target, data, trained, rank=len(factors[0]), from_pretrained=start, **flags)
        for done in ("start", "data", "drafter.run"):  # These take gigabytes.
            shutil.rmtree(folder / done, ignore_errors=True)
        written = DraftCheckpoint.open(trained)
        body = {name: info for name, info in written.tensors.items() if not name.startswith(("lm_head", "d2t"))}
        frozen = {name: info for name, info in drafter.body.items() if name == _EMBEDDINGS}
        down, up = (written.load(name).to(factors[0].dtype) for name in (DOWN, UP))
        return replace(drafter, path=trained, body={**body, **frozen}, factors=(down, up), target_rows=False)


def _write_start(drafter: Drafter, factors: Factors, target: str, folder: Path) -> None:
    """Write the converted drafter in speculators' layout, from which training continues."""
    if folder.exists():
        return
    from speculators.utils.loading import load_model_layers

    from vllm_slimspec.train.model import SlimSpecEagle3Config, SlimSpecEagle3Model

    described = speculators_config(drafter.config, target, k=3) | {
        "speculators_model_type": "slimspec_eagle3",
        "lm_head_rank": len(factors[0]),
    }
    layer = described["transformer_layer_config"]
    layer.setdefault("layer_types", ["full_attention"] * layer["num_hidden_layers"])  # vLLM's default
    config = SlimSpecEagle3Config(**described)
    tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in drafter.body_tensors()}
    tensors |= {DOWN: factors[0], UP: factors[1]}
    if _EMBEDDINGS not in tensors:  # transformers would silently leave them uninitialized
        tensors |= load_model_layers([_EMBEDDINGS], target)
    if drafter.d2t is not None and drafter.ids is not None:
        vocab = drafter.config["vocab_size"]
        tensors |= {"d2t": drafter.d2t, "t2d": torch.zeros(vocab, dtype=torch.bool).index_fill_(0, drafter.ids, True)}
    with torch.device("meta"):
        model = SlimSpecEagle3Model(config).state_dict()
    expected = {name: tensor for name, tensor in model.items() if not name.startswith("verifier_")}
    for name in sorted(expected.keys() | tensors.keys()):
        found, wanted = (tuple(t[name].shape) if name in t else "missing" for t in (tensors, expected))
        if found != wanted:
            raise CheckpointError(
                f"{drafter.path}: {name} is {found}, but in speculators' EAGLE-3 it is {wanted}, so this drafter "
                "cannot be trained further; distill the head only (--distill-steps)"
            )
    write_checkpoint(folder, config.to_dict(), tensors, {"made from": str(drafter.path)})
