"""Every kernel, compiled for real GPUs without one: registers, spills and shared memory of the default tilings.

Run as a program it prints the table: ``python tests/test_kernels_compile.py``.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = {"cuda": 163 * 1024, "hip": 64 * 1024}  # sm_80, the smallest of its kind; a compute unit's LDS
# (kernel, dtype, rank, batch): a rank that fills its blocks and one that fills nothing, every batch bucket
CASES = [
    *[("argmax", "bf16", rank, batch) for rank in (512, 123) for batch in (1, 32, 64)],
    *[("logits", "bf16", 512, batch) for batch in (1, 32, 64)],
    *[("argmax", "fp16", 360, 1), ("argmax", "fp32", 123, 64), ("logits", "fp32", 512, 64)],
    ("reduce_pairs", "fp32", 0, 0),
]


def compile_case(target, kernel, dtype, rank, batch):
    """-> dict of registers, spilled (registers or bytes of stack) and shared (bytes)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vllm_slimspec.kernels import low_rank_argmax, low_rank_logits, reduce_pairs
    from vllm_slimspec.kernels._tiles import default_tiling

    factors = {"z_ptr": f"*{dtype}", "up_ptr": f"*{dtype}"}
    if kernel == "reduce_pairs":
        function, constants, options = (
            reduce_pairs._reduce_pairs_kernel,
            {"BLOCK_N": reduce_pairs.BLOCK_N},
            {"num_warps": 4},
        )
        pointers = {"values_ptr": "*fp32", "ids_ptr": "*i64", "best_values_ptr": "*fp32", "best_ids_ptr": "*i64"}
    else:
        tiling = default_tiling(batch, rank, 4 if dtype == "fp32" else 2)
        blocks = {"BLOCK_V": tiling.block_v, "BLOCK_B": tiling.block_b, "BLOCK_R": tiling.block_r}
        constants = {"R": rank, **blocks, "UPCAST": False}
        options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
        if kernel == "argmax":
            function = low_rank_argmax._tile_argmax_kernel
            pointers = {**factors, "values_ptr": "*fp32", "ids_ptr": "*i64"}
        else:
            function = low_rank_logits._logits_kernel
            pointers = {**factors, "logits_ptr": f"*{dtype}"}
    signature = {p.name: pointers.get(p.name) or ("constexpr" if p.is_constexpr else "i32") for p in function.params}
    # what the launcher finds: torch's allocations are aligned, and no integer is specialised on
    aligned = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(function, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    usage = {"shared": binary.metadata.shared}
    if "amdgcn" in binary.asm:
        count = {name: int(n) for name, n in re.findall(r"\.([sv]gpr_\w+):\s*(\d+)", binary.asm["amdgcn"])}
        return usage | {
            "registers": count["vgpr_count"],
            "spilled": count["vgpr_spill_count"] + count["sgpr_spill_count"],
        }
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        report = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    count = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return usage | {"registers": count["REG"], "spilled": count["STACK"] + count["LOCAL"]}


def variants():
    """Runtime integers that Triton would specialise on: each would be a variant compiled while serving."""
    from vllm_slimspec.kernels import low_rank_argmax, low_rank_logits, reduce_pairs

    kernels = (low_rank_argmax._tile_argmax_kernel, low_rank_logits._logits_kernel, reduce_pairs._reduce_pairs_kernel)
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
    """The report of a process of its own: in this one, Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    run = subprocess.run([sys.executable, __file__, "--json"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_table(compiled, capsys):
    """Not a check: puts the table into the log of every run."""
    with capsys.disabled():
        print("\n" + table(compiled["usage"]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("target", TARGETS)
def test_fits_the_target(compiled, target, case):
    """A kernel that does not compile for a GPU nobody here has, spills, or needs more shared memory than there is."""
    usage = compiled["usage"][name(target, case)]
    assert usage["spilled"] == 0
    assert usage["shared"] <= SHARED_LIMIT[TARGETS[target][0]]


def test_nothing_is_compiled_for_a_batch_size(compiled):
    """A batch of 1 or of a multiple of 16 that becomes a variant of its own, compiled in a live request."""
    assert compiled["variants"] == []


def table(usage):
    lines = [f"{'target-kernel-dtype-rank-batch':<32}{'registers':>10}{'spilled':>9}{'shared':>9}"]
    lines += [f"{key:<32}{row['registers']:>10}{row['spilled']:>9}{row['shared']:>9}" for key, row in usage.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    report = {
        "usage": {name(target, case): compile_case(target, *case) for target in TARGETS for case in CASES},
        "variants": variants(),
    }
    print(json.dumps(report) if "--json" in sys.argv else table(report["usage"]))
