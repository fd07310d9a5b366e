"""Kernels compiled for real GPUs on a machine without one: registers, spills and shared memory of default tilings.

Run as a program it prints the table: ``python tests/test_kernels_compile.py``.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

BATCHES = (1, 32, 64)
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = {"cuda": 99 * 1024, "hip": 64 * 1024}  # sm_86, 89 and 120, the smallest of their kind; LDS of a CU
VOCAB, HIDDEN = 128256, 4096
DENSE = ("bfloat16", "float16", "float32")
# (op, form of `up`, rank, batch, k): a rank that fills its blocks and one that fills nothing, every batch bucket, every
# quantized form
CASES = [
    *[("argmax", "bfloat16", 512, batch, 0) for batch in BATCHES],
    *[("argmax", form, 512, 64, 0) for form in ("fp8", "int8", "int8-g64", "int4", "int4-g32")],
    *[("argmax", "int4", 512, 1, 0), ("argmax", "float16", 360, 1, 0), ("argmax", "float32", 123, 64, 0)],
    *[("logits", "bfloat16", 512, 64, 0), ("topk", "fp8", 512, 32, 64)],
    *[("rerank", form, 512, 1, 16) for form in ("bfloat16", "int8", "int4-g32")],
    ("rerank", "float32", 123, 64, 33),
]


def launches(op, form, rank, batch, k):
    """Record what the launcher of ``op`` launches -> [(kernel, its arguments by name, its options)]; nothing runs."""
    import triton

    from vllm_slimspec.head.quantized import QuantizedUp
    from vllm_slimspec.kernels import low_rank_argmax, low_rank_logits, low_rank_topk, reduce_pairs

    recorded = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.record

        def record(self, *args, **kwargs):
            options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
            recorded.append((self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs, options))

    empty = partial(torch.empty, device="meta")
    dense = form in DENSE
    model = getattr(torch, form) if dense else torch.bfloat16
    hidden, down, rows = (empty(size, HIDDEN, dtype=model) for size in (batch, rank, VOCAB))
    up = empty(VOCAB, rank, dtype=model)
    if not dense:
        kind, _, group = form.partition("-g")
        stored = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}[kind]
        weight = empty(VOCAB, rank // 2 if kind == "int4" else rank, dtype=stored)
        up = QuantizedUp(weight, empty(VOCAB, rank // int(group) if group else 1), int(group) if group else None)
    with pytest.MonkeyPatch.context() as patch:
        for module in (low_rank_argmax, low_rank_logits, low_rank_topk, reduce_pairs):
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                    patch.setattr(module, name, Recorder(value))
        if op == "argmax":
            low_rank_argmax.low_rank_argmax(hidden, down, up, VOCAB)
        elif op == "logits":
            low_rank_logits.low_rank_logits(hidden, down, up)
        else:
            dense_head = (rows, empty(VOCAB, dtype=torch.int64)) if op == "rerank" else ()
            low_rank_topk.low_rank_topk(hidden, down, up, k, VOCAB, *dense_head)
    return recorded


def compile_kernel(target, kernel, arguments, options):
    """Compile -> dict of registers, spilled (registers or bytes of stack), shared (bytes) and what its PTX copies
    with."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import type_canonicalisation_dict as types

    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    pointers = {name: f"*{types[str(value.dtype).removeprefix('torch.')]}" for name, value in tensors.items()}
    constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr or arguments[p.name] is None}
    signature = {p.name: pointers.get(p.name) or ("constexpr" if p.name in constants else "i32") for p in kernel.params}
    # what the launcher finds: torch's allocations are aligned, and no integer is specialized on
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(kernel, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    usage = {"shared": binary.metadata.shared}
    if "amdgcn" in binary.asm:
        count = {name: int(n) for name, n in re.findall(r"\.([sv]gpr_\w+):\s*(\d+)", binary.asm["amdgcn"])}
        # a scalar register is spilled into a lane of a vector one, which costs no memory: look for what does
        scratch = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", binary.asm["amdgcn"])[1])
        return usage | {"registers": count["vgpr_count"], "spilled": count["vgpr_spill_count"] + scratch}
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        report = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    count = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    found = sorted(set(re.findall(r"\bcp\.async(?=\.c)|\bwgmma(?=\.mma)|\bld\.global\S*", binary.asm["ptx"])))
    return usage | {"registers": count["REG"], "spilled": count["STACK"] + count["LOCAL"], "ptx": found}


def compile_case(target, case):
    """Compile every kernel that the case launches -> the usage of each by name."""
    return {kernel.__name__.strip("_"): compile_kernel(target, kernel, *rest) for kernel, *rest in launches(*case)}


def variants():
    """Return the runtime integers that Triton would specialize on: each would be a variant compiled while serving."""
    kernels = {kernel for case in CASES for kernel, *_ in launches(*case)}
    return [
        f"{kernel.__name__}: {p.name}"
        for kernel in kernels
        for p in kernel.params
        if not (p.is_constexpr or p.do_not_specialize or p.name.endswith("_ptr"))
    ]


def name(target, case):
    return "-".join([target, *map(str, case)])


@pytest.fixture(scope="module")
def compiled():
    """The report of a separate process, because Triton interprets kernels in this one."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    halves = [list(TARGETS)[0::2], list(TARGETS)[1::2]]  # two at a time: most of the seconds are ptxas
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, "--json", *half],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for half in halves
    ]
    reports = []
    for run in runs:
        output, errors = run.communicate()
        assert run.returncode == 0, errors
        reports.append(json.loads(output))
    return {"usage": reports[0]["usage"] | reports[1]["usage"], "variants": reports[0]["variants"]}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("target", TARGETS)
def test_kernel_compiles_without_spills_and_within_shared_memory(compiled, target, case):
    """Catches: a kernel that does not compile for a GPU that nobody here has, spills registers, or needs too much
    shared memory."""
    for kernel, usage in compiled["usage"][name(target, case)].items():
        assert usage["spilled"] == 0, kernel
        assert usage["shared"] <= SHARED_LIMIT[TARGETS[target][0]], kernel


@pytest.mark.parametrize(
    "case", [case for case in CASES if case[0] == "argmax"], ids=lambda case: "-".join(map(str, case))
)
@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm")])
def test_argmax_kernel_copies_blocks_asynchronously(compiled, target, case):
    """Catches: a pass over `up` that waits for each of its blocks, or that loads z two bytes at a time."""
    found = set(compiled["usage"][name(target, case)]["tile_argmax_kernel"]["ptx"])
    scales = {"ld.global.b32"} if case[1] not in DENSE else set()
    assert found - {"wgmma"} == {"cp.async"} | scales
    assert ("wgmma" in found) == (target == "sm_90" and case[1] != "float32")


def test_no_kernel_is_specialized_on_an_integer(compiled):
    """Catches: a kernel that is compiled again in a live request, because its batch is 1 or a multiple of 16."""
    assert compiled["variants"] == []


def table(usage):
    lines = [f"{'target-op-form-rank-batch-k kernel':<60}{'registers':>10}{'spilled':>9}{'shared':>9}"]
    lines += [
        f"{f'{case} {kernel}':<60}{row['registers']:>10}{row['spilled']:>9}{row['shared']:>9}"
        for case, kernels in usage.items()
        for kernel, row in kernels.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    chosen = [target for target in TARGETS if target in sys.argv] or TARGETS
    report = {
        "usage": {name(target, case): compile_case(target, case) for target in chosen for case in CASES},
        "variants": variants(),
    }
    print(json.dumps(report) if "--json" in sys.argv else table(report["usage"]))
