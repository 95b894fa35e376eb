"""The report: it says what the files say, nothing untrusted becomes markup, nothing is loaded from elsewhere."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest

from herd.errors import FileFormatError, UsageError
from herd.files import read_json, write_json
from herd.recipe.report import ReportConfig, RunData, rebuild_report
from herd.recipe.report.charts import Series, line_chart, smooth, thin, tick_text, ticks
from herd.recipe.report.html import Html, escape, join, table, tag


class Reader(HTMLParser):
    """Text, tags and attributes of a page, and a check that every element is closed in order."""

    void: ClassVar[set[str]] = {"meta", "br", "line", "rect", "circle", "path"}

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(name)
        self.attributes += attributes
        self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        assert name in self.void
        self.tags.add(name)
        self.attributes += attributes

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def page(finished_run: Path) -> str:
    written = rebuild_report(finished_run)
    assert [path.name for path in written] == ["report.html", "MODEL_CARD.md", "loss.png"]
    assert written[2].read_bytes().startswith(b"\x89PNG")
    return written[0].read_text(encoding="utf-8")


def test_the_page_shows_every_part_of_the_run(page: str) -> None:
    text = " ".join(Reader(page).text)
    for expected in (
        "The run", "Text", "Tokens", "Model", "Pretraining", "Instruction tuning", "Evaluation", "Samples", "Quantised",
        "Cost", "Repeat it", "7 min 58 s", "10.5 MB", "code.max_digits (87)", "1.312", "xz -9e", "1.920", "McNemar",
        "69.3 ± 5.2", "98.0 ± 2.7", "3.670", "model-q4_0.gguf", "+0.0379", "what base made",
        "herd run recipes/pocket.yaml", "MFU counts 6·N + 6·L·H·K·S FLOPs for every token",
    ):  # fmt: skip
        assert expected in text, expected


def test_hostile_text_stays_text(page: str) -> None:
    reader = Reader(page)
    assert not {"script", "img", "iframe", "object", "link", "form"} & reader.tags
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name in ("src", "srcset", "style")]
    assert any("<script>alert(1)</script>" in text for text in reader.text), "it is shown, as text"
    assert "⟨U+202E⟩" in page and "⟨U+001B⟩" in page and "⟨U+FEFF⟩" in page
    assert not any(sign in page for sign in "\x1b\u202e\ufeff")


def test_the_page_loads_nothing(page: str) -> None:
    links = [value or "" for name, value in Reader(page).attributes if name == "href"]
    assert links and all(link.startswith("#") for link in links)
    assert "url(" not in page and "@import" not in page
    policies = [value for name, value in Reader(page).attributes if name == "content"]
    assert "default-src 'none'; style-src 'unsafe-inline'" in policies
    anchors = {value for name, value in Reader(page).attributes if name == "id"}
    assert {link[1:] for link in links} <= anchors


def test_every_picture_is_well_formed_and_finite(page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(pictures) >= 10
    places = ("d", "x", "y", "x1", "x2", "cx", "cy", "width")
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.get("aria-label")
        numbers = re.findall(r"-?\d+\.?\d*(?:e-?\d+)?|nan|inf", root.get("viewBox", "") + " ".join(
            value for element in root.iter() for key, value in element.items() if key in places
        ))  # fmt: skip
        assert all(math.isfinite(float(number)) for number in numbers)


def test_the_card_says_what_the_run_measured(finished_run: Path) -> None:
    card = next(path for path in rebuild_report(finished_run) if path.name == "MODEL_CARD.md").read_text(
        encoding="utf-8"
    )
    assert card.startswith("---\nlicense: apache-2.0\n")
    # 6·N·D + 6·L·H·K·S·D with the fixture's shape: N counts matrices and norms without the embedding, S = 512
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32) + 32 + 320 * 32
    tokens = 900 * 8192
    flops = 6 * weights * tokens + 6 * 2 * 32 * 512 * tokens
    mantissa = f"{flops:.2e}".split("e")[0]
    assert f"{tokens:,} | 2.4" in card and f"{mantissa} × 10¹²" in card and f"{flops / 8.64e19:.2e}" in card
    assert f"N = {weights:,}" in card
    # energy: 1.9 busy cores (see write_stage) for all seconds, 10 W, PUE 1.1, 0.385 kg/kWh
    hours = 1.9 * (21.3 + 4.2 + 478.0 + 110.5 + 61.0 + 14.0) / 3600
    assert f"{hours * 10 * 1.1:.1f} Wh" in card and f"{hours * 10 * 1.1 * 0.385:.1f} g CO2" in card
    assert "| slices | medium | 100 | 0.0 (≤ 3.7) | 4.0 ± 3.8 | 70.0 ± 9.0 |" in card
    for heading in (
        "Architecture",
        "Data",
        "Training",
        "Energy and carbon",
        "Evaluation",
        "Files",
        "Limitations",
        "Licence",
    ):
        assert f"\n## {heading}\n" in card
    assert "It fails more often than not at: functions." in card


def _rewrite(run_dir: Path, stage: str, file: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change one JSON file of a stage in place."""
    path = run_dir / read_json(run_dir / "run.json")["stages"][stage]["directory"] / file
    data = read_json(path)
    change(data)
    write_json(path, data)


