"""``slimspec report``: whatever was measured becomes one page that needs nothing else and says what it lacks."""

import re
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_slimspec import cli
from vllm_slimspec.common.speedup import least_ratio, speedup
from vllm_slimspec.measure.report import write_report
from vllm_slimspec.measure.report.material import Material, Source, read
from vllm_slimspec.measure.report.sections import acceptance_ratios, chapter
from vllm_slimspec.measure.results import (
    AcceptanceResults,
    AcceptanceRow,
    CycleResults,
    CycleRow,
    HeadResults,
    HeadRow,
    ServeResults,
    ServeRow,
    StatesResults,
    StatesRow,
)

ROOT = Path(__file__).parent.parent
SHAPE, HIDDEN, VOCAB = "llama-3.2-1b", 2048, 128256
COMMON = {"command": "slimspec bench x", "time": datetime(2026, 1, 2, tzinfo=UTC), "versions": {"vllm": "0"}}


def heads(device="one CPU"):
    rows = [
        HeadRow(
            head=head,
            shape=SHAPE,
            batch=batch,
            dtype="bfloat16",
            p20_us=us,
            p50_us=us * batch,
            p80_us=us,
            bytes=1,
            percent_of_copy_bandwidth=1,
        )
        for head, us in (("full", 30e3), ("trim-32k", 8e3), ("low-rank", 4e3))
        for batch in (1, 8)
    ]
    return HeadResults(**COMMON, device=device, threads=2, repeats=3, copy_gb_s=1, read_gb_s=1, rows=rows)


def cycles(device="one CPU", **changed):
    """300 ms with the full head, of which K = 3 heads are 90 ms; the others as ``changed`` says, or as eq. 4 does."""
    nu = {"full": 1.0, "trim-32k": 3.0, "low-rank": 9.0}
    ms = {"null": 210.0} | {head: 210 + 90 / n for head, n in nu.items()} | changed
    rows = [
        CycleRow(
            head=head,
            shape=SHAPE,
            rank=256 if head == "low-rank" else None,
            num_speculative_tokens=3,
            batch=1,
            context=64,
            dtype="bfloat16",
            cycles=9,
            cycle_ms_p20=time,
            cycle_ms_p50=time,
            cycle_ms_p80=time,
            head_ms=time - 210,
            head_alone_us_p50=1,
            accepted=0,
            kappa=0.3,
            nu=nu.get(head),
            ratio=time / 300,
            ratio_low=time / 310,
            ratio_high=time / 290,
            predicted_ratio=0.7 + 0.3 / nu[head] if head in nu else None,
            verify_ms=150,
            body_ms=60,
            wrapped_head_ms=time - 210,
        )
        for head, time in ms.items()
    ]
    return CycleResults(**COMMON, device=device, threads=2, rounds=5, rows=rows)


def acceptances(device="one CPU", hidden_size=HIDDEN, **accepted):
    """Ten cycles for each of four prompts; ``accepted``: drafts of each prompt, by head."""
    rows = [
        AcceptanceRow(
            head=head.replace("_", "-"),
            prompt_set="held-out",
            temperature=0,
            num_speculative_tokens=3,
            rank=None,
            draft_vocab_size=VOCAB,
            rerank=None,
            head_bytes=1,
            dense_bytes=1,
            length=1 + sum(drafts) / 40,
            low=1,
            high=4,
            per_position=[0.5, 0.3, 0.1],
            cycles=[10] * 4,
            accepted=drafts,
            tokens=99,
            equal=4,
            near_ties=0,
            largest_gap=0,
        )
        for head, drafts in accepted.items()
    ]
    return AcceptanceResults(
        **COMMON,
        device=device,
        target="the-target",
        hidden_size=hidden_size,
        vocab_size=VOCAB,
        dtype="float32",
        max_tokens=32,
        rows=rows,
    )


