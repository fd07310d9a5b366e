"""All of the package's metadata. pyproject.toml holds the build system and the tools' settings only."""

import os
import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "vllm_slimspec/__init__.py").read_text(), re.M).group(1)
# Address of the repository, which `make release URL=...` sets. A package index shows README.md alone, so that its links
# have to name the repository there. Without an address they stay as they are.
URL = os.environ.get("SLIMSPEC_URL", "").rstrip("/")


def long_description():
    """Return README.md with every link to a file of the repository made absolute, at the tag of this version."""
    text = (HERE / "README.md").read_text()
    if not URL:
        return text
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\1{URL}/raw/v{VERSION}/", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)", rf"\1{URL}/blob/v{VERSION}/", text)


setup(
    name="vllm-slimspec",
    version=VERSION,
    description="Low-rank draft heads for speculative decoding in vLLM: serve, convert, train, measure",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    project_urls={"Source": URL, "Changelog": f"{URL}/blob/v{VERSION}/CHANGELOG.md"} if URL else {},
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    keywords="vllm speculative-decoding eagle3 slimspec triton",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    # By hand, never find_packages(): it would ship kernels/ as a top-level package, where the Hugging Face package
    # of that name lives. The folder becomes vllm_slimspec.kernels instead, and has no __init__.py on purpose.
    packages=[
        "vllm_slimspec",
        "vllm_slimspec.commands",
        "vllm_slimspec.common",
        "vllm_slimspec.convert",
        "vllm_slimspec.drafters",
        "vllm_slimspec.engine",
        "vllm_slimspec.head",
        "vllm_slimspec.kernels",
        "vllm_slimspec.measure",
        "vllm_slimspec.train",
    ],
    package_dir={"vllm_slimspec": "vllm_slimspec", "vllm_slimspec.kernels": "kernels"},
    package_data={
        "vllm_slimspec": ["py.typed"],
        "vllm_slimspec.measure": ["*.jinja"],
        "vllm_slimspec.train": ["openings.jsonl"],
        "vllm_slimspec.kernels": ["tuned/*.json"],
    },
    # vLLM, torch and transformers are the user's: naming them here could replace a CPU, ROCm or nightly build.
    install_requires=[
        "packaging>=22",
        "pydantic>=2.12",
        "rich>=13",
        "safetensors>=0.6.2",
        "typer>=0.19",
    ],
    extras_require={
        "cuda": ["vllm>=0.26,<0.34"],
        "train": ["matplotlib>=3.8", "speculators==0.9.*", "tensorboard>=2.16"],
        "bench": ["httpx>=0.27", "jinja2>=3.1", "matplotlib>=3.8", "openai>=2.25", "pandas>=2"],
    },
    entry_points={
        "vllm.general_plugins": ["slimspec = vllm_slimspec:register"],
        "console_scripts": ["slimspec = vllm_slimspec.cli:main"],
    },
)