def _texts(run_dir: Path) -> tuple[str, str]:
    """The report's text and the card, made anew."""
    page, card = rebuild_report(run_dir)[:2]
    return " ".join(Reader(page.read_text(encoding="utf-8")).text), card.read_text(encoding="utf-8")


def test_headline_and_tile_say_which_model_is_meant(finished_run: Path) -> None:
    page, card = _texts(finished_run)
    for text in (page, card):
        assert "After pretraining it needs 1.31 bits for a byte of text it has not seen; xz -9e needs 1.92." in text
    assert "Held-out text, base model 1.312" in page


def test_the_card_claims_nothing_that_nobody_measured(finished_run: Path) -> None:
    _, card = _texts(finished_run)
    assert "language:" not in card, "nothing in a run tells the language of its text"
    assert "pip install" not in card, "nothing of the kind is published"
    assert "25 (411 kB) held out, split by module." in card and "Wilson's bound at 0 and 100" in card
    assert "small talk excepted" in card and "also run in llama.cpp" not in card
    figures = {"loss": 1.0981, "dialogs": 7011, "dialog_tokens": 1_200_300, "rehearsal_tokens": 60_001}
    _rewrite(finished_run, "sft", "result.json", lambda data: data.update(figures))
    metrics = finished_run / read_json(finished_run / "run.json")["stages"]["sft"]["directory"] / "metrics.jsonl"
    metrics.write_text('{"step": 200, "loss": 0.1}\n')
    card = _texts(finished_run)[1]
    assert "7,011 dialogues (1,200,300 tokens), and 60,001 tokens of the training text again" in card
    assert "| sft | 200 | 1,638,400 | 1.098 |" in card, "the mean over the last steps, not the last line of the metrics"


def test_the_card_says_what_the_clock_and_the_sources_decided(finished_run: Path) -> None:
    card = _texts(finished_run)[1]
    assert "Training text: PSF-2.0 (the Python standard library)." in card and "without a clock" not in card
    _rewrite(finished_run, "corpus", "stats.json", lambda data: data["config"].update(sources=["notes"]))
    for stage, more in (("base", {}), ("sft", {"epochs": 2.5})):
        _rewrite(finished_run, stage, "stage.json", lambda d, m=more: d["key"]["config"].update(max_minutes=6, **m))
        _rewrite(finished_run, stage, "result.json", lambda data: data.update(steps=321))
    page, card = _texts(finished_run)
    assert "Training text: that of its sources." in card
    exact = "base.max_minutes=null base.train.steps=321 sft.max_minutes=null sft.train.steps=321 sft.epochs=null"
    assert f"`{exact}`" in card and exact in page


