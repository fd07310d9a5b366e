"""What `--worker-extension-cls poison.Poison` adds to a vLLM worker: a drafter that gets NaN, or that never returns."""

import threading
from typing import Any

import torch


class Poison:
    """Methods mixed into vLLM's worker, called over /collective_rpc, which VLLM_SERVER_DEV_MODE opens."""

    model_runner: Any  # of the worker that this is mixed into

    def hang(self) -> None:
        """Make the drafter never return from its tenth call from now, so that a request stays unfinished."""
        model = self.model_runner.drafter.model
        top, left = model.get_top_tokens, iter(range(9))

        def get_top_tokens(hidden: torch.Tensor) -> torch.Tensor:
            if next(left, None) is None:
                threading.Event().wait()
            return top(hidden)

        model.get_top_tokens = get_top_tokens

    def poison(self) -> None:
        """Make every hidden state that the drafter starts from NaN from now on, and record what it drafts."""
        model = self.model_runner.drafter.model
        combine, top = model.combine_hidden_states, model.get_top_tokens
        self.drafted: list[torch.Tensor] = []
        self.nan_rows = 0

        def combine_hidden_states(hidden: torch.Tensor) -> torch.Tensor:
            return torch.full_like(combine(hidden), torch.nan)

        def get_top_tokens(hidden: torch.Tensor) -> torch.Tensor:
            self.nan_rows += int(hidden.isnan().any(dim=-1).sum())
            ids = top(hidden)
            self.drafted.append(ids.clone())
            return ids

        model.combine_hidden_states, model.get_top_tokens = combine_hidden_states, get_top_tokens

    def cure(self) -> dict[str, int]:
        """Stop making NaN -> the number of rows that had one, and the lowest and highest id drafted meanwhile."""
        model = self.model_runner.drafter.model
        del model.combine_hidden_states, model.get_top_tokens  # back to those of the class
        ids = torch.cat(self.drafted)
        return {"nan_rows": self.nan_rows, "lowest": int(ids.min()), "highest": int(ids.max())}
