"""A target model on disk or on the Hugging Face hub: reading its sizes, and its head for drafters that use it."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vllm_slimspec.common.files import (
    TensorInfo,
    load_rows,
    load_tensor,
    read_config,
    read_header,
    read_headers,
    read_json_object,
    read_weight_map,
)
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.dense import StoredHead, stored_head

_FINGERPRINTED = 1 << 20  # bytes at the beginning and the end of a file that its fingerprint is made from
_SHARDED = 1 << 30  # bytes of weights that any model with an index has at least
# The keys under which multimodal targets keep their language model: those of transformers and of vLLM's own classes.
_NESTED = (
    *("text_config", "thinker_config", "llm_config", "language_config", "wrapped_model_config", "vlm_config"),
    *("decoder_config", "decoder", "generator"),
)
_SIZES = ("hidden_size", "vocab_size")


@dataclass(frozen=True)
class Target:
    """A target's config, from which its sizes are read, and access to its head."""

    name: str
    path: Path
    config: dict[str, Any]  # with the keys of the language model at the top

    @classmethod
    def open(cls, target: str | os.PathLike[str]) -> "Target":
        """Read the config.json of a folder or a Hugging Face id, and return the target.

        Raises:
            CheckpointError: there is no such folder or repository, or its config has no sizes.
        """
        path = fetch(target, ["*.json"])
        return cls(str(target), path, text_config(read_config(path), path))

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """Return generation_config.json, which names all tokens that end a text; empty if there is no such file."""
        file = self.path / "generation_config.json"
        return read_json_object(file) if file.is_file() else {}

    @property
    def hidden_size(self) -> int:
        return self.config["hidden_size"]

    @property
    def vocab_size(self) -> int:
        return self.config["vocab_size"]

    def head(self) -> torch.Tensor:
        """Read and return the target's LM head [vocab, hidden]. Only the file that holds the head is fetched.

        Raises:
            CheckpointError: there is no head of this shape, or it is stored in a form that is not supported.
        """
        stored, tensors = self._head
        return stored.read(lambda name: load_tensor(tensors[name], name))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Read and return the rows [N, D] of the head with these ids, int64 [N]; errors are those of :meth:`head`."""
        stored, tensors = self._head
        chosen = ids.tolist()

        def load(name: str) -> torch.Tensor:
            info = tensors[name]
            whole = len(info.shape) < 1 or info.shape[0] == 1  # one scale for all rows
            return load_tensor(info, name) if whole else load_rows(info, name, chosen)

        return stored.read(load)

    @property
    def head_is_plain(self) -> bool:
        """Return whether the head is stored in floats. A drafter cannot re-rank with the rows of a head in float8."""
        return self._head[0].scale is None

    @cached_property
    def _head(self) -> tuple[StoredHead, dict[str, TensorInfo]]:
        tensors = self._find()
        described = {name: (info.dtype, info.shape) for name, info in tensors.items()}
        shape = (self.vocab_size, self.hidden_size)
        found = stored_head(described, shape, str(self.path), prefixed=True)
        # If the config does not say whether the head is tied to the embeddings, a missing head shows that it is.
        if found is None and self.config.get("tie_word_embeddings") is not False:
            embeddings = {n.replace("embed_tokens", "lm_head"): n for n in tensors if n.endswith("embed_tokens.weight")}
            renamed = {name: described[n] for name, n in embeddings.items()}
            tied = stored_head(renamed, shape, str(self.path), prefixed=True)
            found = None if tied is None else StoredHead(embeddings[tied.weight], None)
        if found is None:
            raise CheckpointError(f"{self.path}: holds no lm_head.weight in safetensors; give the target's own folder")
        return found, tensors

    def _find(self) -> dict[str, TensorInfo]:
        """Return the tensors that may be the head or, for a tied head, the embeddings."""

        def may_be(name: str) -> bool:
            return "lm_head" in name or name.endswith("embed_tokens.weight")

        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            needed = sorted({file for name, file in read_weight_map(index, _SHARDED).items() if may_be(name)})
            folder = fetch(self.name, ["*.json", *needed])
            found = {name: info for file in needed for name, info in read_header(folder / file).items()}
        else:
            found = read_headers(fetch(self.name, ["*.json", "model.safetensors"]))
        return {name: info for name, info in found.items() if may_be(name)}

    def nbytes(self, k: int) -> int:
        """Return the bytes that one verification of ``k`` drafted tokens reads, computed from the config's sizes.

        They are those of every weight except the embeddings, in bfloat16. In a mixture of experts, each of the k + 1
        tokens is assumed to choose other experts.
        """
        c = self.config

        def first(*keys: str) -> int:
            return next((c[key] for key in keys if c.get(key)), 0)

        d = c["hidden_size"]
        ff = first("intermediate_size") or 4 * d
        if experts := first("num_experts", "num_local_experts", "n_routed_experts"):
            chosen = first("num_experts_per_tok", "experts_per_token") or 1
            ff = (first("moe_intermediate_size") or ff) * min(experts, chosen * (k + 1))
        heads = c.get("num_attention_heads", 1)
        head_dim = c.get("head_dim") or d // heads
        kv = c.get("num_key_value_heads") or heads
        layer = 2 * d * head_dim * (heads + kv) + 3 * d * ff
        return 2 * (c.get("num_hidden_layers", 1) * layer + c["vocab_size"] * d)


def text_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the keys of the language model, as vLLM finds it, merged over the keys of the blocks around it.

    Args:
        config: the target's config.json.
        folder: the target's folder. vLLM reads it if the config leaves sizes to the defaults of its class.

    Raises:
        CheckpointError: hidden_size or vocab_size is missing, and vLLM does not know a default.
    """
    merged: dict[str, Any] = {}
    inner: Mapping[str, Any] | None = config
    while inner is not None:
        merged |= inner
        part, inner = inner, next((inner[key] for key in _NESTED if isinstance(inner.get(key), Mapping)), None)
    needed = _SIZES if part is config else (*_SIZES, "num_hidden_layers")
    missing = next((key for key in needed if not isinstance(part.get(key), int)), None)
    if missing is None:
        return merged
    try:
        from vllm.transformers_utils.config import get_config, get_hf_text_config

        found = get_hf_text_config(get_config(folder, trust_remote_code=False)).to_dict()
        if all(isinstance(found.get(key), int) for key in _SIZES):
            return merged | found
    except Exception:  # The config's class may raise anything; the missing key is what the user can correct.
        pass
    raise CheckpointError(f"{folder / 'config.json'}: {missing} is missing; give the target's own folder")


