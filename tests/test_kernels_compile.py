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

BATCHES = (1, 32, 64)
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = {"cuda": 163 * 1024, "hip": 64 * 1024}  # sm_80, the smallest of its kind; a compute unit's LDS
# (kernel, form of `up`, rank, batch; for select, k in place of the batch): a rank that fills its blocks and one that
# fills nothing, every batch bucket, every quantised form
CASES = [
    *[("argmax", "bfloat16", 512, batch) for batch in BATCHES],
    *[("argmax", form, 512, 64) for form in ("fp8", "int8", "int4", "int4-g32")],
    *[("argmax", "float16", 360, 1), ("argmax", "float32", 123, 64)],
    *[("logits", "bfloat16", 512, 64), ("maxima", "int8", 512, 64)],
    *[("select", "int4-g32", 512, 16), ("select", "fp8", 512, 32), ("rerank", "bfloat16", 512, 32)],
    *[("rerank", form, 512, 64) for form in ("bfloat16", "int8", "int4-g32")],
    ("reduce_pairs", "float32", 0, 0),
]


def launch(kernel, form, rank, batch):
    """-> the kernel's function, its pointers' types, its constants and its options, as its launcher has them."""
    from vllm_slimspec.kernels import low_rank_argmax, low_rank_logits, low_rank_topk, reduce_pairs
    from vllm_slimspec.kernels._tiles import default_tiling

    pairs = {"values_ptr": "*fp32", "ids_ptr": "*i64"}
    if kernel == "reduce_pairs":
        pointers = {**pairs, "best_values_ptr": "*fp32", "best_ids_ptr": "*i64"}
        return reduce_pairs._reduce_pairs_kernel, pointers, {"BLOCK_N": reduce_pairs.BLOCK_N}, {"num_warps": 4}
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    dense = form in short
    kind, _, group = form.partition("-g")
    model = short[form] if dense else "bf16"
    stored = {"fp8": "i8", "int8": "i8", "int4": "u8"}
    pointers = {"z_ptr": f"*{model}", "up_ptr": f"*{model if dense else stored[kind]}"}
    constants = {"R": rank, "KIND": "dense" if dense else kind, "GROUP": int(group or 0), "UPCAST": False}
    if dense:
        constants["scale_ptr"] = None
    else:
        pointers["scale_ptr"] = "*fp32"
    if kernel in ("select", "rerank"):
        blocks = low_rank_topk.select_blocks(batch, form)
        options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
        constants |= {**blocks, "K": batch, "MEMBERS": low_rank_topk.MEMBERS, "D": 0}
        pointers |= {**pairs, "maxima_ptr": "*i32"}
        rows = {"hidden_ptr": f"*{model}", "dense_ptr": f"*{model}", "dense_rows_ptr": "*i64"}
        if kernel == "rerank":
            pointers |= rows
            constants["D"] = 4096
        else:
            constants |= dict.fromkeys(rows)
        return low_rank_topk._select_kernel, pointers, constants, options
    tiling = default_tiling(batch, rank, form)
    constants |= {"BLOCK_V": tiling.block_v, "BLOCK_B": tiling.block_b, "BLOCK_R": tiling.block_r}
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    if kernel == "argmax":
        return low_rank_argmax._tile_argmax_kernel, pointers | pairs, constants, options
    if kernel == "maxima":
        constants["MEMBERS"] = low_rank_topk.MEMBERS
        return low_rank_topk._group_maxima_kernel, {**pointers, "maxima_ptr": "*i32"}, constants, options
    return low_rank_logits._logits_kernel, {**pointers, "logits_ptr": f"*{model}"}, constants, options


def compile_case(target, case):
    """-> dict of registers, spilled (registers or bytes of stack) and shared (bytes)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, pointers, constants, options = launch(*case)
    signature = {
        p.name: pointers.get(p.name) or ("constexpr" if p.name in constants else "i32") for p in function.params
    }
    # what the launcher finds: torch's allocations are aligned, and no integer is specialised on
    aligned = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(function, signature, constants, aligned)
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
    return usage | {"registers": count["REG"], "spilled": count["STACK"] + count["LOCAL"]}


def variants():
    """Runtime integers that Triton would specialise on: each would be a variant compiled while serving."""
    kernels = {launch(*case)[0] for case in CASES}
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
    lines = [f"{'target-kernel-form-rank-batch':<36}{'registers':>10}{'spilled':>9}{'shared':>9}"]
    lines += [f"{key:<36}{row['registers']:>10}{row['spilled']:>9}{row['shared']:>9}" for key, row in usage.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    chosen = [target for target in TARGETS if target in sys.argv] or TARGETS
    report = {
        "usage": {name(target, case): compile_case(target, case) for target in chosen for case in CASES},
        "variants": variants(),
    }
    print(json.dumps(report) if "--json" in sys.argv else table(report["usage"]))