def serving():
    rows = [
        ServeRow(
            head=head,
            concurrency=n,
            completed=8,
            failed=0,
            output_tokens=99,
            duration_s=1,
            tokens_per_s=speed * n,
            ttft_ms_p50=1,
            ttft_ms_p80=2,
            itl_ms_p50=3,
            itl_ms_p80=4,
            tpot_ms_p50=1e3 / speed,
            tpot_ms_p80=6,
            length=None if head == "none" else 2.0,
        )
        for head, speed in (("none", 10), ("low-rank", 17))
        for n in (1, 4)
    ]
    return ServeResults(
        **COMMON,
        device="one CPU",
        target="the-target",
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        prompt_set="held-out",
        num_speculative_tokens=3,
        max_tokens=32,
        rows=rows,
    )


def states():
    row = {"rank": None, "draft_vocab_size": VOCAB, "rerank": None, "dense_bytes": 9, "alpha": [0.5, 0.4]}
    row |= {"per_position": [0.6, 0.4], "cycles": [1, 1], "accepted": [1, 1], "num_speculative_tokens": 2}
    heads = {"full": (9_000_000, 2.0, None), "low-rank": (1_000_000, 1.9, 0.9)}
    return StatesResults(
        **COMMON,
        device="one CPU",
        target="t",
        hidden_size=128,
        vocab_size=VOCAB,
        max_tokens=9,
        rows=[
            StatesRow(
                head=head,
                prompt_set=prompt_set,
                head_bytes=size,
                length=length,
                low=length - 0.1,
                high=length + 0.1,
                accepted_of_full=share,
                accepted_of_full_low=share,
                accepted_of_full_high=share,
                **row,
            )
            for prompt_set in ("one", "all sets")
            for head, (size, length, share) in heads.items()
        ],
    )


class Page(HTMLParser):
    """What a page asks for, and what it says to those who do not see."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input", "path", "use", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of every kind of file, and of one that has no figure."""
    folder = tmp_path_factory.mktemp("report")
    made = {
        "head": heads(),
        "cycle": cycles(),
        "acceptance": acceptances(full=[20] * 4, low_rank=[18] * 4),
        "serve": serving(),
    }
    for name, results in made.items():
        results.write(folder / f"{name}.json")
    files = [folder / f"{name}.json" for name in made]
    left_out = write_report([*files, ROOT / "docs/results/convert-8b.json"], folder / "report")
    assert [file.path.name for file in left_out] == ["convert-8b.json"]
    return folder / "report"


