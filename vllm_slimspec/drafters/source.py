"""Reading of every public form of an EAGLE-3 drafter as a config in this package's format, a body, and a dense head.

    EAGLE, SafeAILab       midlayer.*, its own lm_head.weight, d2t and t2d
    SpecForge              as EAGLE, but with d2t and t2d also for a full vocabulary
    speculators            layers.0.*, layer keys in transformer_layer_config, lm_head.weight (the target's rows)
    no head                any of these bodies; the head is the target's
    TorchSpec, SlimSpec    lm_head.down.weight and lm_head.up.weight, already low-rank; the factors are kept

Letters: D hidden size of the drafter, V its vocabulary.
"""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vllm_slimspec.common.files import TensorInfo, check_tokenizer, load_tensor
from vllm_slimspec.drafters.body import in_body
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.drafters.config import known_family
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.checks import check_finite
from vllm_slimspec.head.spec import DOWN, HEAD_KEYS, SCALE, UP, head_sizes
from vllm_slimspec.head.vocabulary import target_ids
from vllm_slimspec.target import Target, fetch

logger = logging.getLogger(__name__)

_CHUNK = 8192
_MAX_RESIDUAL = 0.1  # the largest relative residual of a least-squares map, on centered rows that it was not fitted to
_NOT_OURS = (
    "transformer_layer_config",
    "speculators_config",
    "speculators_model_type",
    "speculators_version",
    "auto_map",
)


