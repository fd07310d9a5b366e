"""``slimspec doctor``: find what would go wrong when a drafter is served."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from vllm_slimspec.common.console import json_object

EXAMPLE = "Example: slimspec doctor --target meta-llama/Llama-3.1-8B-Instruct --drafter ./my-drafter"


def doctor(
    target: Annotated[
        str | None,
        typer.Option(
            "--target", "--verifier", help="Target model to check the drafter against: a folder or a Hugging Face id."
        ),
    ] = None,
    drafter: Annotated[str | None, typer.Option(help="Drafter to check: a folder or a Hugging Face id.")] = None,
    speculative_config: Annotated[
        str, typer.Option(help="JSON object that you will give to `vllm serve` as its --speculative-config.")
    ] = "{}",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list instead of a table.")] = False,
) -> None:
    """Check this installation, a drafter, and a drafter with its target for problems before you serve them."""
    from vllm_slimspec.doctor import examine, table

    options = json_object(speculative_config, "--speculative-config")
    drafter = drafter or options.get("model")
    if target is not None and drafter is None:
        raise typer.BadParameter("give --drafter, or --speculative-config as a JSON object with a model in it")
    findings = list(examine(drafter, target, options))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        Console().print(table(findings))
    problems = sum(finding.level == "problem" for finding in findings)
    typer.echo(f"{problems} {'problem' if problems == 1 else 'problems'}", err=True)
    if problems:
        raise typer.Exit(1)
