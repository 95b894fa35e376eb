"""Tables of mixes, whatever is in them, and the verb `herd scaling mix` that reads them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd.cli import main
from herd.errors import FileFormatError, HerdError, UsageError
from herd.pretrain.scaling import MixRun, read_mixes

NAMES = st.text(st.characters(codec="utf-8", exclude_characters='",\r\n', exclude_categories=["Z", "C"]), min_size=1)
LISTS = st.lists(NAMES, min_size=1, max_size=4, unique=True)
LOSSES = st.floats(1e-6, 1e3, allow_nan=False)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_what_is_written_is_read(tmp_path: Path, data: st.DataObject) -> None:
    sources, domains, runs = data.draw(LISTS), data.draw(LISTS), []
    for _ in range(data.draw(st.integers(1, 4))):
        parts = data.draw(st.lists(st.integers(0, 1000), min_size=len(sources), max_size=len(sources)).filter(any))
        weights = {name: part / sum(parts) for name, part in zip(sources, parts, strict=True)}
        losses = {name: data.draw(LOSSES) for name in domains}
        runs.append(MixRun(data.draw(st.floats(1, 1e40)), weights, losses))
    rows = [
        {"note": "x", "flops": run.flops}
        | {f"weight.{name}": weight for name, weight in run.weights.items()}
        | {f"loss.{name}": loss for name, loss in run.losses.items()}
        for run in runs
    ]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    cells = tmp_path / "a.csv"
    text = [",".join(rows[0]), *(",".join(repr(v) if isinstance(v, float) else v for v in r.values()) for r in rows)]
    cells.write_text("\n".join(text), encoding="utf-8")
    for file in (lines, cells):
        found = read_mixes(file)
        assert [run.flops for run in found] == [run.flops for run in runs]
        assert [run.losses for run in found] == [run.losses for run in runs]
        for one, other in zip(found, runs, strict=True):
            assert list(one.weights) == sources and one.weights == pytest.approx(other.weights, abs=1e-12)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["csv", "jsonl"]),
    st.lists(
        st.one_of(
            st.text(max_size=30),
            st.sampled_from(["flops,weight.a,loss.b", "1,1,2", "1e18,0.5,nan", '{"flops": 1, "weight.a": 1}',
                             '{"flops": 1e18, "weight.a": 1, "loss.b": 2}', '{"weight.": 1, "loss.": 2}', '"'])
        ),
        max_size=5,
    ),
)  # fmt: skip
def test_whatever_is_in_a_file_ends_in_runs_or_in_words(tmp_path: Path, kind: str, lines: list[str]) -> None:
    file = tmp_path / f"a.{kind}"
    file.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    try:
        runs = read_mixes(file)
    except HerdError as error:
        assert str(error)
        return
    assert runs and all(sum(run.weights.values()) == pytest.approx(1) and run.losses for run in runs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flops,weight.a,weight.b,loss.a\n1,0.5,0.5,2\n1,0.5,0.4,2\n",
         "line 3: the weights of the sources do not sum to 1; got a=0.5, b=0.4"),
        ("flops,weight.a,weight.b,loss.a\n1,1.5,-0.5,2\n", r"line 2, weight.a: is not valid; got 1.5"),
        ("flops,weight.a,weight.b,loss.a\n1,0.5,,2\n", r"line 2, weight.b: is not given"),
        ("flops,weight.a,weight.b,loss.a\n1,0.5,0.5,0\n", r"line 2, loss.a: is not valid; got 0"),
        ("weight.a,weight.b,loss.a\n0.5,0.5,2\n", "line 2, flops: is not given"),
        ("flops,a,b,loss.a\n1,0.5,0.5,2\n", r"has no column weight.NAME; allowed: as weight.code"),
        ("flops,weight.a,weight.b,loss\n1,0.5,0.5,2\n", r"has no column loss.NAME"),
        ("flops,weight.,weight.b,loss.a\n1,0.5,0.5,2\n", r"has no column weight.NAME"),
        ("", "has no rows"),
    ],
)  # fmt: skip
def test_wrong_tables_are_refused_with_their_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(FileFormatError, match=message):
        read_mixes(tmp_path / "a.csv")


def test_a_line_without_what_others_have_is_refused(tmp_path: Path) -> None:
    rows = [{"flops": 1, "weight.a": 1, "loss.a": 2}, {"flops": 1, "weight.a": 0.5, "weight.b": 0.5, "loss.a": 2}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(FileFormatError, match=r"line 1, weight\.b: is not given; allowed: a number, as 0"):
        read_mixes(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match=r"\*.jsonl or \*.csv"):
        read_mixes(tmp_path / "a.txt")


def test_rounded_shares_are_made_to_sum_to_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("flops,weight.a,weight.b,weight.c,loss.a\n1,0.333,0.333,0.333,2\n")
    (run,) = read_mixes(tmp_path / "a.csv")
    assert list(run.weights.values()) == pytest.approx([1 / 3] * 3, abs=1e-12)


def _loss(share: float) -> tuple[float, float]:
    return 2 + float(np.exp(0.4 - 1.5 * share)), 3 + float(np.exp(-1 + 1.2 * share))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rng, file = np.random.default_rng(0), tmp_path / "mixes.csv"
    lines = ["name,flops,weight.code,weight.prose,loss.code,loss.prose"]
    for flops, gain in ((1e18, 0.0), (1e19, 0.1)):
        for share in (0.1, 0.25, 0.4, 0.6, 0.75, 0.9):
            code, prose = (loss - gain + 0.001 * rng.normal() for loss in _loss(share))
            lines.append(f"m,{flops},{share},{1 - share:.2f},{code},{prose}")
    file.write_text("\n".join(lines))
    return file


def _herd(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["scaling", "mix", *arguments])
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out, out.err


def test_the_verb_speaks_json_and_text(capsys: pytest.CaptureFixture[str], table: Path) -> None:
    png = table.with_suffix(".png")
    more = ("--mix", "code=0.5,prose=0.5", "--weights", "code=3,prose=1")
    code, out, _ = _herd(capsys, str(table), *more, "--plot", str(png), "--json")
    data = json.loads(out)
    assert code == 0 and data["flops"] == 1e19 and data["sources"] == ["code", "prose"]
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 20_000
    at = [3 * _loss(x)[0] + _loss(x)[1] for x in np.linspace(0, 1, 1001)]
    best = data["best"]["weights"]["code"]
    assert best["value"] == pytest.approx(np.argmin(at) / 1000, abs=0.02) and best["low"] < best["value"] < best["high"]
    (prediction,) = data["predictions"]
    assert prediction["mix"] == {"code": 0.5, "prose": 0.5}
    assert prediction["losses"]["code"]["value"] == pytest.approx(_loss(0.5)[0] - 0.1, abs=0.005)
    _, text, _ = _herd(capsys, str(table), *more, "--flops", "1e19")
    assert f"{best['value']:.3g} ({best['low']:.3g} to {best['high']:.3g})" in text
    assert "code=0.5 prose=0.5" in text and "6 mixes at 1e+19 FLOPs, 1× the largest budget" in text
    assert "train a third budget" not in text
    assert "train a third budget" in _herd(capsys, str(table), "--flops", "1e20")[1]
    _, out, _ = _herd(capsys, str(table), "--have", "code=1e9", "--tokens", "1e10", "--epochs", "3", "--json")
    assert json.loads(out)["best"]["weights"]["code"]["value"] == pytest.approx(0.3, abs=1e-6)
    assert "herd scaling mix mixes.csv --flops 1e20" in _herd(capsys, "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "xyz=1"], "--weights names what is not there; got xyz; allowed: code, prose"),
        (["--mix", "code=half"], "--mix is no list NAME=NUMBER"),
        (["--mix", "code=0.4,code=0.6"], "--mix is no list NAME=NUMBER"),
        (["--mix", "code=0.5"], "do not sum to 1; got code=0.5, prose=0"),
        (["--most", "code=0.3,prose=0.3"], "no mix keeps these bounds"),
        (["--have", "code=1e9"], "--have and --tokens are given together"),
        (["--flops", "0"], "this is no budget"),
        (["--plot", "nowhere/a.png"], "--plot cannot be written there"),
    ],
)
def test_wrong_use_is_told(capsys: pytest.CaptureFixture[str], table: Path, arguments: list[str], message: str) -> None:
    code, out, err = _herd(capsys, str(table), *arguments)
    assert code == 2 and message in err and not out


def test_the_verb_needs_no_torch(table: Path) -> None:
    code = "import sys; sys.modules['torch'] = None\nfrom herd.cli import main; main(['scaling', 'mix', sys.argv[1]])"
    result = subprocess.run([sys.executable, "-c", code, str(table)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "best share" in result.stdout, result.stderr