def fetch(name: str | os.PathLike[str], patterns: list[str], revision: str | None = None) -> Path:
    """Return a local folder, or download the files with these patterns from a Hugging Face repository into one.

    Raises:
        CheckpointError: there is no such folder, and the hub has no such repository or cannot be reached.
    """
    path = Path(name)
    if path.exists() or str(name).count("/") != 1:
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns, revision=revision))
    except Exception as error:  # The hub's classes, httpx's and OSError all give the reason in their first line.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{name}: no such folder, and not on the Hugging Face hub: {reason}") from None


def fingerprint(name: str | os.PathLike[str]) -> str:
    """Return a text that changes when the model under a name changes, without reading the whole model.

    It is the revision on the hub, or the SHA-256 of the config and of the size, the beginning and the end of each file.
    """
    path = fetch(name, ["config.json"])
    if path.parent.name == "snapshots":
        return path.name
    digest = hashlib.sha256()
    for file in (path / "config.json", *sorted(path.glob("*.safetensors"))):
        if file.is_file():
            size = file.stat().st_size
            with file.open("rb") as handle:
                digest.update(f"{file.name} {size} ".encode() + handle.read(_FINGERPRINTED))
                handle.seek(max(0, size - _FINGERPRINTED))
                digest.update(handle.read())
    return digest.hexdigest()
