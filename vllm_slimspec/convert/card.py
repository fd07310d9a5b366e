"""Write the model card of a converted drafter from its config.json and its slimspec.json."""

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_slimspec.convert.options import Options

_CARD = """\
---
library_name: vllm
{base_model}tags:
- speculative-decoding
- eagle3
- vllm
- slimspec
---
# {output}

{what}

## Serve it

```bash
{serve}
```

## What the conversion costs

{measured}

## How it was made

```
{command}
```

{versions}. Everything else is in `slimspec.json`.
"""

_LOW_RANK = """\
An EAGLE-3 drafter with a low-rank LM head (SlimSpec, [arXiv 2605.10453](https://arxiv.org/abs/2605.10453)), converted
from `{source[drafter]}` by [vllm-slimspec]({url}): rank {config[lm_head_rank]} of {config[hidden_size]}, \
{config[draft_vocab_size]} tokens{extras}."""
_ADD_ON = """\
A low-rank draft head (SlimSpec, [arXiv 2605.10453](https://arxiv.org/abs/2605.10453)) for the MTP drafter in the
checkpoint of `{source[target]}`, converted by [vllm-slimspec]({url}): rank {config[lm_head_rank]} of \
{config[hidden_size]}, {config[draft_vocab_size]} tokens{extras}. It holds no other part of the drafter."""
_DENSE = """\
An EAGLE-3 drafter with a dense LM head for {config[draft_vocab_size]} of {config[vocab_size]} tokens, made from \
`{source[drafter]}` by
[vllm-slimspec]({url}). vLLM serves it as it is."""
_URL = "https://pypi.org/project/vllm-slimspec/"


def card(config: Mapping[str, Any], provenance: Mapping[str, Any], options: Options, k: int) -> str:
    """Return the text of README.md for a converted drafter, which is served with ``k`` draft tokens in each cycle.

    ``config`` is its config.json in the layout of this package, and ``provenance`` its slimspec.json.
    """
    low_rank, extras = "lm_head_rank" in config, ""
    if "lm_head_frequent" in config:
        extras += f", the {config['lm_head_frequent']} most frequent of them with exact rows"
    if "lm_head_rerank" in config:
        rows = "the target's rows" if config.get("lm_head_rerank_rows") == "target" else "rows of its own"
        extras += f", the best {config['lm_head_rerank']} scored again by {rows}"
    if "lm_head_quantization" in config:
        extras += f", `up` as {config['lm_head_quantization']}"
    output, target = Path(os.path.realpath(options.output)).name, options.target
    if options.layout == "speculators":  # The config names the target, so that vLLM needs the drafter only.
        serve = f"vllm serve {output}"
    else:
        method = {} if low_rank else {"method": "eagle3"}
        if "slimspec_add_on" in config:
            method = {"method": "mtp"}
        speculative = json.dumps({**method, "model": output, "num_speculative_tokens": k})
        serve = f"vllm serve {target or 'TARGET'} \\\n  --speculative-config '{speculative}'"
    what = _ADD_ON if "slimspec_add_on" in config else _LOW_RANK if low_rank else _DENSE
    return _CARD.format(
        base_model=f"base_model: {target}\n" if target and _on_the_hub(target) else "",
        output=output,
        what=what.format(source=provenance["source"], config=config, extras=extras, url=_URL),
        serve=f"pip install vllm-slimspec\n{serve}" if low_rank else serve,
        measured=_measured(provenance["measured"], low_rank),
        command=shlex.join(provenance["command"]),
        versions=", ".join(f"{name} {number}" for name, number in provenance["versions"].items()),
    )


def _on_the_hub(name: str) -> bool:
    """Return whether the name is an id of the hub, which refuses a card whose base_model is a folder."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".") and not Path(name).exists()


def _measured(measured: Mapping[str, Any] | None, low_rank: bool) -> str:
    if measured is None:
        made = " The factors are a plain SVD." if low_rank else ""
        return f"Nothing was measured, because no hidden states were given.{made}"
    quality, before = measured["quality"], measured["dense_tau"]
    rows = [("same best token as the dense head", f"{quality['top1']:.1%}")]
    rows += [(f"... among the best {k}", f"{share:.1%}") for k, share in quality["recall"].items() if k > 1]
    rows.append(("overlap alpha", f"{quality['overlap']:.3f}"))
    if quality["kl"] is not None:
        rows.append(("KL, nats", f"{quality['kl']:.4f}"))
    if quality["tau"] and before:
        for name, tau in (("dense head", before), ("this head", quality["tau"])):
            interval = f"{tau['low']:.2f} to {tau['high']:.2f}"
            rows.append((f"acceptance length, {name}", f"{tau['value']:.2f} (95%: {interval})"))
        of = quality["of_dense"]
        rows.append(("... kept", f"{of['value']:.1%} (95%: {of['low']:.1%} to {of['high']:.1%})"))
    rows.append(("bytes of the head a draft step reads", f"{measured['head_bytes']:,} of {measured['dense_bytes']:,}"))
    if measured["speedup"]:
        rows.append(("predicted speedup at batch 1 (by bytes)", f"{measured['speedup']:.2f}x"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    where = f"On {measured['states']:,} held-out head states of {measured['documents']} documents, at temperature 0."
    return f"{where}\n\n| | |\n|---|---|\n{table}"
