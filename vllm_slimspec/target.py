"""A target on disk or from the Hugging Face hub: its sizes, and its head where a drafter borrows it."""

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

_EDGE = 1 << 20  # bytes at both ends of a file that tell it from another one


@dataclass(frozen=True)
class Target:
    """What the other parts need of a target: its sizes, and its head where a drafter borrows it."""

    name: str
    path: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, target: str | os.PathLike[str]) -> "Target":
        """Read a target's config.json.

        Raises:
            CheckpointError: no such folder or repository, or no sizes in its config.
        """
        path = fetch(target, ["*.json"])
        return cls(str(target), path, text_config(read_config(path), path))

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, where chat models name all the tokens that end a text; empty without one."""
        file = self.path / "generation_config.json"
        try:
            config = json.loads(file.read_bytes()) if file.is_file() else {}
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: not valid JSON ({error}); copy the file again") from None
        return config if isinstance(config, dict) else {}

    @property
    def hidden_size(self) -> int:
        return self.config["hidden_size"]

    @property
    def vocab_size(self) -> int:
        return self.config["vocab_size"]

    def head(self) -> torch.Tensor:
        """The target's LM head [vocab, hidden], of which only the file that holds it is fetched.

        Raises:
            CheckpointError: there is none of that shape, or it is in a form that is not read.
        """
        stored, tensors = self._head
        return stored.read(lambda name: load_tensor(tensors[name], name))

    @property
    def head_is_plain(self) -> bool:
        """Whether the head is stored as it is computed with; a head in float8 serves no drafter's re-ranking."""
        return self._head[0].scale is None

    @cached_property
    def _head(self) -> tuple[StoredHead, dict[str, TensorInfo]]:
        tensors = self._find()
        described = {name: (info.dtype, info.shape) for name, info in tensors.items()}
        shape = (self.vocab_size, self.hidden_size)
        found = stored_head(described, shape, str(self.path), prefixed=True)
        # A config that leaves tying to the default of its class: the tensors tell.
        if found is None and self.config.get("tie_word_embeddings") is not False:
            embeddings = {n.replace("embed_tokens", "lm_head"): n for n in tensors if n.endswith("embed_tokens.weight")}
            renamed = {name: described[n] for name, n in embeddings.items()}
            tied = stored_head(renamed, shape, str(self.path), prefixed=True)
            found = None if tied is None else StoredHead(embeddings[tied.weight], None)
        if found is None:
            raise CheckpointError(f"{self.path}: holds no lm_head.weight in safetensors; give the target's own folder")
        return found, tensors

    def _find(self) -> dict[str, TensorInfo]:
        """The tensors that may be the head, or tell that there is one."""

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
        """Bytes that one verification of ``k`` drafted tokens reads: every weight but the embeddings, as bfloat16, from
        the config's sizes; of a mixture's experts, as many as k + 1 tokens choose that choose no expert twice."""
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
    """A local folder as it is, or the files of a Hugging Face repository, in its cache.

    Raises:
        CheckpointError: neither.
    """
    path = Path(name)
    if path.exists() or str(name).count("/") != 1:
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:  # its own classes, httpx's, OSError: all say why in their first line
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{name}: no such folder, and not from the Hugging Face hub: {reason}") from None


def fingerprint(name: str | os.PathLike[str]) -> str:
    """What tells a model from another one under its name, without reading all of it.

    Of a folder, its config, and the size, the header and the last weights of each file; from the hub, the revision.
    """
    path = fetch(name, ["config.json"])
    if path.parent.name == "snapshots":
        return path.name
    digest = hashlib.sha256()
    for file in (path / "config.json", *sorted(path.glob("*.safetensors"))):
        if file.is_file():
            size = file.stat().st_size
            with file.open("rb") as handle:
                digest.update(f"{file.name} {size} ".encode() + handle.read(_EDGE))
                handle.seek(max(0, size - _EDGE))
                digest.update(handle.read())
    return digest.hexdigest()