def test_the_page_needs_nothing_else(written):
    """Catches: an address to load from, a script, a picture or style outside the page, two elements of one id."""
    text = (written / "index.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not re.search(r"(https?:)?//|@import|url\((?!#)", text)
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("img")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = {attrs[key] for _, attrs in page.tags for key in ("href", "xlink:href") if key in attrs}
    used |= {f"#{name}" for name in re.findall(r"url\(#([^)]+)\)", text)}
    assert used <= {f"#{name}" for name in ids}


def test_the_page_is_for_everyone(written):
    """Catches: pictures without words, colors of one scheme, a page that a phone shows as a desk's."""
    text = (written / "index.html").read_text()
    page = Page(text)
    pictures = page.all("svg")
    assert len(pictures) == len(page.all("details")) == 6
    for attrs in pictures:
        assert attrs["role"] == "img"
        assert len(attrs["aria-label"] or "") > 40
    assert page.all("html")[0]["lang"] == "en"
    metas = {attrs.get("name"): attrs.get("content") for attrs in page.all("meta")}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert metas["color-scheme"] == "light dark"
    light, dark = re.findall(r":root \{([^}]*)\}", text)
    assert "@media (prefers-color-scheme: dark)" in text
    names = [set(re.findall(r"--([\w-]+):", colors)) for colors in (light, dark)]
    assert names[0] == names[1]
    assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= names[0]
    drawn = text[text.index("<main") :]
    assert not re.search(r":\s*#[0-9a-f]{3,8}\b", drawn), "a color that no scheme changes"


def test_markdown_has_its_pictures(written):
    """Catches: a picture that is not there, or one that is and nobody shows."""
    text = (written / "report.md").read_text()
    shown = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", text)
    assert {name for _, name in shown} == {file.name for file in written.glob("*.png")}
    assert all(len(words) > 40 for words, _ in shown)
    assert "convert-8b.json" in text


def test_what_the_project_measured_can_be_reported():
    """Catches: a result in docs/results over which `slimspec report docs/results/*.json` stumbles."""
    groups, left_out = read(sorted((ROOT / "docs/results").glob("*.json")), mixed_devices=True)
    assert {"head", "cycle", "acceptance"} <= {s.results.kind for g in groups for s in g.sources}
    assert "demo" in {file.kind for file in left_out}


def test_devices_are_not_mixed_by_accident(tmp_path):
    """Catches: a GPU's head beside a CPU's cycle in one figure, without a word."""
    heads().write(tmp_path / "one.json")
    cycles(device="another GPU").write(tmp_path / "two.json")
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    with pytest.raises(ValueError, match=r"one\.json is of 'one CPU' and .*two\.json of 'another GPU'"):
        write_report(files, tmp_path / "report")
    assert not (tmp_path / "report").exists()
    write_report(files, tmp_path / "report", mixed_devices=True)
    page = (tmp_path / "report/index.html").read_text()
    assert (
        page.index("one CPU") < page.index("Head time") < page.index("another GPU") < page.index("A cycle taken apart")
    )


def _section(results, title):
    material = Material("one CPU")
    for kind, found in results.items():
        getattr(material, kind).append(Source(Path(f"{kind}.json"), found))
    return next(section for section in chapter(material, "").sections if section.title.startswith(title))


def test_overhead_outside_the_head_is_named():
    """Catches: a head that is slow in the engine and fast alone, and a report that keeps it to itself."""
    fine = _section({"cycle": cycles()}, "Measured against predicted")
    assert "no overhead to speak of" in fine.words[-1]
    slow = _section({"cycle": cycles(**{"trim-32k": 270.0})}, "Measured against predicted")
    assert "trim-32k at batch 1: 1.11x, predicted 1.25x" in slow.words[-1]
    assert "verhead outside the head" in slow.words[-1]
    assert "low-rank" not in slow.words[-1]


def test_eq_4():
    """Catches: another formula; the head of the full one's speed and acceptance gains nothing, one that costs nothing
    removes kappa, and at the least ratio nothing is left of a gain."""
    assert speedup(1, 0.25, 1) == 1
    assert speedup(1, 0.25, float("inf")) == pytest.approx(4 / 3)
    assert speedup(0.97, 0.25, 4.5) == pytest.approx(0.97 / (0.75 + 0.25 / 4.5))
    assert speedup(least_ratio(0.3, 7), 0.3, 7) == pytest.approx(1)


def test_acceptance_is_not_borrowed_from_another_model():
    """Catches: rho of a tiny pair on the plane of a large one."""
    ours = acceptances(full=[20] * 4, low_rank=[18] * 4)
    material = Material("one CPU", acceptance=[Source(Path("a.json"), ours)])
    ratios, target = acceptance_ratios(material, SHAPE, 3)
    assert target == "the-target"
    assert ratios == {"low-rank": (pytest.approx(2.8 / 3), pytest.approx(2.8 / 3), pytest.approx(2.8 / 3))}
    assert acceptance_ratios(material, SHAPE, 5)[0] == {}
    tiny = acceptances(hidden_size=128, full=[20] * 4, low_rank=[18] * 4)
    assert acceptance_ratios(Material("", acceptance=[Source(Path("a.json"), tiny)]), SHAPE, 3)[0] == {}
    hollow = _section({"cycle": cycles(), "acceptance": tiny}, "Faster head")
    assert "No acceptance was measured" in hollow.words[1]
    filled = _section({"cycle": cycles(), "acceptance": ours}, "Faster head")
    assert ["low-rank", "9.00x", "0.933 (0.933-0.933)", "0.733", "1.27x"] in filled.table.rows


def test_the_verdict_counts_acceptance():
    """Catches: a head put first for its speed, whose drafts are refused."""
    ours = acceptances(full=[20] * 4, low_rank=[18] * 4, **{"trim-32k": [2] * 4})
    material = Material("one CPU", cycle=[Source(Path("c.json"), cycles())], acceptance=[Source(Path("a.json"), ours)])
    (verdict,) = chapter(material, "").verdicts
    assert verdict.table.rows == [
        ["low-rank", "1.27x", "0.933", "1.36x", "1.36x", "9.0x", "220.0"],
        ["full", "", "", "1.00x", "1.00x", "1.0x", "300.0"],
        ["trim-32k", "0.50x", "0.400", "1.25x", "1.25x", "3.0x", "240.0"],
    ]
    assert "the-target" in verdict.words
    material.acceptance.clear()
    (verdict,) = chapter(material, "").verdicts
    assert "at equal acceptance: none was measured" in verdict.words
    assert len(verdict.table.columns) == len(verdict.table.rows[0]) == 5


def test_imitated_acceptance_is_named():
    """Catches: tokens per second of acceptance that another model had, without a word; or columns of nothing."""
    own = _section({"cycle": cycles()}, "A cycle taken apart")
    assert "tokens/s" not in own.table.columns
    imitated = cycles()
    imitated.acceptance = "some-model"
    for row in imitated.rows[1:]:
        row.accepted, row.tokens_per_s = 1.5, 7.4
    found = _section({"cycle": imitated}, "A cycle taken apart")
    assert found.table.columns[-2:] == ["tokens a cycle", "tokens/s"]
    assert [cells[-2:] for cells in found.table.rows] == [["1.00", ""], *[["2.50", "7"]] * 3]
    assert "as was measured with some-model" in found.words[-1]
    served = serving()
    served.acceptance = "some-model"
    assert "as was measured with some-model" in _section({"serve": served}, "Served").words[-1]


def test_the_same_prompts_for_both_heads():
    """Catches: an interval of rho as wide as those of two separate sets of prompts, which cancel here."""
    both = acceptances(full=[0, 10, 20, 30], low_rank=[0, 10, 20, 30])
    material = Material("one CPU", acceptance=[Source(Path("a.json"), both)])
    assert acceptance_ratios(material, SHAPE, 3)[0]["low-rank"] == (1, 1, 1)


def test_every_kind_alone(tmp_path):
    """Catches: a page that needs two kinds of file; and missing figures of which nobody says what makes them."""
    for kind, results in {"head": heads(), "cycle": cycles(), "serve": serving(), "states": states()}.items():
        material = Material("one CPU")
        getattr(material, kind).append(Source(Path("a.json"), results))
        made = chapter(material, "")
        assert made.sections
        assert len(made.missing) == 4 - (kind != "states")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["nowhere.json"], "nowhere.json: no such file"),
        (["text.json"], "text.json: not what a `slimspec bench` command writes"),
        (["old.json"], "old.json: not what this version writes as 'head' (threads: Field required)"),
        (["other.json"], "nothing to report in other.json (convert)"),
    ],
)
def test_bad_files(files, message, tmp_path, monkeypatch):
    """Catches: a traceback, or half a report."""
    monkeypatch.chdir(tmp_path)
    Path("text.json").write_text("hello")
    Path("old.json").write_text(heads().model_dump_json(by_alias=True, exclude={"threads"}))
    Path("other.json").write_text('{"kind": "convert"}')
    run = CliRunner().invoke(cli.app, ["report", *files, "--output-path", "report"])
    assert run.exit_code == 1
    assert message in run.output
    assert not Path("report").exists()


def test_nobody_elses_folder_is_replaced(tmp_path):
    """Catches: --output-path . and the work in it is gone."""
    heads().write(tmp_path / "head.json")
    with pytest.raises(ValueError, match=r"exists and holds other files, but no report\.md"):
        write_report([tmp_path / "head.json"], tmp_path)
    assert (tmp_path / "head.json").is_file()
    for _ in range(2):  # its own earlier one is
        write_report([tmp_path / "head.json"], tmp_path / "report")


def test_head_times_as_one_picture(tmp_path):
    """Catches: the command that makes the README's picture, broken."""
    arguments = ["report", str(ROOT / "docs/results/head-cpu.json"), "--output-path", str(tmp_path / "head.png")]
    run = CliRunner().invoke(cli.app, arguments)
    assert run.exit_code == 0, run.output
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG")


def test_without_its_libraries(tmp_path, monkeypatch):
    """Catches: a traceback, or an error without its cure, where the extra was not installed."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    arguments = ["report", str(ROOT / "docs/results/head-cpu.json"), "--output-path", str(tmp_path / "report")]
    run = CliRunner().invoke(cli.app, arguments)
    assert run.exit_code == 1
    assert "pip install 'vllm-slimspec[bench]'" in run.output