def test_a_run_without_held_out_text(finished_run: Path) -> None:
    def unscored(data: dict[str, Any]) -> None:
        data.update(bytes=0, documents=0)
        for entry in data["formats"].values():
            entry["bits_per_byte"] = None

    _rewrite(finished_run, "quantise", "results.json", unscored)
    nothing = {"bytes": 0, "tokens": 0, "bytes_per_token": 0.0}
    _rewrite(finished_run, "tokenizer", "results.json", lambda data: data.update(heldout=nothing))
    _rewrite(finished_run, "corpus", "stats.json", lambda data: data.update(heldout_documents=0, split="none"))
    page, card = _texts(finished_run)
    assert "880 documents (10.5 MB) for training." in card
    assert "The final model as GGUF files, and how many" in page and "bytes per token, held-out text" not in page
    assert (
        "| q8_0 | `model-q8_0.gguf` | 5.60 MB |  |  |" in card and "3.75 bytes per token on the training text" in card
    )


def test_gpus_are_named_and_their_energy_is_said_to_be_missing(finished_run: Path) -> None:
    for text in _texts(finished_run):
        assert "GPU" not in text
    _rewrite(finished_run, "base", "stage.json", lambda data: data["host"].update(gpus=["NVIDIA H100"]))
    page, card = _texts(finished_run)
    for text in (page, card):
        assert "The energy of the GPU (NVIDIA H100) is not counted." in text
    assert "; GPU: NVIDIA H100 |" in card


def test_a_report_of_another_version_is_an_error_with_its_field(finished_run: Path) -> None:
    _rewrite(finished_run, "report", "stage.json", lambda data: data["key"]["config"].update(wats=3))
    with pytest.raises(UsageError, match=r"stage\.json: there is no field 'wats'"):
        rebuild_report(finished_run)


def test_rebuilding_keeps_the_stage_valid(finished_run: Path) -> None:
    from herd.recipe.manifest import first_difference

    rebuild_report(finished_run)
    directory = finished_run / read_json(finished_run / "run.json")["stages"]["report"]["directory"]
    manifest = read_json(directory / "stage.json")
    assert set(manifest["artefacts"]) == {"report.html", "MODEL_CARD.md", "loss.png"}
    assert first_difference(directory, manifest) is None


@pytest.mark.parametrize("left", [["corpus"], ["base"], ["evaluate"], ["corpus", "tokenizer", "base", "sft"]])
def test_an_unfinished_run_gets_a_report_of_what_is_there(finished_run: Path, left: list[str]) -> None:
    state = read_json(finished_run / "run.json")
    for name, entry in state["stages"].items():
        entry["status"] = "done" if name in left else "failed"
    (finished_run / "run.json").write_text(json.dumps(state))
    page = rebuild_report(finished_run)[0]
    assert page.parent == finished_run
    text = " ".join(Reader(page.read_text(encoding="utf-8")).text)
    assert ("Pretraining" in text) == ("base" in left) and ("McNemar" in text) == ("evaluate" in left)


def test_models_stand_in_the_order_of_the_run(finished_run: Path) -> None:
    state = read_json(finished_run / "run.json")
    directory = finished_run / state["stages"]["evaluate"]["directory"]
    results = read_json(directory / "results.json")
    for part in ("bits_per_byte", "exact_match", "samples"):
        results[part] = {label.replace("base", "zero"): entry for label, entry in results[part].items()}
    write_json(directory / "results.json", results | {"models": ["zero", "sft"], "comparison": None, "dialogs": []})
    run = RunData("x", 0, "herd run r.yaml", "", {"evaluate": directory}, ReportConfig())
    assert list(run.bits) == ["zero", "sft"]
    assert list(run.evaluation["exact_match"]) == ["zero", "zero, few-shot", "sft"]
    assert list(run.compressors) == ["xz -9e", "bzip2 -9", "zstd -19"]