@dataclass(frozen=True)
class Drafter:
    """A drafter with a dense head, which was read from any of the forms."""

    path: Path
    config: dict[str, Any]  # in this package's format, without the keys of the head
    body: dict[str, TensorInfo]  # the tensors that conversion does not change
    head: torch.Tensor  # [V, D]
    factors: tuple[torch.Tensor, torch.Tensor] | None  # down [R, D] and up [V, R] of a head that is already low-rank
    d2t: torch.Tensor | None  # int64 [V], target id - draft id; None if the ids are equal
    target_rows: bool  # whether a comparison showed that the head is the target's rows

    @classmethod
    def open(cls, drafter: str | os.PathLike[str], target: Target | None = None) -> "Drafter":
        """Read a drafter from a folder or the Hugging Face hub (safetensors only).

        Its target, which is checked and whose head is compared, is required if the drafter has no head.

        Raises:
            CheckpointError: the drafter cannot be used, or it was made for another target.
        """
        path = fetch(drafter, ["*.json", "*.safetensors"])
        if path != Path(drafter) and not any(path.glob("*.safetensors")):
            raise CheckpointError(
                f"{drafter}: has no safetensors on the Hugging Face hub; pickled weights can run code and are not "
                f"opened: convert them where you trust them, and give the folder: hf download {drafter} "
                '--local-dir drafter && cd drafter && python -c "import torch, safetensors.torch as s; '
                "s.save_file(torch.load('pytorch_model.bin', weights_only=True), 'model.safetensors')\""
            )
        checkpoint = DraftCheckpoint.open(path)
        where = str(checkpoint.path)
        config = normalized(checkpoint)
        known_family(config, f"{where}/config.json")
        sizes = head_sizes(config, f"{where}/config.json")
        if target is not None:
            _check_target(checkpoint, config, target)
        # SpecForge stores a d2t for a full vocabulary too, which is ignored.
        d2t = checkpoint.load("d2t").long() if sizes.truncated else None
        ids = None if d2t is None else target_ids(d2t)
        factors = None if checkpoint.spec is None else (checkpoint.load(DOWN), checkpoint.load(UP))
        if SCALE in checkpoint.tensors:
            raise CheckpointError(f"{where}: its factors are quantized; convert the drafter that they were made from")
        if checkpoint.spec is not None and checkpoint.spec.frequent:
            raise CheckpointError(f"{where}: its head is tiered; convert the drafter that it was made from")
        if factors is not None:
            head = (factors[1].float() @ factors[0].float()).to(factors[0].dtype)
        elif (stored := checkpoint.dense_head) is not None:
            head = stored.read(checkpoint.load)
        elif target is None:
            raise CheckpointError(f"{where}: has no lm_head.weight, so its head is the target's; give --target")
        else:
            head = target.head() if ids is None else target.head()[ids]
        if head.shape[1] != sizes.hidden_size:
            raise CheckpointError(
                f"{where}: the head is {list(head.shape)}, must be [V, {sizes.hidden_size}] as hidden_size says; give "
                "the target that this drafter was made for"
            )
        config["draft_vocab_size"] = len(head)
        check_finite("lm_head", head, where)
        checkpoint.check_values()
        body = {name: info for name, info in checkpoint.tensors.items() if in_body(name)}
        same = target is not None and factors is None and _is_target_rows(head, target, ids)
        return cls(checkpoint.path, config, body, head, factors, d2t, same)

    @classmethod
    def in_target(cls, target: Target) -> "Drafter":
        """Return the MTP drafter of a target. Its body is left out, because an add-on replaces nothing but the head."""
        head = target.head()
        check_finite("lm_head", head, str(target.name))
        vocab, hidden = head.shape
        config = {"hidden_size": hidden, "vocab_size": target.vocab_size, "draft_vocab_size": vocab}
        return cls(target.path, config, {}, head, None, None, target_rows=True)

    @property
    def ids(self) -> torch.Tensor | None:
        """Return the target id of each draft id, int64 [V]; None if the ids are equal."""
        return None if self.d2t is None else target_ids(self.d2t)

    @property
    def body_bytes(self) -> int:
        """Return the bytes that a draft step reads besides the head."""
        return sum(info.nbytes for name, info in self.body.items() if not name.startswith("embed_tokens"))

    def body_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the names and tensors of the body, which conversion does not change."""
        return ((name, load_tensor(info, name)) for name, info in self.body.items())

    def full_vocabulary(self, target: Target) -> tuple["Drafter", float]:
        """Return this drafter with a row for every token of the target, and the residual of the map that made the rows.

        If the head is the target's rows, the missing rows are copied from the target. Otherwise a least-squares map M
        with head ~ target[ids] M, both centered, computes the missing rows. Existing rows stay as they are. The
        residual is relative, on rows that the map was not fitted to (0 without a map).

        Raises:
            CheckpointError: the residual is too large for the map to be useful.
        """
        if self.ids is None:
            return self, 0.0
        source, residual = target.head(), 0.0
        if self.target_rows:
            head = source.to(self.head.dtype)
        else:
            head, residual = _mapped(self.head, source, self.ids)
            logger.warning("--vocab full: rows made by a least-squares map, residual %.3f", residual)
            if residual > _MAX_RESIDUAL:
                raise CheckpointError(
                    f"{self.path}: no linear map takes the target's head to this one (residual {residual:.2f}, "
                    f"allowed is {_MAX_RESIDUAL}); keep the vocabulary with --vocab keep"
                )
        config = self.config | {"draft_vocab_size": len(head)}
        return replace(self, config=config, head=head, factors=None, d2t=None), residual

    def truncated(self, keep: torch.Tensor) -> "Drafter":
        """Return this drafter with only the draft ids ``keep``, int64 [N], ascending."""
        if len(keep) == len(self.head):
            return self
        ids = keep if self.ids is None else self.ids[keep]
        config = self.config | {"draft_vocab_size": len(keep)}
        return replace(self, config=config, head=self.head[keep], factors=None, d2t=ids - torch.arange(len(keep)))


def normalized(checkpoint: DraftCheckpoint) -> dict[str, Any]:
    """Return a drafter's config.json as this package writes it, without the keys of the head."""
    config = checkpoint.flat
    eagle, ids = config.get("eagle_config"), "eagle_aux_hidden_state_layer_ids"
    nested = (eagle.get(ids) or eagle.get("layer_ids")) if isinstance(eagle, dict) else None
    if nested and not config.get(ids):
        config[ids] = nested  # vLLM reads the ids in eagle_config too, but trainers read them only here
    return {k: v for k, v in config.items() if k not in (*_NOT_OURS, *HEAD_KEYS)} | {"tie_word_embeddings": False}


