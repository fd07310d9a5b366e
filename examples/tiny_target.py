"""A tiny Llama that has read the Python standard library: a real target for trying things out, in two minutes of CPU.

    python examples/tiny_target.py build/tiny/target

Writes an ordinary Hugging Face folder (config, float32 safetensors, tokenizer with a chat template). The corpus is the
standard library of the Python that runs this, so nothing is downloaded; one file in 20 is held out, by a hash of its
name. The model has learned indentation, keywords and idioms, and what it writes looks like Python from afar.
"""

import argparse
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from vllm_slimspec.progress import steps
from vllm_slimspec.work_dtype import work_dtype

EOS = "<|endoftext|>"
VOCAB = 4096
STEPS, BATCH, LENGTH = 850, 8, 128
SEED = 0
logging.disable_progress_bar()  # one bar a stage, ours
_LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "encodings",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
    "site-packages",
    "dist-packages",
}


def corpus(held_out: bool) -> list[str]:
    """The standard library's sources, in the order of their names: one file in 20, or the other 19."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file.relative_to(root) for file in root.rglob("*.py"))
    return [
        (root / file).read_text(encoding="utf-8", errors="replace")
        for file in files
        if not _LEFT_OUT & set(file.parts)
        and (int(hashlib.sha256(file.as_posix().encode()).hexdigest(), 16) % 20 == 0) == held_out
    ]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE; a chat is its messages, one after the other."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, model_max_length=10**9)
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one run of token ids, EOS after each."""
    end = tokenizer.eos_token_id
    return torch.tensor([i for ids in tokenizer(texts)["input_ids"] for i in (*ids, end)])


def windows(ids: torch.Tensor, count: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """``count`` different stretches of ``length`` tokens, in random order; again from the start when all were seen."""
    rng = torch.Generator().manual_seed(seed)
    pieces = ids[: len(ids) // length * length].view(-1, length)
    while count > 0:
        for i in torch.randperm(len(pieces), generator=rng)[:count].tolist():
            yield pieces[i]
        count -= len(pieces)


def train(ids: torch.Tensor) -> LlamaForCausalLM:
    """850 steps of 1024 tokens: Muon for the matrices inside the layers, AdamW for the rest."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if p.ndim == 1 or "layers." not in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    # Constant, then down to zero over the second half.
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, 2 - 2 * step / STEPS)) for o in optimizers]
    mixed = work_dtype("auto", torch.bfloat16).dtype
    batches = windows(ids, STEPS * BATCH, LENGTH, SEED)
    for _ in steps(range(STEPS), "Training the target", STEPS, "step"):
        batch = torch.stack([next(batches) for _ in range(BATCH)])
        with torch.autocast("cpu", mixed, enabled=mixed != torch.float32):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


def build(folder: Path) -> None:
    """Train the tokenizer and the model, and save them."""
    texts = corpus(held_out=False)
    tokenizer = train_tokenizer(texts)
    model = train(encode(tokenizer, texts))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    build(parser.parse_args().folder)
