"""The target's hidden states on disk, in the layout that speculators trains from.

    FOLDER/                                   a Hugging Face data set: input_ids, loss_mask, seq_len
    FOLDER/token_freq.pt                      how often each token is asked for, to choose a truncated vocabulary
    FOLDER/hidden_states/hs_<i>.safetensors   hidden_states [T, n_aux + 1, D], token_ids int64 [T]

Slot j < n_aux holds what *enters* target layer ``layer_ids[j]``, as vLLM hands it to the drafter; the last slot is the
output of the last layer *before* the final norm. Plain transformers writes them, so a small target needs no server.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from speculators.models.utils import resolve_target_layer_ids
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def read_documents(file: str | Path, target: str | Path, max_length: int) -> list[list[int]]:
    """Token ids of each line of a JSONL file: its ``input_ids``, or its ``text`` by the target's tokenizer.

    Args:
        file: one JSON object a line.
        target: Hugging Face folder or id; its tokenizer is loaded only if a line holds text.
        max_length: tokens kept of a line.

    Raises:
        ValueError: a line is not JSON, or holds neither.
    """
    tokenizer = None
    documents = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            given = row["input_ids"] if "input_ids" in row else row["text"]
        except (json.JSONDecodeError, TypeError, KeyError):
            raise ValueError(f'{file}:{number}: must be {{"text": ...}} or {{"input_ids": [...]}}; mend it') from None
        if isinstance(given, str):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(str(target))
            given = tokenizer(given)["input_ids"]
        documents.append(given[:max_length])
    return documents


def write_states(
    target: str | Path,
    documents: Sequence[Sequence[int]],
    folder: str | Path,
    *,
    layer_ids: list[int] | None = None,
    tokens_per_batch: int = 8192,
) -> None:
    """Run the target over documents and keep its hidden states, in the target's own dtype.

    Args:
        target: Hugging Face folder or id.
        documents: token ids, each document at least 2 tokens.
        folder: where to write; must not hold a data set already.
        layer_ids: the target layers whose inputs the drafter sees; default (2, n // 2, n - 3).
        tokens_per_batch: padded tokens in one forward pass (a longer document goes alone).

    Raises:
        ValueError: a document is too short or holds an unknown token, the folder is taken, or the layers do not exist.
    """
    path = Path(folder)
    if (path / "dataset_info.json").exists():
        raise ValueError(f"{path}: holds a data set already; remove it or choose another folder")
    model = AutoModelForCausalLM.from_pretrained(str(target), dtype="auto").eval()
    model.to(torch.accelerator.current_accelerator() or "cpu")
    layers = resolve_target_layer_ids(layer_ids, str(target))
    vocab = model.config.get_text_config().vocab_size
    for i, ids in enumerate(documents):
        if len(ids) < 2 or not 0 <= min(ids) <= max(ids) < vocab:
            raise ValueError(
                f"document {i}: {len(ids)} tokens, ids must be 0 to {vocab - 1} and at least 2; drop or re-tokenise it"
            )

    (path / "hidden_states").mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(documents), desc="Hidden states", unit="doc", disable=None) as progress:
        for indices in _batches([len(ids) for ids in documents], tokens_per_batch):
            batch = [torch.tensor(documents[i], dtype=torch.long) for i in indices]
            for i, ids, states in zip(indices, batch, hidden_states(model, batch, layers), strict=True):
                save_file({"hidden_states": states, "token_ids": ids}, path / "hidden_states" / f"hs_{i}.safetensors")
            progress.update(len(indices))
    rows = {
        "input_ids": [list(ids) for ids in documents],
        "loss_mask": [[1] * len(ids) for ids in documents],
        "seq_len": [len(ids) for ids in documents],
    }
    torch.save(dict(Counter(token for ids in documents for token in ids)), path / "token_freq.pt")
    Dataset.from_dict(rows).with_format("torch").save_to_disk(path)  # last: without it a folder is not complete


@torch.inference_mode()
def hidden_states(
    model: PreTrainedModel, batch: Sequence[torch.Tensor], layer_ids: Sequence[int]
) -> list[torch.Tensor]:
    """What the target's layers see for each document, each [T, len(layer_ids) + 1, D] on the CPU.

    Args:
        model: a causal language model of transformers whose decoder keeps its blocks in ``layers``.
        batch: token ids int64 [T], of any lengths.
        layer_ids: from 0 to the number of layers (which stands for the last layer's output).
    """
    decoder = model.get_decoder()
    blocks = getattr(decoder, "layers", None)
    if blocks is None:
        raise ValueError(f"{type(model).__name__} keeps no decoder layers in .layers; give a Llama or Qwen3 target")
    seen: dict[int, torch.Tensor] = {}

    def enter(i):
        return lambda _, args, kwargs: seen.__setitem__(i, args[0] if args else kwargs["hidden_states"])

    def leave(_, __, output):
        seen[len(blocks)] = output[0] if isinstance(output, tuple) else output

    handles = [blocks[i].register_forward_pre_hook(enter(i), with_kwargs=True) for i in layer_ids if i < len(blocks)]
    handles.append(blocks[-1].register_forward_hook(leave))
    try:
        # Padding on the right needs no mask: a causal model cannot look at it.
        padded = torch.nn.utils.rnn.pad_sequence(list(batch), batch_first=True)
        decoder(input_ids=padded.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    stacked = torch.stack([seen[i] for i in (*layer_ids, len(blocks))], dim=2).cpu()  # [B, T, n_aux + 1, D]
    return [states[: len(ids)].contiguous() for ids, states in zip(batch, stacked, strict=True)]


def read_final_states(folder: str | Path, limit: int) -> torch.Tensor:
    """Up to ``limit`` outputs of the target's last layer (before its final norm), [N, D].

    Raises:
        ValueError: the folder holds no hidden states.
    """
    found: list[torch.Tensor] = []
    for file in sorted((Path(folder) / "hidden_states").glob("hs_*.safetensors")):
        found.append(load_file(file)["hidden_states"][:, -1])
        if sum(map(len, found)) >= limit:
            break
    if not found:
        raise ValueError(f"{folder}: no hidden_states/hs_*.safetensors; run `slimspec train states` first")
    return torch.cat(found)[:limit]


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Neighbours in one batch, as many as fit ``budget`` once padded to the longest."""
    batch: list[int] = []
    for i, length in enumerate(lengths):
        if batch and max(length, *(lengths[j] for j in batch)) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
