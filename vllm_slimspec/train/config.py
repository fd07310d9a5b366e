"""Make the configuration of a training run from the paper's recipe, speculators' settings and the user's flags."""

import sys
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from speculators.train.config import TrainConfig
from transformers import AutoConfig, PretrainedConfig

from vllm_slimspec.common.output import beside, check_free
from vllm_slimspec.common.work_dtype import work_dtype
from vllm_slimspec.errors import CheckpointError, OptionError
from vllm_slimspec.train.model import HeadInit
from vllm_slimspec.train.store import read_identity

MIXED = torch.bfloat16  # The dtype in which speculators computes by default; its weights are in float32.
# The paper's recipe in speculators' names. Betas (0.9, 0.95), eps 1e-8 and clipping at 1.0 have no flag. The paper's
# batch of 64 sequences becomes a number of tokens: total_seq_len x ranks. The paper does not name its loss.
RECIPE: Mapping[str, Any] = {
    "epochs": 10,
    "optimizer": "adamw",
    "lr": 4e-4,
    "weight_decay": 0.0,
    "scheduler_type": "cosine",
    "scheduler_warmup_steps": 100,
    "loss_fn": "kl_div",
    "checkpoint_freq": 0.1,  # of an epoch; less often if epochs are short (SlimSpecTrainer.maybe_save_checkpoint)
    "max_consecutive_generation_failures": 1,  # More would let speculators go on without the documents it missed.
}
LOSSES = {
    "kl": "kl_div",
    "nla": "nla",
    "lk_hybrid": "lk_hybrid",
    "greedy": '{"ce": 0.5, "kl_div": 0.5}',  # ce: cross entropy to the target's best token
}
# speculators has no switch for a machine without an accelerator. Attention on a CPU multiplies every token of a step
# with every other one. A step is therefore only as long as the longest document of `slimspec train states`.
_CPU_RECIPE: Mapping[str, Any] = {
    "draft_attn_impl": "sdpa",
    "loss_implementation": "eager",
    "num_workers": 0,
    "total_seq_len": 2048,
}


class SlimSpecTrainConfig(TrainConfig):
    """Configuration of speculators with the keys of this package, which reaches the model as a whole."""

    lm_head_rank: int = Field(default=1, ge=0)
    head_is_targets: bool = False
    head_init: HeadInit = "weighted-svd"

    def flatten(self) -> dict[str, Any]:
        return super().flatten() | {key: getattr(self, key) for key in ("lm_head_rank", "head_is_targets", "head_init")}


def resolve(
    target: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    head: Literal["low-rank", "dense", "target"] = "low-rank",
    rank: int | None = None,
    head_init: HeadInit = "weighted-svd",
    **flags: Any,
) -> SlimSpecTrainConfig:
    """Check the options of a run, and return its configuration. Nothing is written, and ``data`` need not exist yet.

    The first three arguments are those of :func:`vllm_slimspec.train.launch.fit`.

    Args:
        head: ``low-rank``; ``dense``, an ordinary head for comparison, which is trained as the factors are and served
            by vLLM; or ``target``, the target's own head, which is neither trained nor exported: vLLM shares it.
        rank: R of a low-rank head; None takes D // 8.
        head_init: first values of the head, see :meth:`SlimSpecEagle3Model.init_head`.
        flags: any flag of ``speculators train``, with underscores. A flag wins over :data:`RECIPE`.

    Raises:
        OptionError: a value is not allowed.
        CheckpointError: the data hold the states of other layers.
        OutputError: the output exists already.
    """
    found = version("speculators")
    if not found.startswith("0.9."):
        raise OptionError(f"speculators {found} is not supported, 0.9.* is; pip install 'vllm-slimspec[train]'")
    if flags.get("hidden_states_dtype") == "float16":
        raise OptionError("--dtype float16: gradients would need scaling; choose auto, float32 or bfloat16")
    output = Path(output)
    check_free(output)
    layer_ids = read_identity(Path(data))["layer_ids"]
    if layer_ids and flags.get("target_layer_ids", layer_ids) != layer_ids:
        raise CheckpointError(
            f"{data}: holds the states of layers {layer_ids}; leave out --target-layer-ids, or write other states"
        )
    hidden = AutoConfig.from_pretrained(str(target), trust_remote_code=False).get_text_config().hidden_size
    if start := flags.get("from_pretrained"):
        config = PretrainedConfig.get_config_dict(start)[0]
        if config.get("speculators_model_type") != "slimspec_eagle3":
            raise OptionError(
                f"--from-pretrained {start}: not a checkpoint of a run; give one (DRAFTER.run/checkpoints/N), or go on "
                "training this drafter with `slimspec convert --joint-steps`"
            )
        started = config["lm_head_rank"]
        rank = started or hidden // 8 if rank is None else rank
        if started != (rank if head == "low-rank" else 0):
            raise OptionError(
                f"--from-pretrained {start}: its rank is {started} (0: dense); give the --rank and --head of that run"
            )
    rank = hidden // 8 if rank is None else rank
    if not 1 <= rank <= hidden:
        raise OptionError(f"rank={rank} does not fit hidden_size={hidden} of {target}; choose 1 to {hidden}")
    if head == "target" and (head_init == "random" or flags.get("draft_vocab_size") is not None):
        raise OptionError(
            "--head target is the target's whole head; leave out --head-init random and --draft-vocab-size, or train a "
            "head of the drafter's own with --head dense"
        )
    fresh = not flags.keys() & {"draft_config", "from_pretrained"}
    run = {
        **RECIPE,
        # Without this key, speculators silently gives a fresh layer a sliding window of 2048 tokens.
        **({"full_attention_indices": [0]} if fresh else {}),
        **({} if torch.accelerator.is_available() else _CPU_RECIPE),
        "hidden_states_dtype": work_dtype("auto", MIXED).name,
        "mask_token_id": 0,  # EAGLE-3 never masks, but without a value speculators loads a tokenizer to choose one.
        "on_missing": "raise",
        "log_dir": str(beside(output, ".run") / "logs"),
        "target_layer_ids": layer_ids,
        **flags,
        "verifier_name_or_path": str(target),
        "data_path": str(data),
        "save_path": str(beside(output, ".run") / "checkpoints"),
        "lm_head_rank": rank if head == "low-rank" else 0,
        "head_is_targets": head == "target",
        "head_init": head_init,
    }
    unknown = run.keys() - SlimSpecTrainConfig().flatten().keys()
    if unknown:
        raise OptionError(f"unknown flags {sorted(unknown)}; `speculators train --help` lists them")
    if "tensorboard" in str(run.get("logger", "")) and not find_spec("tensorboard"):
        raise OptionError("--logger tensorboard: that package is not installed; pip install tensorboard")
    try:
        return SlimSpecTrainConfig.from_sources(cli=run, argv=sys.argv)
    except ValidationError as error:
        first = error.errors()[0]
        raise OptionError(f"{first['loc'][-1]}={first['input']!r}: {first['msg']}") from None
