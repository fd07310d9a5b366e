"""Run the target over documents, and store its hidden states, from which a drafter learns.

The target runs in plain transformers, so a small one needs no server. The layout on the disk is described in
:mod:`vllm_slimspec.train.store`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from speculators.models.utils import resolve_target_layer_ids
from transformers import AutoModelForCausalLM, PreTrainedModel

from vllm_slimspec.common.output import claim_work, write_whole
from vllm_slimspec.common.progress import progress
from vllm_slimspec.common.work_dtype import Asked, work_dtype
from vllm_slimspec.engine.head_states import Document
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.train.quiet import quiet
from vllm_slimspec.train.store import flaw, is_checked, read_identity, write_state


@quiet()
def write_states(
    target: str | Path,
    documents: Sequence[Document],
    folder: str | Path,
    *,
    layer_ids: list[int] | None = None,
    keep: int | None = None,
    tokens_per_batch: int = 2048,
    dtype: Asked = "auto",
) -> None:
    """Run the target over documents, and write its hidden states to a folder.

    A second call with the same arguments resumes: documents whose states are stored and whole are not run again.

    Args:
        target: Hugging Face folder or id.
        documents: documents of at least 2 tokens each. The tokens of their prompts are not trained on.
        folder: folder to write, which is empty or holds states of the same target, layers and documents.
        layer_ids: target layers whose inputs the drafter reads; None takes (2, n // 2, n - 3) of n layers.
        keep: number of documents whose states are stored, if a server gives the others in training; None stores all.
        tokens_per_batch: maximum number of padded tokens in one forward pass. A longer document has a pass of its own.
        dtype: dtype in which the target computes, see :func:`vllm_slimspec.common.work_dtype.work_dtype`. The states
            are stored in the dtype of the target's weights, so that a folder has one size on every machine.

    Raises:
        CheckpointError: a document is too short or holds an unknown token, the folder holds other states, or a layer
            does not exist.
        OutputError: the folder cannot be written, or is being written by another process.
    """
    with claim_work(folder) as claim, progress("train states", ends=False):
        path = claim.path
        with progress("Loading the target"):
            model = AutoModelForCausalLM.from_pretrained(str(target), dtype="auto", trust_remote_code=False).eval()
        _blocks(model)  # refuses the target before anything is written
        layers = resolve_target_layer_ids(layer_ids, str(target))
        vocab = model.config.get_text_config().vocab_size
        tokens = [document.tokens for document in documents]
        for i, ids in enumerate(tokens):
            if len(ids) < 2 or not 0 <= min(ids) <= max(ids) < vocab:
                raise CheckpointError(
                    f"document {i}: has {len(ids)} tokens, and must have 2 or more, with ids from 0 to {vocab - 1}; "
                    "drop it, or tokenize it with the target's tokenizer"
                )
        identity = {
            "target": str(target),
            "layer_ids": layers,
            "prompts": sum(d.prompt > 0 for d in documents),
            "sha256": _fingerprint(model, layers, documents),
        }
        if not (path / "states.json").exists() and not (path / "dataset_info.json").exists():
            (path / "hidden_states").mkdir(exist_ok=True)
            write_whole(path / "states.json", lambda part: part.write_text(json.dumps(identity, indent=2) + "\n"))
        elif read_identity(path).get("sha256") != identity["sha256"]:
            raise CheckpointError(
                f"{path}: holds a data set already, of another target, other documents or another --train-on; choose "
                "another folder"
            )
        chosen, stored = work_dtype(dtype, model.dtype), model.dtype
        chosen.log("hidden states")
        if chosen.dtype != stored:  # Module.to() would round the rotary frequencies too, so the model is loaded again.
            model = AutoModelForCausalLM.from_pretrained(
                str(target), dtype=chosen.dtype, trust_remote_code=False
            ).eval()
        model.to(torch.accelerator.current_accelerator() or "cpu")
        kept = tokens[:keep]
        todo = [] if is_checked(path) else [i for i, ids in enumerate(kept) if flaw(path, i, ids)]
        with progress("Hidden states", len(kept), "document", done=len(kept) - len(todo)) as shown:
            for indices in _batches(todo, tokens, tokens_per_batch):
                batch = [torch.tensor(tokens[i], dtype=torch.long) for i in indices]
                for i, document, states in zip(indices, batch, hidden_states(model, batch, layers), strict=True):
                    write_state(path, i, document, states.to(stored))
                shown.update(len(indices))
        if not (path / "dataset_info.json").exists():
            claim.write(lambda new: _write_documents(documents, new), last="dataset_info.json")


def _write_documents(documents: Sequence[Document], folder: Path) -> None:
    rows = {
        "input_ids": [d.tokens for d in documents],
        "loss_mask": [[0] * d.prompt + [1] * (len(d.tokens) - d.prompt) for d in documents],
        "seq_len": [len(d.tokens) for d in documents],
    }
    Dataset.from_dict(rows).with_format("torch").save_to_disk(folder)
    torch.save(dict(Counter(token for d in documents for token in d.tokens[d.prompt :])), folder / "token_freq.pt")


def _blocks(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Return the layers of the target's decoder, or refuse a target that keeps them elsewhere."""
    blocks = getattr(model.get_decoder(), "layers", None)
    if blocks is None:
        raise CheckpointError(
            f"{type(model).__name__} keeps no decoder layers in .layers, so their inputs cannot be read; "
            "give a target such as Llama or Qwen3"
        )
    return blocks


def _fingerprint(model: PreTrainedModel, layer_ids: list[int], documents: Sequence[Document]) -> str:
    """Return a hash of everything that determines the states and the loss mask."""
    digest = hashlib.sha256(f"{model.config.to_json_string()} {layer_ids}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    for document in documents:
        digest.update(torch.tensor([len(document.tokens), *document.tokens]).numpy().data)
    prompts = [document.prompt for document in documents]
    if any(prompts):  # Without prompts this stays the hash of earlier versions, which masked nothing.
        digest.update(torch.tensor(prompts).numpy().data)
    return digest.hexdigest()


@torch.inference_mode()
def hidden_states(
    model: PreTrainedModel, batch: Sequence[torch.Tensor], layer_ids: Sequence[int]
) -> list[torch.Tensor]:
    """Return the inputs of the target's layers and the last output, for each document [T, len(layer_ids) + 1, D].

    Args:
        model: a causal language model of transformers whose decoder keeps its blocks in ``layers``.
        batch: token ids of each document, int64 [T], of any lengths.
        layer_ids: numbers of layers, from 0 to the number of layers, which stands for the output of the last one.
    """
    blocks = _blocks(model)
    seen: dict[int, torch.Tensor] = {}

    def enter(i):
        return lambda _, args, kwargs: seen.__setitem__(i, args[0] if args else kwargs["hidden_states"])

    def leave(_, __, output):
        seen[len(blocks)] = output[0] if isinstance(output, tuple) else output

    handles = [blocks[i].register_forward_pre_hook(enter(i), with_kwargs=True) for i in layer_ids if i < len(blocks)]
    handles.append(blocks[-1].register_forward_hook(leave))
    try:
        # Padding on the right needs no mask, because a causal model does not attend to later tokens.
        padded = torch.nn.utils.rnn.pad_sequence(list(batch), batch_first=True)
        model.get_decoder()(input_ids=padded.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    stacked = torch.stack([seen[i] for i in (*layer_ids, len(blocks))], dim=2).cpu()  # [B, T, n_aux + 1, D]
    return [states[: len(ids)].contiguous() for ids, states in zip(batch, stacked, strict=True)]


def _batches(todo: Sequence[int], tokens: Sequence[list[int]], budget: int) -> Iterator[list[int]]:
    """Yield batches of neighboring documents, as many as fit ``budget`` tokens when padded to the longest."""
    batch: list[int] = []
    longest = 0
    for i in todo:
        if batch and max(len(tokens[i]), longest) * (len(batch) + 1) > budget:
            yield batch
            batch, longest = [], 0
        batch.append(i)
        longest = max(longest, len(tokens[i]))
    if batch:
        yield batch
