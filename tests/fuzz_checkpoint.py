"""Hostile drafter folders for ``vllm_slimspec.drafters.checkpoint``: configs, headers, indexes and folders with damage.

    python tests/fuzz_checkpoint.py --cases 10000 --json docs/results/hostile.json
    python tests/fuzz_checkpoint.py --seconds 600

Every case is a sound folder with something done to it, drawn from its number alone. It is opened as a server would open
it, under watch, and it may be accepted or refused with a CheckpointError of one line. Everything else is a finding: any
other exception, a crash, a file opened outside the folder (by Python: an audit hook; by anything else: inotify), a file
written, code run, more memory than ALLOWANCE or twice the folder, more than WATCHDOG seconds. The run stops at the
first one, leaves the folder in --work, prints the number and exits with 1; ``--first NUMBER --cases 1`` replays it.
"""

import argparse
import collections
import contextlib
import copy
import ctypes
import faulthandler
import functools
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import drafters
import torch
from safetensors.torch import save

from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.measure.results import Results, provenance

WATCHDOG = 60  # seconds for one case
ALLOWANCE = 32 << 20  # bytes a case may take however small its folder is
LONGEST_MESSAGE = 2000  # characters

Files = dict[str, bytes]

SCALARS: list[Any] = [
    *(None, True, False, 0, -1, -8, 1, 2, 7, 33, 2**31, 2**32 + 1, 2**63, 2**64, 10**18, 10**300, -(10**300)),
    *(0.5, 8.0, 32.0, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "8", "target", "int8", "eagle3", "\ud800", "\x1b[2J\nerror: no", "\0", "A" * 100_000, "../../etc/passwd"),
    *({"rope_type": "yarn"}, {"full_attention": {}}, {"type": [], "rope_theta": "1"}, {"rope_theta": -1.0}),
    *([], {}, [[]], [None], {"a": {}}, [1] * 1000, ["SlimSpecLlamaForCausalLMEagle3", {}], {"use_aux_hidden_state": 1}),
]
NAMES: list[Any] = [
    *("../outside/model.safetensors", "/proc/self/mem", "..", ".", "", "sub/../../outside/model.safetensors"),
    *("model.safetensors\0", "\ud800.safetensors", "n" * 300 + ".safetensors", "a\nb.safetensors", "config.json"),
    *(None, 7, [], {}, ["model.safetensors"], "no-such.safetensors", "folder.safetensors", "~/model.safetensors"),
]
DTYPES = [
    "BOOL",
    "U8",
    "I8",
    "F8_E4M3",
    "F8_E5M2",
    "F16",
    "BF16",
    "F32",
    "F64",
    "I64",
    "C64",
    "F4",
    "F999",
    "",
    None,
    3,
]
KEYS = [
    *("lm_head_rank", "lm_head_rank_divisor", "draft_vocab_size", "vocab_size", "hidden_size", "architectures"),
    *("lm_head_rerank", "lm_head_rerank_rows", "lm_head_quantization", "lm_head_quantization_group", "eagle_config"),
    "lm_head_frequent",
    *("num_aux_hidden_states", "num_aux_layers", "eagle_aux_hidden_state_layer_ids", "target_hidden_size"),
    *("logit_scale", "num_hidden_layers", "transformer_layer_config", "speculators_config", "model_type"),
    *("speculators_model_type", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    *("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"),
    *("fc_norm", "norm_before_fc", "hidden_act", "quantization_config", "ptd_token_id", "parallel_drafting"),
]
TENSORS = [
    *("lm_head.bias", "lm_head.weight_packed", "model.lm_head.weight", "verifier_lm_head.weight", "mask_hidden", "t2d"),
    *("lm_head.frequent.weight", "lm_head.frequent.ids", "lm_head.tail.row", "lm_head.tail.bias"),
    *("midlayer.self_attn.qkv_proj.weight", "midlayer.self_attn.q_proj.bias", "layers.0.mlp.down_proj.weight"),
    *("layers.999999999.hidden_norm.weight", "layers.00.hidden_norm.weight", "embed_tokens.weight", "fc_norm.7.weight"),
    *("midlayer.mlp.up_proj.weight_scale", "rotary_emb.inv_freq", "d2t", "midlayer.", "layers..", "."),
]


def bases() -> dict[str, Files]:
    """Return sound folders, one of each kind, as bytes by file name."""
    tensors, v, r, d = drafters.tensors(), drafters.V, drafters.R, drafters.D

    def folder(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Files:
        return {"config.json": json.dumps(config).encode(), "model.safetensors": save(tensors, {"format": "pt"})}

    int8 = tensors | {"lm_head.up.weight": torch.zeros(v, r, dtype=torch.int8), "lm_head.up.scale": torch.ones(v, 1)}
    layer = drafters.config(architectures=None)
    nested = {"speculators_model_type": "eagle3", "speculators_config": {}, "transformer_layer_config": layer}
    names = list(tensors)
    truncated, mask = drafters.tensors(32), torch.zeros(v, dtype=torch.bool)
    mask[truncated["d2t"] + torch.arange(32)] = True
    parts = {f"model-{i}.safetensors": {n: tensors[n] for n in names[i::2]} for i in range(2)}
    return {
        "full": folder(drafters.config(), tensors),
        "truncated": folder(drafters.config(draft_vocab_size=32), truncated | {"t2d": mask}),
        "torchspec": folder(drafters.config(lm_head_rank=None, lm_head_rank_divisor=8), tensors),
        "speculators": folder(nested, tensors),
        "int8": folder(drafters.config(lm_head_quantization="int8"), int8),
        "rerank": folder(drafters.config(lm_head_rerank=16), tensors | {"lm_head.weight": torch.zeros(v, d)}),
        "tiered": folder(drafters.config(lm_head_frequent=16), drafters.tiered(tensors, 16)),
        "dense": folder(
            drafters.config(architectures=["LlamaForCausalLMEagle3"], lm_head_rank=None), drafters.dense(tensors)
        ),
        "sharded": {
            "config.json": json.dumps(drafters.config()).encode(),
            "slimspec.json": json.dumps({"versions": {"vllm-slimspec": "0.1.0"}}).encode(),
            "model.safetensors.index.json": json.dumps(
                {"weight_map": {n: f for f in parts for n in parts[f]}}
            ).encode(),
            **{name: save(part) for name, part in parts.items()},
        },
    }


def mutate_values(rng: random.Random, files: Files, folder: Path) -> None:
    """Change, remove or move some keys of config.json."""
    config = json.loads(files["config.json"])
    for _ in range(rng.choice((1, 1, 2, 4))):
        target = config.get("transformer_layer_config") if rng.random() < 0.3 else config
        target = target if isinstance(target, dict) else config
        key = rng.choice([*KEYS, *target])
        if rng.random() < 0.15:
            target.pop(key, None)
        else:
            target[key] = scalar(rng)
    files["config.json"] = json.dumps(config).encode()


def mutate_text(rng: random.Random, files: Files, folder: Path) -> None:
    """Make the JSON text of config.json or the index damaged, ambiguous, deep or of another encoding."""
    name = rng.choice([n for n in files if n.endswith(".json")])
    text = files[name]
    depth = rng.choice((10, 1_000, 100_000))
    files[name] = rng.choice(
        (
            lambda: flip(rng, text, len(text), rng.randint(1, 16)),
            lambda: text[: rng.randrange(len(text))],
            lambda: splice(rng, text, rng.randbytes(rng.randint(1, 64))),
            lambda: splice(rng, text, text),
            lambda: text.decode().encode(rng.choice(("utf-16", "utf-32", "utf-8-sig"))),
            lambda: b"[" * depth + b"]" * depth,
            lambda: b'{"a":' * depth + b"1" + b"}" * depth,
            lambda: text[:-1] + b', "lm_head_rank": ' + b"9" * rng.choice((20, 4_000, 100_000)) + b"}",
            lambda: text[:-1] + b', "hidden_size": -1, "hidden_size": 64}',
            lambda: json.dumps(scalar(rng)).encode(),
            lambda: text[:-1] + b', "weight_map": {' + b",".join(b'"%d":[]' % i for i in range(depth)) + b"}}",
        )
    )()


def mutate_header(rng: random.Random, files: Files, folder: Path) -> None:
    """Make a safetensors header of well-formed JSON with wrong dtypes, shapes, offsets, names or duplicates."""
    name = rng.choice([n for n in files if n.endswith(".safetensors")])
    header, body = split(files[name])
    entries = json.loads(header)
    for _ in range(rng.choice((1, 1, 2, 4))):
        tensor = rng.choice([key for key in entries if key != "__metadata__"])
        entry = entries[tensor]
        if not isinstance(entry, dict):
            break
        kind = rng.choice(("dtype", "shape", "offsets", "rename", "drop", "duplicate", "scalar", "metadata"))
        huge = rng.choice((0, -1, 2**31, 2**32, 2**63, 2**64, 10**30, 1.5, "1", None, [1]))
        if kind == "dtype":
            entry["dtype"] = rng.choice(DTYPES)
        elif kind == "shape":
            entry["shape"] = rng.choice(
                ([], [huge], [huge, huge], [2**32, 2**32], [1] * 1000, entry.get("shape", [])[::-1])
            )
        elif kind == "offsets":
            begin, end = rng.randrange(-8, len(body) + 8), rng.randrange(-8, len(body) + 8)
            entry["data_offsets"] = rng.choice(([begin, end], [end, begin], [0, huge], [huge, 0], [begin], []))
        elif kind == "rename":
            entries[str(rng.choice([*NAMES, *TENSORS]))] = entries.pop(tensor)
        elif kind == "drop" and len(entries) > 2:
            del entries[tensor]
        elif kind == "duplicate":
            entries[tensor + "."] = entry
        elif kind == "scalar":
            entries[tensor] = scalar(rng)
        else:
            entries["__metadata__"] = scalar(rng)
    text = json.dumps(entries).encode()
    if rng.random() < 0.1:
        text = text.replace(b".'", b"'").replace(b'."', b'"')  # the duplicates above become one name, twice
    files[name] = struct.pack("<Q", len(text)) + text + body


def mutate_binary(rng: random.Random, files: Files, folder: Path) -> None:
    """Flip bits of a safetensors file, cut it, or state false lengths."""
    name = rng.choice([n for n in files if n.endswith(".safetensors")])
    data = files[name]
    size = 8 + len(split(data)[0])
    lengths = (0, 1, size - 9, size - 7, len(data), len(data) * 2, 2**31, 2**63, 2**64 - 1, rng.getrandbits(64))
    files[name] = rng.choice(
        (
            lambda: flip(rng, data, size, rng.randint(1, 16)),
            lambda: flip(rng, data, len(data), rng.randint(1, 64)),
            lambda: data[: rng.choice((0, 7, 8, size, rng.randrange(len(data))))],
            lambda: data + rng.randbytes(rng.randint(1, 64)),
            lambda: struct.pack("<Q", rng.choice(lengths)) + data[8:],
            lambda: splice(rng, data, rng.randbytes(rng.randint(1, 64))),
            lambda: data[:8] + b"[" * (size - 8) + data[size:],
            lambda: header_of_zeros(rng.choice((100, 10_000, 60_000))),
            lambda: data[:size] + rng.randbytes(len(data) - size),
            lambda: data[:size] + b"\xff" * (len(data) - size),
        )
    )()


def mutate_index(rng: random.Random, files: Files, folder: Path) -> None:
    """Write an index whose names leave the folder, or cannot be file names."""
    files.setdefault("model.safetensors.index.json", json.dumps({"weight_map": {"a": "model.safetensors"}}).encode())
    index = json.loads(files["model.safetensors.index.json"])
    for tensor in rng.sample(list(index["weight_map"]), k=rng.randint(1, len(index["weight_map"]))):
        index["weight_map"][tensor] = rng.choice(NAMES)
    files["model.safetensors.index.json"] = json.dumps(index).encode()


def mutate_folder(rng: random.Random, files: Files, folder: Path) -> None:
    """Put links that leave the folder, devices, pipes, folders or pickles in the place of files."""
    name = rng.choice([*files, "extra.safetensors", "model.safetensors.index.json", os.fsdecode(b"\xff.safetensors")])
    files.pop(name, None)
    outside = folder.parent / "outside"
    place = folder / name
    kind = rng.choice(("outside", "device", "loop", "dangling", "pipe", "folder", "parent", "pickle"))
    if kind == "outside":
        suffix = ".json" if name == "config.json" else ".safetensors"
        place.symlink_to(outside / (name if name.endswith("index.json") else f"model{suffix}"))
    elif kind == "device":
        place.symlink_to(rng.choice(("/dev/zero", "/dev/stdin", "/proc/self/environ")))
    elif kind == "loop":
        place.symlink_to(place)
    elif kind == "dangling":
        place.symlink_to(outside / "nothing")
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "parent":
        place.symlink_to("..")
    else:
        for weights in [n for n in files if n.endswith(".safetensors")]:
            del files[weights]
        (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % os.fsencode(outside / "ran"))


# In the order in which two of them can follow each other: what parses files before what damages them.
MUTATIONS: dict[Callable[[random.Random, Files, Path], None], int] = {
    mutate_values: 4,
    mutate_header: 4,
    mutate_index: 1,
    mutate_text: 2,
    mutate_binary: 3,
    mutate_folder: 1,
}


def scalar(rng: random.Random) -> Any:
    """Return another value to put into a config; a copy, because a later mutation may write into it."""
    return copy.deepcopy(rng.choice(SCALARS))


def split(data: bytes) -> tuple[bytes, bytes]:
    """Split a safetensors file into its header and body."""
    size = struct.unpack("<Q", data[:8])[0]
    return data[8 : 8 + size], data[8 + size :]


def flip(rng: random.Random, data: bytes, end: int, bits: int) -> bytes:
    """Flip some bits before ``end``."""
    out = bytearray(data)
    for _ in range(bits):
        out[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(out)


def splice(rng: random.Random, data: bytes, piece: bytes) -> bytes:
    """Overwrite or replace a stretch of bytes by a random piece."""
    begin, end = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:begin] + piece + data[end:]


@functools.cache
def header_of_zeros(count: int) -> bytes:
    """Return a header of very many tensors without bytes, which is far larger than what it describes."""
    text = json.dumps({str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}).encode()
    return struct.pack("<Q", len(text)) + text


def write(case: int, sound: dict[str, Files], folder: Path) -> str:
    """Make the folder of a case; returns what was done to which base."""
    rng = random.Random(case)
    base = rng.choice(list(sound))
    files = dict(sound[base])
    chosen = set(rng.choices(list(MUTATIONS), list(MUTATIONS.values()), k=rng.choice((1, 1, 1, 2))))
    mutations = [mutation for mutation in MUTATIONS if mutation in chosen]
    folder.mkdir()
    for mutation in mutations:
        mutation(rng, files, folder)
    for name, data in files.items():
        if not os.path.lexists(folder / name):
            (folder / name).write_bytes(data)
    return f"{base}: {' + '.join(m.__name__.removeprefix('mutate_') for m in mutations)}"


class Watch:
    """Records the side effects of a case, by an audit hook and, in a folder that nothing may touch, by inotify."""

    LOUD = (
        *("exec", "compile", "import", "pickle", "marshal", "code.", "ctypes", "subprocess", "socket", "shutil"),
        *("os.system", "os.exec", "os.fork", "os.spawn", "os.posix_spawn", "os.kill", "os.putenv", "os.chdir"),
        *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"),
    )

    def __init__(self, folder: Path, outside: Path) -> None:
        self.folder = os.path.realpath(folder)
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self._hook)
        libc = ctypes.CDLL(None, use_errno=True)
        self.inotify = libc.inotify_init1(os.O_NONBLOCK)
        everything = 0xFFF & ~0x10  # all but the end of reading, which follows an opening
        if libc.inotify_add_watch(self.inotify, os.fsencode(outside), everything) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch")

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(path, int):
                return
            path = os.path.realpath(os.fsdecode(path))
            if not path.startswith(self.folder + os.sep):
                self.seen.append(f"opened {path}")
            elif flags and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self.seen.append(f"opened {path} for writing")
        elif event.startswith(self.LOUD):
            self.seen.append(f"{event} {args!r:.200}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self.seen.clear()
        self.on = True
        try:
            yield
        finally:
            self.on = False
        with contextlib.suppress(BlockingIOError):
            self.seen.append(f"touched the folder outside ({len(os.read(self.inotify, 65536))} bytes of events)")


def attempt(folder: Path, watch: Watch) -> tuple[str, str]:
    """Open a folder as a server would -> ("accepted" | "refused" | "finding", what was said)."""
    size = sum(f.lstat().st_size for f in folder.iterdir())
    before = peak_memory(reset=True)
    outcome, words = "accepted", ""
    broken: BaseException | None = None
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    with watch.watching():
        try:
            checkpoint = DraftCheckpoint.open(folder)
            checkpoint.check_values()
            checkpoint.provenance()
            checkpoint.check_sizes(drafters.D, 4, "the target")
            assert checkpoint.head_bytes >= 0
            assert checkpoint.dense_bytes >= 0
        except CheckpointError as error:
            outcome, words = "refused", str(error)
        except BaseException as error:  # a Rust panic is no Exception
            broken = error
    faulthandler.cancel_dump_traceback_later()
    grown = peak_memory() - before
    if outcome == "refused" and (not words.isprintable() or len(words) > LONGEST_MESSAGE + len(str(folder))):
        outcome, words = "finding", f"not one readable line: {words[:3000]!r}"
    if broken is not None:
        outcome, words = "finding", "".join(traceback.format_exception(broken))
    elif watch.seen:
        outcome, words = "finding", "; ".join(watch.seen)
    elif grown > max(ALLOWANCE, 2 * size):
        outcome, words = "finding", f"{grown >> 20} MiB of memory for a folder of {size >> 20} MiB"
    return outcome, words


def peak_memory(reset: bool = False) -> int:
    """Return the most bytes of memory that this process held since the last reset, or those it holds right after
    one."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


class Hostile(Results):
    """The results of one run."""

    kind: str = "hostile"
    seconds: float
    cases: int
    findings: int
    rows: list[dict[str, Any]]  # by what was done: accepted, refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=None, help="stop after so many")
    parser.add_argument("--seconds", type=float, default=None, help="stop after so long")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--json", type=Path, help="write the counts here")
    parser.add_argument("--work", type=Path, help="where a case's folder is made, and left if it is a finding")
    arguments = parser.parse_args()
    if arguments.cases is None and arguments.seconds is None:
        parser.error("give --cases, --seconds or both")
    work = arguments.work or Path(tempfile.mkdtemp(prefix="slimspec-fuzz-"))
    start = time.monotonic()
    counts = run(work, arguments.first, arguments.cases, arguments.seconds)
    shutil.rmtree(work)
    total = counts.total()
    print(f"{total} mutated folders, no finding: " + ", ".join(f"{n} {o}" for o, n in outcomes(counts).items()))
    if arguments.json:
        rows = [
            {"mutation": m, **{o: counts[m, o] for o in ("accepted", "refused")}}
            for m in sorted({m for m, _ in counts})
        ]
        Hostile(
            **provenance(), device="cpu", seconds=time.monotonic() - start, cases=total, findings=0, rows=rows
        ).write(arguments.json)


def outcomes(counts: collections.Counter[tuple[str, str]]) -> dict[str, int]:
    """Return counts by outcome alone."""
    return {o: sum(n for (_, other), n in counts.items() if other == o) for o in ("accepted", "refused")}


def run(work: Path, first: int, cases: int | None, seconds: float | None) -> collections.Counter[tuple[str, str]]:
    """Run cases one after another -> counts by (mutations, outcome); exits with 1 at a finding."""
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    folder, outside = work / "case", work / "outside"
    sound = bases()
    outside.mkdir(exist_ok=True)
    for name, data in (sound["full"] | sound["sharded"]).items():
        (outside / name).write_bytes(data)
    for files in sound.values():  # so that every import is done, and to see that they are sound
        folder.mkdir(exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        DraftCheckpoint.open(folder).check_values()
        shutil.rmtree(folder)
    watch = Watch(folder, outside)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    start, case = time.monotonic(), first
    while (cases is None or case < first + cases) and (seconds is None or time.monotonic() < start + seconds):
        done = write(case, sound, folder)
        outcome, words = attempt(folder, watch)
        if outcome == "finding":
            print(f"case {case} ({done}), left in {folder}:\n{words}", file=sys.stderr)
            sys.exit(1)
        counts[done.split(": ")[1], outcome] += 1
        shutil.rmtree(folder)
        case += 1
    return counts


if __name__ == "__main__":
    main()