def test_a_run_with_nothing_done_is_refused(finished_run: Path) -> None:
    state = read_json(finished_run / "run.json")
    for entry in state["stages"].values():
        entry["status"] = "running"
    (finished_run / "run.json").write_text(json.dumps(state))
    with pytest.raises(FileFormatError, match="nothing to report"):
        rebuild_report(finished_run)


def test_damaged_metrics_lines_are_left_out(finished_run: Path) -> None:
    state = read_json(finished_run / "run.json")
    metrics = finished_run / state["stages"]["base"]["directory"] / "metrics.jsonl"
    with open(metrics, "ab") as file:
        file.write(b'{"step": 900, "loss": NaN}\n{"step": 901, "loss": 2.0\n[]\n"x"\n\xff\xfe\n{"step": 2, "lo')
    Reader(rebuild_report(finished_run)[0].read_text(encoding="utf-8"))


def test_escaping() -> None:
    assert escape("<&\"'>") == "&lt;&amp;&quot;&#x27;&gt;"
    assert (
        tag("p", "<b>", Html("<i>x</i>"), title='"', class_="c") == '<p title="&quot;" class="c">&lt;b&gt;<i>x</i></p>'
    )
    assert join(["<", ["&", Html("<br/>")], None, 3]) == "&lt;&amp;<br/>3"
    assert "<thead>" not in table(["", ""], [["a", "b"]])
    assert escape("\x00\x1b\u200b\ud800") == "⟨U+0000⟩⟨U+001B⟩⟨U+200B⟩⟨U+D800⟩"
    assert escape("a\tb\nc é 日本") == "a\tb\nc é 日本"


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-0.3, 97, 5) == [0, 20, 40, 60, 80]
    assert ticks(3, 3, 5) == [3]
    assert [tick_text(value, [0, 50_000]) for value in (0, 25_000, 50_000)] == ["0", "25k", "50k"]
    assert [tick_text(value, [0.001, 0.003]) for value in (0.001, 0.003)] == ["0.001", "0.003"]


def test_thinning_keeps_spikes_and_ends() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    points[4321] = (4321.0, 99.0)
    thinned = thin(points, 200)
    assert len(thinned) <= 201 and (4321.0, 99.0) in thinned and thinned[-1] == points[-1]
    assert thinned == sorted(thinned)


def test_smoothing_neither_lags_nor_ends_in_a_spike() -> None:
    spiky = [(float(x), 1.0) for x in range(300)] + [(300.0, 9.0)]
    assert smooth(spiky)[-1][1] < 5  # a mean over the last 11 points leans to it no more than this
    line = [(float(x), 2.0 * x + 1) for x in range(100)]
    assert [y for _, y in smooth(line)] == pytest.approx([y for _, y in line]), "no lag: a straight line stays one"
    assert smooth([(0.0, 1.0), (1.0, 4.0), (2.0, 1.0)])[1] == (1.0, 2.0)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(0.0, float("nan"))],
        [(5.0, 1.0)],
        [(0.0, 2.0), (1.0, 2.0)],
        [(0.0, 0.0), (1.0, 0.0)],
        [(0.0, -1.0), (1.0, 1e9)],
    ],
)
def test_charts_of_odd_data_are_well_formed(points: list[tuple[float, float]]) -> None:
    picture = line_chart([Series("x", points)], label="a < b")
    assert "nan" not in picture and "inf" not in picture
    assert bool(picture) == any(math.isfinite(y) for _, y in points)
    Reader(picture)


def test_reports_need_no_torch(finished_run: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from herd.recipe import load_recipe, run\n"
        "from herd.recipe.report import rebuild_report\n"
        f"print(len(rebuild_report({str(finished_run)!r})))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "3", done.stderr
