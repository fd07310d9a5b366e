"""Call the operations on plain tensors: factorize a head, choose the best token of each row, and re-rank candidates.

    python examples/ops.py

Expected output, in seconds on a CPU: the shapes of the factors, how many best tokens the factors and the dense head
share, and that number again after the 16 best candidates were scored again by the dense rows.
"""

import torch

from vllm_slimspec import ops

B, D, R, V = 64, 256, 32, 8192  # rows, hidden size, rank, vocabulary


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(B, D)
    # A head that is nearly of low rank, as trained heads are.
    head = torch.randn(V, R) @ torch.randn(R, D) / D**0.5 + 0.1 * torch.randn(V, D)
    dense = (hidden @ head.T).argmax(dim=1)

    left, singular, right = torch.linalg.svd(head, full_matrices=False)
    up, down = (left[:, :R] * singular[:R]).contiguous(), right[:R].contiguous()
    print(f"dense head {list(head.shape)}, factors {list(down.shape)} and {list(up.shape)}")

    _, ids = ops.low_rank_argmax(hidden, down, up)
    print(f"the factors alone choose the dense head's token in {int((ids == dense).sum())} of {B} rows")

    _, ids = ops.low_rank_rerank(hidden, down, up, head, 16)
    print(f"with 16 candidates scored again they do in {int((ids[:, 0] == dense).sum())} of {B} rows")


if __name__ == "__main__":
    main()
