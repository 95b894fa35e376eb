"""The grid: scores from scripted answers, what is written, going on after an interruption, and the native engine."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from herd.cli import main
from herd.errors import FileFormatError, UsageError
from herd.evaluate.needle import NeedleConfig, even_depths, run, write_page, write_png
from herd.evaluate.needle.picture import colour
from herd.evaluate.statistics import wilson
from herd.tokenizer import Tokenizer, train

STORY = " ".join(f"On day {i} the wind came from the sea. It was the {i}th." for i in range(60))


@dataclass
class Reader:
    """Stands for `herd.LLM`: finds what is asked for in the prompt's text, as far as it looks back."""

    tokenizer: Tokenizer
    sight: int = 10**9  # tokens before the question that it sees
    stop_after: int = 10**9  # calls
    style: str = "plain"
    context: int = 10_000
    path: Path = Path("scripted")
    asked: list[tuple[int, int]] = field(default_factory=list)

    def generate(self, prompts: list[list[int]], *, max_tokens: int, temperature: float) -> list[Any]:
        if len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        assert temperature == 0.0
        self.asked.append((len(prompts[0]), len(prompts)))
        return [self._answer(prompt, max_tokens) for prompt in prompts]

    def _answer(self, prompt: list[int], max_tokens: int) -> Any:
        text = self.tokenizer.decode(prompt[-self.sight :])
        names = re.search(r"The special magic ([^:]*) numbers? (?:is|are): ?$", text)
        assert names is not None
        wanted = re.split(", | and ", names[1])
        found = {city: re.search(rf"magic {city} number is: (\d+)\.\n", text) for city in wanted}
        numbers = [match[1] if match else "0" for match in found.values()]
        before, after = {"plain": ("", ""), "longer": ("", "9"), "chatty": (" it is ", ".")}[self.style]
        ids: list[int] = []
        for part in (before, " and ".join(numbers), after):
            ids += self.tokenizer.encode(part)
        del ids[max_tokens:]
        return SimpleNamespace(token_ids=ids, text=self.tokenizer.decode(ids))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([STORY, "The special magic Singapore number is: 0 1 2 3 4 5 6 7 8 9. Question: What Answer:"], 350)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "story.txt"
    path.write_text(STORY)
    return str(path)


@pytest.fixture
def config(story: str) -> NeedleConfig:
    return NeedleConfig(lengths=(400, 300), depths=even_depths(3), samples=4, haystack=(story,))


