"""``slimspec inspect``: describe a drafter."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_slimspec.errors import CheckpointError

EXAMPLE = "Example: slimspec inspect ./my-drafter --json"


def inspect(
    drafter: Annotated[Path, typer.Argument(help="Folder of the drafter, with its config.json and safetensors files.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Describe a drafter: its format, the size of its head, and what would stop vLLM from serving it."""
    from vllm_slimspec.drafters.add_on import open_drafter

    found: dict[str, Any] = {"path": str(drafter), "servable": False, "problems": []}
    try:
        checkpoint = open_drafter(drafter)
        found |= _describe(checkpoint)
        checkpoint.check_values()
        found["servable"] = checkpoint.spec is not None
    except CheckpointError as error:
        found["problems"].append(str(error))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found)
    if found["problems"]:
        raise typer.Exit(1)


def _describe(checkpoint: Any) -> dict[str, Any]:
    from vllm_slimspec.drafters.add_on import AddOn

    spec = checkpoint.spec
    if spec is None:
        return {"format": checkpoint.format, "head": "dense", "head_bytes": checkpoint.head_bytes}
    if isinstance(checkpoint, AddOn):
        kind = {"format": "head add-on", "method": checkpoint.method, "base_model": checkpoint.base_model}
    else:
        kind = {"format": checkpoint.format, "family": checkpoint.family.name}
    return kind | {
        "head": "low-rank",
        "hidden_size": spec.hidden_size,
        "rank": spec.rank,
        "exact_tokens": spec.frequent or None,
        "draft_vocab_size": spec.draft_vocab_size,
        "vocab_size": spec.vocab_size,
        "head_bytes": checkpoint.head_bytes,
        "dense_bytes": checkpoint.dense_bytes,
        "quantization": spec.quantization,
        "rerank": spec.rerank,
    }


def _print(report: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in report.items():
        if key.endswith("_bytes"):
            value = f"{value / 1e6:.2f} MB"
        if key != "problems" and value is not None:
            table.add_row(key.replace("_", " "), str(value))
    if report.get("dense_bytes"):
        table.add_row("saves", f"{report['dense_bytes'] / report['head_bytes']:.2f}x")
    Console().print(table)
    if report.get("head") == "dense":
        typer.echo("A dense EAGLE-3 drafter: vLLM serves it without this package.")
    for problem in report["problems"]:
        typer.echo(f"error: {problem}", err=True)
