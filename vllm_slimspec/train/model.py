"""The EAGLE-3 model of speculators with a low-rank head, whose two factors are trained with the rest of the drafter.

speculators freezes its dense head, which is a copy of the target's rows. Here the factors start from it and learn.
"""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal
from unittest.mock import patch

import torch
from pydantic import Field
from speculators import SpeculatorModel, SpeculatorModelConfig, reload_schemas
from speculators.losses import resolve_loss_config
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.models.eagle3 import core as eagle3_core
from speculators.utils.loading import list_checkpoint_keys
from torch import nn

from vllm_slimspec.common.progress import progress
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.factorize import factorize, second_moment, token_probabilities
from vllm_slimspec.train.on_cpu import answers_only
from vllm_slimspec.train.store import read_final_states

HeadInit = Literal["weighted-svd", "svd", "random"]

# Number of states for which the factorization is weighted. More of them change nothing that can be measured.
_CALIBRATION_STATES = 40_000


class LowRankHead(nn.Module):
    """Map hidden states [..., D] to logits [..., V] by ``down`` [R, D] and then ``up`` [V, R], without a bias."""

    def __init__(self, hidden_size: int, rank: int, vocab_size: int):
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, vocab_size, bias=False)
        for factor in (self.down, self.up):
            # NaN shows a head that was never filled, and the flag keeps transformers from filling it at random.
            nn.init.constant_(factor.weight, torch.nan)
            factor._is_hf_initialized = True  # type: ignore[assignment]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(hidden))


@SpeculatorModelConfig.register("slimspec_eagle3")
class SlimSpecEagle3Config(Eagle3SpeculatorConfig):
    """EAGLE-3's config, with the rank of the head and whether the head is the target's."""

    speculators_model_type: Literal["slimspec_eagle3"] = "slimspec_eagle3"
    lm_head_rank: int = Field(default=1, ge=0, description="Rows of lm_head.down: the R of the factors; 0: dense head")
    head_is_targets: bool = Field(default=False, description="The dense head is the target's: frozen and not exported")


@SpeculatorModel.register("slimspec_eagle3")
class SlimSpecEagle3Model(Eagle3DraftModel):
    """EAGLE-3 with a :class:`LowRankHead` as its ``lm_head``, or with a dense head, trained or the target's."""

    config_class: ClassVar[type[Eagle3SpeculatorConfig]] = SlimSpecEagle3Config
    lm_head: LowRankHead | nn.Linear

    def _init_vocab(self, config: SlimSpecEagle3Config) -> None:
        super()._init_vocab(config)
        if config.lm_head_rank:
            self.lm_head = LowRankHead(self.hidden_size, config.lm_head_rank, self.draft_vocab_size)
        else:
            self.lm_head.requires_grad_(not config.head_is_targets)

    def forward(self, *args: Any, loss_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Call speculators' model. In training on a CPU, compute logits only at the places that the loss counts."""
        if not self.training or loss_mask is None or loss_mask.device.type != "cpu":
            return super().forward(*args, loss_mask=loss_mask, **kwargs)
        with answers_only(self.verifier_lm_head, self.lm_head, loss_mask):
            return super().forward(*args, loss_mask=loss_mask, **kwargs)

    def load_verifier_weights(self) -> None:
        """Load embeddings, final norm and teacher head from the target, but leave the drafter's own head as it is."""
        # The parent also fills and freezes `lm_head.weight`. Here that is the teacher's weight, which it fills anyway.
        # This is no patch(), which would move the head behind the other modules, and so its place in the optimizer.
        head, self.lm_head = self.lm_head, self.verifier_lm_head
        super().load_verifier_weights()
        self.lm_head = head

    def init_head(self, how: HeadInit, data_path: str | Path) -> None:
        """Give the head its first values. The target's weights must be loaded before.

        Args:
            how: ``weighted-svd`` factorizes the target's head for the states in ``data_path``, ``svd`` without weights;
                ``random`` does not use the target's head. A dense head starts as a copy of the target's unless
                ``random`` is given.
            data_path: a folder that was written by :func:`vllm_slimspec.train.states.write_states`.
        """
        if how == "random":
            for linear in (module for module in self.lm_head.modules() if isinstance(module, nn.Linear)):
                linear.reset_parameters()
            return
        if isinstance(self.lm_head, nn.Linear):
            self.lm_head.load_state_dict(self.verifier_lm_head.state_dict())
            return
        weight = self.verifier_lm_head.weight.detach().to(torch.accelerator.current_accelerator() or "cpu")
        statistics: dict[str, torch.Tensor] = {}
        if how == "weighted-svd":
            with torch.no_grad():
                states = self.verifier_norm(read_final_states(data_path, _CALIBRATION_STATES).float()).to(weight.device)
            statistics = {"second_moment": second_moment(states), "probabilities": token_probabilities(weight, states)}
        with progress("Factorizing the target's head"), torch.no_grad():
            down, up = factorize(weight, self.config.lm_head_rank, **statistics)
            self.lm_head.down.weight.copy_(down)
            self.lm_head.up.weight.copy_(up)

    @classmethod
    def from_training_args(
        cls, verifier_config: Any, t2d: torch.Tensor | None = None, d2t: torch.Tensor | None = None, **kwargs: Any
    ) -> "SlimSpecEagle3Model":
        """Return a fresh drafter. speculators calls this with every flag of the run."""
        # The parent builds a config of its own class, which does not know the rank.
        ours = {key: kwargs[key] for key in ("lm_head_rank", "head_is_targets")}
        with patch.object(eagle3_core, "Eagle3SpeculatorConfig", partial(SlimSpecEagle3Config, **ours)):
            model = super().from_training_args(verifier_config, t2d=t2d, d2t=d2t, **kwargs)
        model.init_head(kwargs["head_init"], kwargs["data_path"])
        return model

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the arguments of ``forward`` in training and in validation, which also measures alpha = 1 - TV."""
        training, validation = Eagle3DraftModel.get_trainer_kwargs(**kwargs)
        distance = resolve_loss_config("tv", kwargs["loss_implementation"])["tv"][0]
        return training, {**validation, "loss_config": {"tv": (distance, 0.0), **validation["loss_config"]}}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "SlimSpecEagle3Model":
        """Load a trained drafter of this class.

        Raises:
            CheckpointError: the checkpoint has no factors. transformers would only warn, and the head would be lost.
        """
        folder = Path(pretrained_model_name_or_path)
        rank = cls.config_class.from_pretrained(str(folder)).lm_head_rank
        if rank and "lm_head.down.weight" not in list_checkpoint_keys(folder):
            raise CheckpointError(
                f"{folder}: has no lm_head.down.weight; make its head low-rank with `slimspec convert` first"
            )
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


reload_schemas()