def _check_target(checkpoint: DraftCheckpoint, config: dict[str, Any], target: Target) -> None:
    where, layers = checkpoint.path, target.config.get("num_hidden_layers")
    checkpoint.check_sizes(target.hidden_size, layers if isinstance(layers, int) else None, target.name)
    if config["vocab_size"] != target.vocab_size:
        raise CheckpointError(
            f"{where}: vocab_size={config['vocab_size']} but {target.name} has {target.vocab_size}; "
            "give the target that this drafter was made for"
        )
    check_tokenizer(where)
    tokenizers = [_vocabulary(folder / "tokenizer.json") for folder in (where, target.path)]
    if all(tokenizers) and tokenizers[0] != tokenizers[1]:
        raise CheckpointError(
            f"{where}: its tokenizer is not that of {target.name}; give the target that this drafter was made for"
        )


def _vocabulary(tokenizer: Path) -> dict[str, int] | None:
    if not tokenizer.is_file():
        return None
    try:
        return json.loads(tokenizer.read_bytes())["model"].get("vocab")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{tokenizer}: describes no tokenizer ({error!r}); copy the file again") from None


def _is_target_rows(head: torch.Tensor, target: Target, ids: torch.Tensor | None) -> bool:
    if head.shape[1] != target.hidden_size:
        return False
    try:
        rows = target.head()
        if not target.head_is_plain:
            return False
    except CheckpointError as error:  # The drafter's own rows can be used without a comparison.
        logger.warning(
            "the head is treated as the drafter's own, because the target's head cannot be compared: %s", error
        )
        return False
    ids = torch.arange(len(rows)) if ids is None else ids
    pieces = zip(head.split(_CHUNK), ids.split(_CHUNK), strict=True)
    return len(head) == len(ids) and all(torch.equal(h, rows[i].to(h.dtype)) for h, i in pieces)


def _mapped(head: torch.Tensor, source: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Map the target's head [vocab, D'] to the space of ``head`` [V, D] by least squares.

    Return the mapped rows [vocab, D], with those of the target ids ``ids`` as they are in ``head``, and the residual.
    """
    fitted = torch.arange(len(ids)) % 10 != 0  # The residual is measured on the other tenth of the rows.
    wide = source.shape[1]
    # The rows are centered, because they share a large mean, and a map to that mean alone would have a small residual.
    mean_x, mean_y = _mean(source, ids[fitted]), _mean(head, fitted.nonzero()[:, 0])
    gram = torch.zeros(wide, wide, dtype=torch.float64)
    cross = torch.zeros(wide, head.shape[1], dtype=torch.float64)
    for rows in fitted.nonzero()[:, 0].split(_CHUNK):
        x = source[ids[rows]].double() - mean_x
        gram += x.T @ x
        cross += x.T @ (head[rows].double() - mean_y)
    gram.diagonal().add_(1e-9 * gram.diagonal().mean())
    linear = torch.linalg.solve(gram, cross)
    judged = (~fitted).nonzero()[:, 0]
    truth = head[judged].double() - mean_y
    residual = float(((source[ids[judged]].double() - mean_x) @ linear - truth).norm() / truth.norm())
    mapped = torch.cat([((r.double() - mean_x) @ linear + mean_y).to(head.dtype) for r in source.split(_CHUNK)])
    mapped[ids] = head
    return mapped, residual


def _mean(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean of some rows of a matrix, float64 [width]."""
    parts = [matrix[piece].sum(0, dtype=torch.float64) for piece in rows.split(_CHUNK)]
    return torch.stack(parts).sum(0) / len(rows)
