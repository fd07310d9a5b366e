"""A tiny target and a SlimSpec drafter that it often agrees with, trained from nothing in well under a minute.

The language: a few dozen words, each a fixed run of tokens, following each other by a skewed random chain. Inside a
word the next token is certain, so drafts are accepted; between words it is not, so some are rejected.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    get_linear_schedule_with_warmup,
)

from vllm_slimspec.engine.head_states import Document
from vllm_slimspec.train.launch import fit
from vllm_slimspec.train.states import write_states

VOCAB = 512
DRAFT_VOCAB = 300  # no multiple of vLLM's padding
RANK = 16
_LAYER_IDS = [1, 2, 3]
_CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}


@dataclass(frozen=True)
class Pair:
    """Two checkpoint folders in float32, and prompts (token ids, all of different lengths) from the same language."""

    target: Path
    drafter: Path
    prompts: list[list[int]]


def make_pair(
    folder: str | Path,
    family: Literal["llama", "qwen3"] = "llama",
    draft_vocab: Literal["full", "truncated"] = "full",
    seed: int = 0,
) -> Pair:
    """Train both models into ``folder``; at K = 3 the acceptance length is 2 to 3.3, by family and vocabulary."""
    folder = Path(folder)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    words = [rng.choices(range(1, VOCAB), k=rng.randint(3, 7)) for _ in range(80)]
    target = _train_target(folder / "target", family, words, rng)
    documents = [Document(i, _text(words, rng, 128), 0) for i in range(64)]
    write_states(target, documents, folder / "states", layer_ids=_LAYER_IDS, dtype="float32")
    fit(
        target,
        folder / "states",
        folder / "drafter",
        rank=RANK,
        draft_arch=family,
        target_layer_ids=_LAYER_IDS,
        draft_vocab_size=None if draft_vocab == "full" else DRAFT_VOCAB,
        epochs=6,
        lr=4e-3,
        scheduler_warmup_steps=5,
        total_seq_len=512,
        hidden_states_dtype="float32",
        seed=seed,
    )
    return Pair(target, folder / "drafter", [_text(words, rng, 5 + 3 * i) for i in range(12)])


def _text(words: list[list[int]], rng: random.Random, length: int) -> list[int]:
    """A walk over the words: mostly on to one successor, sometimes to another."""
    tokens: list[int] = []
    word = rng.randrange(len(words))
    while len(tokens) < length:
        tokens += words[word]
        word = (word * 7 + rng.choices((1, 2, 3), (6, 3, 1))[0]) % len(words)
    return tokens[:length]


def _train_target(path: Path, family: str, words: list[list[int]], rng: random.Random) -> Path:
    config = _CONFIGS[family](
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's CPU attention takes
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    steps = 200
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.95), weight_decay=0)
    schedule = get_linear_schedule_with_warmup(optimizer, 10, steps)
    for _ in range(steps):
        ids = torch.tensor([_text(words, rng, 64) for _ in range(16)])
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, **{f"t{i}": i for i in range(1, VOCAB)}}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)
    return path
