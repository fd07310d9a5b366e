"""``slimspec report``: whatever was measured becomes one page that needs nothing else and says what it lacks."""

import re
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_slimspec import cli
from vllm_slimspec.measure.report import write_report
from vllm_slimspec.measure.report.material import Material, Source, read
from vllm_slimspec.measure.report.sections import chapter
from vllm_slimspec.measure.results import (
    AcceptanceResults,
    AcceptanceRow,
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
    assert len(pictures) == len(page.all("details")) == 3
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
    assert {"head", "acceptance"} <= {s.results.kind for g in groups for s in g.sources}
    assert {"demo", "cycle"} <= {file.kind for file in left_out}


def test_devices_are_not_mixed_by_accident(tmp_path):
    """Catches: a GPU's heads beside a CPU's in one figure, without a word."""
    heads().write(tmp_path / "one.json")
    heads(device="another GPU").write(tmp_path / "two.json")
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    with pytest.raises(ValueError, match=r"one\.json is of 'one CPU' and .*two\.json of 'another GPU'"):
        write_report(files, tmp_path / "report")
    assert not (tmp_path / "report").exists()
    write_report(files, tmp_path / "report", mixed_devices=True)
    page = (tmp_path / "report/index.html").read_text()
    assert page.index("one CPU") < page.index("Head time") < page.index("another GPU") < page.rindex("Head time")


def _section(results, title):
    material = Material("one CPU")
    for kind, found in results.items():
        getattr(material, kind).append(Source(Path(f"{kind}.json"), found))
    return next(section for section in chapter(material, "").sections if section.title.startswith(title))


def test_imitated_acceptance_is_named():
    """Catches: throughput at the acceptance that another model had, without a word."""
    served = serving()
    served.acceptance = "some-model"
    assert "as was measured with some-model" in _section({"serve": served}, "Served").words[-1]


def test_every_kind_alone(tmp_path):
    """Catches: a page that needs two kinds of file; and missing figures of which nobody says what makes them."""
    accepted = acceptances(full=[20] * 4)
    for kind, results in {"head": heads(), "acceptance": accepted, "serve": serving(), "states": states()}.items():
        material = Material("one CPU")
        getattr(material, kind).append(Source(Path("a.json"), results))
        made = chapter(material, "")
        assert made.sections
        assert len(made.missing) == 3 - (kind != "states")


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