def test_a_model_that_reads_everything(config: NeedleConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Reader(tokenizer)
    results = run(config, model, tmp_path)  # type: ignore[arg-type]
    assert results["overall"] == {**results["overall"], "correct": 24, "n": 24, "score": 1.0, "low": wilson(24, 24)[0]}
    assert [row["length"] for row in results["by_length"]] == [300, 400]
    assert [(c["length"], c["depth"]) for c in results["cells"]] == [(n, d) for n in (300, 400) for d in (0, 0.5, 1)]
    assert all(cell["n"] == 4 and cell["low"] == wilson(4, 4)[0] for cell in results["cells"])
    assert json.loads((tmp_path / "needle.json").read_text()) == json.loads(json.dumps(results))
    assert len(model.asked) == 6 and all(count == 4 for _, count in model.asked)


def test_a_model_that_sees_the_end_only(config: NeedleConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    results = run(config, Reader(tokenizer, sight=230), tmp_path)  # type: ignore[arg-type]
    shares = {(cell["length"], cell["depth"]): cell["score"] for cell in results["cells"]}
    assert shares == {(300, 0): 0, (300, 0.5): 1, (300, 1): 1, (400, 0): 0, (400, 0.5): 0, (400, 1): 1}
    assert {row["depth"]: row["score"] for row in results["by_depth"]} == {0: 0, 0.5: 0.5, 1: 1}


@pytest.mark.parametrize(("style", "right"), [("plain", 1), ("longer", 1), ("chatty", 0)])
def test_one_number_is_right_to_the_last_of_its_tokens(
    config: NeedleConfig, tokenizer: Tokenizer, tmp_path: Path, style: str, right: int
) -> None:
    """What follows the number's tokens is not looked at, as with EasyContext's teacher forcing; what precedes is."""
    model = Reader(tokenizer, style=style)
    assert run(config, model, tmp_path)["overall"]["score"] == right  # type: ignore[arg-type]


def test_several_numbers_count_one_by_one(story: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lengths": (900,), "depths": (0.0,), "samples": 5, "haystack": (story,)}
    config = NeedleConfig(**options, needles=4, ask=3, digits=5)
    everything = run(config, Reader(tokenizer), tmp_path / "a")  # type: ignore[arg-type]
    assert (everything["overall"]["correct"], everything["overall"]["n"]) == (15, 15)
    assert (everything["all_found"]["correct"], everything["all_found"]["n"]) == (5, 5)
    half = run(config, Reader(tokenizer, sight=650), tmp_path / "b")  # type: ignore[arg-type]
    assert 0 < half["overall"]["correct"] < 15 and half["all_found"]["correct"] < 5
    lines = (tmp_path / "b" / "cells.jsonl").read_text().splitlines()
    for sample in json.loads(lines[1])["samples"]:
        said = re.findall(r"\d+", sample["said"])
        assert sample["found"] == [str(number) in said for number in sample["numbers"]]


@pytest.mark.parametrize("torn", [0, 1, 17])
def test_an_interrupted_grid_goes_on(config: NeedleConfig, tokenizer: Tokenizer, tmp_path: Path, torn: int) -> None:
    whole = run(config, Reader(tokenizer), tmp_path / "whole")  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        run(config, Reader(tokenizer, stop_after=4), tmp_path / "cut")  # type: ignore[arg-type]
    cells = tmp_path / "cut" / "cells.jsonl"
    assert len(cells.read_text().splitlines()) == 5 and not (tmp_path / "cut" / "needle.json").exists()
    if torn:
        cells.write_bytes(cells.read_bytes()[:-torn])
    model = Reader(tokenizer)
    assert run(config, model, tmp_path / "cut") == whole  # type: ignore[arg-type]
    assert len(model.asked) == (3 if torn else 2)
    assert cells.read_bytes() == (tmp_path / "whole" / "cells.jsonl").read_bytes()
    again = Reader(tokenizer)
    assert run(config, again, tmp_path / "cut") == whole and again.asked == []  # type: ignore[arg-type]


def test_other_settings_do_not_go_on(config: NeedleConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    run(config, Reader(tokenizer), tmp_path)  # type: ignore[arg-type]
    before = (tmp_path / "cells.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"another config\.seed"):
        run(config.model_copy(update={"seed": 7}), Reader(tokenizer), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"another model\.path"):
        run(config, Reader(tokenizer, path=Path("other")), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"another loading\.kv"):
        run(config, Reader(tokenizer), tmp_path, loading={"kv": "int8"})  # type: ignore[arg-type]
    assert (tmp_path / "cells.jsonl").read_bytes() == before
    lines = before.decode().splitlines(keepends=True)
    for broken, said in (
        ("nothing of ours", "not valid JSON"),
        (lines[0] + "{}\n", "no cell"),
        (lines[0] + lines[1].replace("true", "1"), "no cell"),
        (lines[0] + lines[1].replace("[true]", "[true, true]"), "no cell"),
        (lines[0] + lines[1].replace('"length": 300', '"length": 301'), "no cell"),
    ):
        (tmp_path / "cells.jsonl").write_text(broken)
        with pytest.raises(FileFormatError, match=said):
            run(config, Reader(tokenizer), tmp_path)  # type: ignore[arg-type]
        assert (tmp_path / "cells.jsonl").read_text() == broken


def test_lengths_beyond_the_context_are_refused_before_any_work(
    config: NeedleConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert run(config, Reader(tokenizer, context=400), tmp_path / "a")["overall"]["n"] == 24  # type: ignore[arg-type]
    alone = config.model_copy(update={"length_of": "haystack"})
    for changed, context in ((config, 399), (alone, 450)):
        with pytest.raises(UsageError, match=f"context is {context}") as caught:
            run(changed, Reader(tokenizer, context=context), tmp_path / "b")  # type: ignore[arg-type]
        assert caught.value.value == 400
    assert not (tmp_path / "b").exists()


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_pictures(config: NeedleConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Reader(tokenizer, sight=230, path=Path("<script>alert(1)&amp;$x_$"))
    results = run(config, model, tmp_path)  # type: ignore[arg-type]
    write_page(results, tmp_path / "needle.html")
    page = (tmp_path / "needle.html").read_text()
    reader = _Elements()
    reader.feed(page)
    names = {tag for tag, _ in reader.tags}
    assert "<h1>Needle grid of &lt;script&gt;alert(1)&amp;amp;$x_$: 12 of 24" in page
    assert not names & {"script", "link", "img", "iframe"} and "http://" not in page and "https://" not in page
    fills = [attributes["fill"] for tag, attributes in reader.tags if tag == "rect"]
    expected = [colour(cell["score"]) for depth in (0, 0.5, 1) for cell in results["cells"] if cell["depth"] == depth]
    assert fills == expected and set(fills) == {colour(0), colour(1)}
    assert (colour(0), colour(0.5), colour(1)) == ("#b4451a", "#f2e3c2", "#2b5fd3")
    write_png(results, tmp_path / "needle.png")
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")


def _herd(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(left.value.code or 0)


def test_command_on_the_native_engine(
    small_models: dict[str, Path], story: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("herd._native")
    arguments = ["needle", str(small_models["one"]), "--lengths", "256,448", "--depths", "0,0.5,1", "--samples", "2"]
    arguments += ["--digits", "3", "--haystack", story, "--threads", "1", "--backend", "native"]
    assert _herd(*arguments, "--out", str(tmp_path / "a"), "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["overall"]["n"] == 12 and data["loading"]["threads"] == 1
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "cells.jsonl", "needle.json", "needle.html", "needle.png"
    }  # fmt: skip
    assert _herd(*arguments, "--out", str(tmp_path / "b")) == 0
    assert "of 12 numbers found" in capsys.readouterr().out
    assert (tmp_path / "a" / "cells.jsonl").read_bytes() == (tmp_path / "b" / "cells.jsonl").read_bytes()


def test_prompts_share_the_prefix_cache(small_models: dict[str, Path], story: str, tmp_path: Path) -> None:
    """With the deepest needle first, a prompt computes little more than what follows its needle."""
    pytest.importorskip("herd._native")
    from herd import LLM

    config = NeedleConfig(lengths=(448,), depths=even_depths(3), samples=1, haystack=(story,), digits=3)
    reused: list[int] = []
    with LLM(small_models["one"], threads=1, backend="native", page_tokens=16) as llm:
        generate = llm.generate

        def spy(prompts: list[list[int]], **options: Any) -> Any:
            completions = generate(prompts, **options)
            reused.extend(completion.timings.reused_tokens for completion in completions)
            return completions

        llm.generate = spy  # type: ignore[method-assign, assignment]
        run(config, llm, tmp_path)
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()[1:]
    deep, middle, start = (json.loads(line)["samples"][0]["places"][0] for line in lines)
    assert deep > middle > start == 0
    assert reused[0] == 0 and reused[1] >= middle - 16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--depths", "3"), "no lengths"),
        (("--lengths", "64", "--depths", "1"), "--depths"),
        (("--lengths", "64", "--depths", "a,b"), "--depths"),
        (("--lengths", "64", "--depths", "0,nan"), "depths"),
        (("--lengths", "0"), "--lengths"),
        (("--preset", "mine"), "no such preset"),
        (("--lengths", "64", "--ask", "3"), "more than needles"),
        (("--lengths", "256", "--haystack", "/nowhere"), "no such source"),
        (("--lengths", "513",), "context is 512"),
        (("--preset", "gradient-1", "--haystack", "STORY"), "context is 512"),
    ],
)  # fmt: skip
def test_command_mistakes(
    small_models: dict[str, Path], story: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], said: str,
) -> None:  # fmt: skip
    given = [story if argument == "STORY" else argument for argument in arguments]
    if "--haystack" not in given:
        given += ["--haystack", story]
    assert _herd("needle", str(small_models["one"]), *given, "--out", str(tmp_path / "out")) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
