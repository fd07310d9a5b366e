"""Joint distillation: head, fc and layer learn the target's choices, from the converted drafter on.

It stands above conversion and training, because it is a step of the one that is done by the other.

The trainer is that of :mod:`vllm_slimspec.train`, which continues from a drafter as speculators does: from a folder in
its own layout. What it learns from are the target's answers that the head states were recorded over, but for those held
out; or the states of other documents, of which there may be more.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vllm_slimspec.convert.distill import Loss
from vllm_slimspec.convert.evaluate import Factors
from vllm_slimspec.convert.speculators import speculators_config
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint, write_checkpoint
from vllm_slimspec.drafters.source import Drafter
from vllm_slimspec.engine.head_states import HeadStates
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.spec import DOWN, UP

_EMBEDDINGS = "embed_tokens.weight"


@dataclass(frozen=True)
class JointRecipe:
    """How to train on; what is not said here is as in :func:`vllm_slimspec.train.launch.fit`."""

    steps: int  # of the optimizer, each over total_seq_len tokens
    loss: Loss = "greedy"
    lr: float = 4e-4
    seed: int = 0
    data: str | None = None  # a folder of `slimspec train states`; None: the recorded answers
    flags: Mapping[str, Any] = field(default_factory=dict)  # any other of `speculators train`

    def train(self, drafter: Drafter, factors: Factors, target: str, states: HeadStates, folder: Path) -> Drafter:
        """Call :func:`train_jointly` with this recipe."""
        return train_jointly(drafter, factors, target, states, self, folder)


def train_jointly(
    drafter: Drafter, factors: Factors, target: str, states: HeadStates, recipe: JointRecipe, folder: Path
) -> Drafter:
    """Train the whole drafter on; a run that was killed goes on where it was.

    Args:
        drafter: its body is where training starts.
        factors: of the head to start from.
        target: Hugging Face folder or id.
        states: collected with this target, their answers beside them.
        recipe: steps, loss and the rest.
        folder: where the run is kept; the trained drafter is ``folder/drafter``.

    Returns:
        the trained drafter, with factors of the dtype of those given.

    Raises:
        CheckpointError: the body is not one that speculators trains, or the answers were not kept.
        ValueError: a flag is not allowed.
    """
    from speculators.models.utils import resolve_target_layer_ids

    from vllm_slimspec.train.config import LOSSES
    from vllm_slimspec.train.launch import fit
    from vllm_slimspec.train.states import write_states
    from vllm_slimspec.train.store import read_layer_ids

    trained = folder / "drafter"
    if not trained.exists():
        layer_ids = resolve_target_layer_ids(drafter.config.get("eagle_aux_hidden_state_layer_ids"), target)
        if recipe.data is not None and (found := read_layer_ids(Path(recipe.data))) != layer_ids:
            raise CheckpointError(
                f"{recipe.data}: holds the states of layers {found}, and this drafter looks at {layer_ids}; write them "
                "again with --target-layer-ids"
            )
        _write_start(drafter, factors, target, folder / "start")
        if recipe.data is None:
            dtype = recipe.flags.get("hidden_states_dtype", "auto")
            write_states(target, states.documents(held_out=False), folder / "data", layer_ids=layer_ids, dtype=dtype)
        flags = {
            "max_steps": recipe.steps,
            "epochs": recipe.steps,  # more than are needed
            "scheduler_warmup_steps": recipe.steps // 20,
            "loss_fn": LOSSES[recipe.loss],
            "lr": recipe.lr,
            "seed": recipe.seed,
            **recipe.flags,
        }
        start, data = str(folder / "start"), recipe.data or folder / "data"
        fit(target, data, trained, rank=len(factors[0]), from_pretrained=start, **flags)
    for done in ("start", "data", "drafter.run"):  # gigabytes, of a real drafter
        shutil.rmtree(folder / done, ignore_errors=True)
    written = DraftCheckpoint.open(trained)
    body = {name: info for name, info in written.tensors.items() if not name.startswith(("lm_head", "d2t"))}
    frozen = {name: info for name, info in drafter.body.items() if name == _EMBEDDINGS}
    down, up = (written.load(name).to(factors[0].dtype) for name in (DOWN, UP))
    return replace(drafter, path=trained, body={**body, **frozen}, factors=(down, up), target_rows=False)


def _write_start(drafter: Drafter, factors: Factors, target: str, folder: Path) -> None:
    """The converted drafter as speculators would have saved it.

    Raises:
        CheckpointError: not a body that speculators knows.
    """
    if folder.exists():
        return
    from speculators.utils.loading import load_model_layers

    from vllm_slimspec.train.model import SlimSpecEagle3Config, SlimSpecEagle3Model

    described = speculators_config(drafter.config, target, k=3) | {
        "speculators_model_type": "slimspec_eagle3",
        "lm_head_rank": len(factors[0]),
    }
    layer = described["transformer_layer_config"]
    layer.setdefault("layer_types", ["full_attention"] * layer["num_hidden_layers"])  # as vLLM takes it, if silent
    config = SlimSpecEagle3Config(**described)
    tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in drafter.body_tensors()}
    tensors |= {DOWN: factors[0], UP: factors[1]}
    if _EMBEDDINGS not in tensors:  # transformers would fill them with whatever is in memory, and nobody would notice
        tensors |= load_model_layers([_EMBEDDINGS], target)
    if drafter.d2t is not None and drafter.ids is not None:
        vocab = drafter.config["vocab_size"]
        tensors |= {"d2t": drafter.d2t, "t2d": torch.zeros(vocab, dtype=torch.bool).index_fill_(0, drafter.ids, True)}
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in SlimSpecEagle3Model(config).state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    ours = {name: s for name, s in expected.items() if not name.startswith("verifier_")}
    for name in sorted(ours.keys() | found.keys()):
        if ours.get(name) != found.get(name):
            raise CheckpointError(
                f"{drafter.path}: {name} is {found.get(name, 'missing')} and speculators' EAGLE-3 has "
                f"{ours.get(name, 'none')}, so it cannot be trained on; distill the head only (--distill-steps)"
            )
    write_checkpoint(folder, config.to_dict(), tensors, {"made from": str(drafter.path)})
