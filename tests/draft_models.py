"""Draft models built, loaded and prepared as vLLM's loaders do it, without an engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import drafters
import torch


@contextmanager
def parallel_groups(folder: Path) -> Iterator[None]:
    """Give vLLM its process groups, of one rank, unless an engine of this process has left its own."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized():
        yield
        return
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{folder / 'rendezvous'}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def build(folder: Path, tensors, head=None, dtype=torch.float32, **changes):
    """Build the drafter of ``tensors`` and of config.json's ``changes`` -> the draft model and its ModelConfig.

    ``head`` stands for the target's, which vLLM would share.
    """
    from transformers import LlamaConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.utils.torch_utils import set_default_torch_dtype

    sizes = drafters.config(**changes)
    shared = {k: v for k, v in sizes.items() if k != "architectures" and not k.startswith("lm_head_")}
    LlamaConfig(**shared | {"num_hidden_layers": 4, "architectures": ["LlamaForCausalLM"]}).save_pretrained(
        folder / "target"
    )
    config = EngineArgs(
        model=str(folder / "target"),
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=2,
        dtype=str(dtype).removeprefix("torch."),
        speculative_config={
            "model": str(drafters.write(folder / "drafter", sizes, tensors)),
            "num_speculative_tokens": 3,
        },
    ).create_engine_config()
    draft = config.speculative_config.draft_model_config
    with set_default_torch_dtype(dtype):
        model = initialize_model(config, model_config=draft)
    model.load_weights(iter(tensors.items()))
    process_weights_after_loading(model, draft, torch.device("cpu"))
    if head is not None:  # as vLLM shares the target's
        record_metadata_for_reloading(head)
        model.lm_head = head
    with torch.inference_mode():  # as both runners pass through `forward`
        model.slot.prepare(model.lm_head, model.draft_id_to_target_id)
    return model, draft
