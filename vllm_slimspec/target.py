"""A target model on disk or on the Hugging Face hub: reading its sizes, and its head for drafters that use it."""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vllm_slimspec.common.files import TensorInfo, load_tensor, read_config, read_header, read_headers
from vllm_slimspec.common.text_sizes import text_config
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.dense import StoredHead, stored_head

_FINGERPRINTED = 1 << 20  # bytes at the beginning and the end of a file that its fingerprint is made from


@dataclass(frozen=True)
class Target:
    """A target's config, from which its sizes are read, and access to its head."""

    name: str
    path: Path
    config: dict[str, Any]  # with the keys of the language model at the top

    @classmethod
    def open(cls, target: str | os.PathLike[str]) -> "Target":
        """Read a target's config.json and return the target.

        Args:
            target: the folder or the Hugging Face id.

        Raises:
            CheckpointError: there is no such folder or repository, or its config has no sizes.
        """
        path = fetch(target, ["*.json"])
        return cls(str(target), path, text_config(read_config(path), path))

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """Return generation_config.json, which names all tokens that end a text; empty if there is no such file."""
        file = self.path / "generation_config.json"
        try:
            config = json.loads(file.read_bytes()) if file.is_file() else {}
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: not valid JSON ({error}); copy the file again") from None
        return config if isinstance(config, dict) else {}

    @property
    def hidden_size(self) -> int:
        """Return the width of the hidden states."""
        return self.config["hidden_size"]

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens in the vocabulary."""
        return self.config["vocab_size"]

    def head(self) -> torch.Tensor:
        """Read and return the target's LM head [vocab, hidden]. Only the file that holds the head is fetched.

        Raises:
            CheckpointError: there is no head of this shape, or it is stored in a form that is not supported.
        """
        stored, tensors = self._head
        return stored.read(lambda name: load_tensor(tensors[name], name))

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
            try:
                files = json.loads(index.read_bytes())["weight_map"]
                needed = {str(files[name]) for name in files if may_be(name)}
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index}: no usable weight_map ({error!r}); copy the file again") from None
            folder = fetch(self.name, ["*.json", *sorted(needed)])
            found = {name: info for file in sorted(needed) for name, info in read_header(folder / file).items()}
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


def fetch(name: str | os.PathLike[str], patterns: list[str]) -> Path:
    """Return the path of a local folder, or download files of a Hugging Face repository and return their folder.

    Args:
        name: the folder or the repository id.
        patterns: the patterns of the files to download.

    Raises:
        CheckpointError: there is no such folder, and the hub has no such repository or cannot be reached.
    """
    path = Path(name)
    if path.exists() or str(name).count("/") != 1:
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:  # The hub's classes, httpx's and OSError all give the reason in their first line.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{name}: no such folder, and not on the Hugging Face hub: {reason}") from None


def fingerprint(name: str | os.PathLike[str]) -> str:
    """Return a text that changes when the model under a name changes, without reading the whole model.

    For a folder it is the SHA-256 of the config and of the size, the beginning and the end of each file. For a model on
    the hub it is the revision.
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
