"""Prompts of the needle grid against a builder that works on text, and the published settings."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from herd.config import parse_config
from herd.errors import HerdError, UsageError
from herd.evaluate.needle import PRESETS, NeedleConfig, NeedlePrompt, PromptMaker, even_depths, read_haystack
from herd.evaluate.needle.wording import CITIES, answer_ids, period_ids, question_ids
from herd.tokenizer import Tokenizer, load, train

SENTENCES = [f"On day {i} the wind came from the {w}. It was the {i}th." for i, w in enumerate(["north", "sea"] * 40)]
STORY = " ".join(SENTENCES) + "\n"
QUESTION = (
    "</book>.\n Based on the content of the book, Question: What is the special magic Singapore number? "
    "Answer: The special magic Singapore number is: "
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([STORY * 3, QUESTION, "0 1 2 3 4 5 6 7 8 9. The special magic"], 400)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "story.txt"
    path.write_text(STORY)
    return str(path)


def _maker(tokenizer: Tokenizer, story: str, **options: object) -> PromptMaker:
    given = {"lengths": (300,), "depths": (0.0, 0.3, 0.5, 1.0), "haystack": (story,), **options}
    return PromptMaker(tokenizer, NeedleConfig.model_validate(given))


def _content(tokenizer: Tokenizer, prompt: NeedlePrompt) -> str:
    assert prompt.ids[0] == tokenizer.bos_id
    assert not set(prompt.ids[1:]) & set(tokenizer.specials.values())
    return tokenizer.decode(prompt.ids[1:])


def _brute_force(tokenizer: Tokenizer, size: int, depth: float, needle: str) -> tuple[list[int], int]:
    """The haystack with its needle, one token after the other: wait for the depth, then for a full stop."""
    hay = (tokenizer.encode(STORY) * 20)[:size]
    out: list[int] = []
    target, place = int(size * depth), None
    for i in range(size + 1):
        if place is None and (depth == 0 or (i > target and tokenizer.decode([hay[i - 1]]) in (".", " ."))):
            place = i
            out += tokenizer.encode(needle)
        out += hay[i : i + 1]
    if place is None:
        place = target
        out = hay[:target] + tokenizer.encode(needle) + hay[target:]
    return out, place


@pytest.mark.parametrize("depth", [0.0, 0.123, 0.3, 0.5, 0.77, 0.999, 1.0])
@pytest.mark.parametrize("sample", [0, 5])
def test_a_prompt_is_the_brute_force_one(tokenizer: Tokenizer, story: str, depth: float, sample: int) -> None:
    maker = _maker(tokenizer, story, length_of="haystack", depths=(depth,))
    prompt = maker.make(300, depth, sample)
    number = prompt.numbers[0]
    body, place = _brute_force(tokenizer, 300, depth, f"\nThe special magic Singapore number is: {number}.\n")
    start = tokenizer.encode("This is a very long story book: <book>")
    assert prompt.ids == [tokenizer.bos_id, *start, *body, *tokenizer.encode(QUESTION)]
    assert prompt.places == (place,)
    assert prompt.answer == tokenizer.encode(str(number))
    assert 0 <= number < 10**7


@pytest.mark.parametrize("length", [200, 201, 333, 512])
@pytest.mark.parametrize("options", [{}, {"needles": 3, "ask": 2, "distractors": 2, "digits": 3}])
def test_a_total_length_is_exact(tokenizer: Tokenizer, story: str, length: int, options: dict[str, int]) -> None:
    maker = _maker(tokenizer, story, lengths=(1000,), **options)
    extra = 300 if options else 0
    for depth in (0.0, 0.4, 1.0):
        for sample in range(3):
            assert len(maker.make(length + extra, depth, sample).ids) + maker.room == length + extra
    assert maker.needed(1000) == 1000


def test_the_answer_always_has_room(tokenizer: Tokenizer, story: str) -> None:
    maker = _maker(tokenizer, story)
    rng = random.Random(0)
    assert all(len(answer_ids(tokenizer, rng.randrange(10**7))) <= maker.room for _ in range(500))


def test_several_needles_lie_evenly_from_the_depth_on(tokenizer: Tokenizer, story: str) -> None:
    maker = _maker(tokenizer, story, length_of="haystack", needles=4, ask=2, distractors=2, lengths=(600,))
    prompt = maker.make(600, 0.2, 0)
    text = _content(tokenizer, prompt)
    assert len(prompt.places) == 6
    for place, wanted in zip(prompt.places, (120, 240, 360, 480), strict=False):
        assert wanted < place <= wanted + 40  # a sentence is shorter
    planted = sorted((text.index(f"special magic {city} number is:"), city) for city in CITIES[:4])
    assert [city for _, city in planted] == list(CITIES[:4])
    assert all(text.count(f"special magic {city} number") == 1 for city in CITIES[4:6])
    for city, number in zip(prompt.cities, prompt.numbers, strict=True):
        assert f"The special magic {city} number is: {number}.\n" in text
    first, second = prompt.cities
    assert text.endswith(f"Answer: The special magic {first} and {second} numbers are:")
    assert len(set(prompt.numbers)) == 2 and prompt.answer == []
    asked = {maker.make(600, 0.2, sample).cities for sample in range(40)}
    assert len(asked) == 6  # every pair of four comes up


def test_a_seed_says_every_number(tokenizer: Tokenizer, story: str) -> None:
    one, again, other = (_maker(tokenizer, story, seed=seed) for seed in (1, 1, 2))
    assert one.make(300, 0.3, 2) == again.make(300, 0.3, 2)
    different = [one.make(300, 0.3, 3), one.make(300, 0.5, 2), one.make(299, 0.3, 2), other.make(300, 0.3, 2)]
    numbers = [prompt.numbers for prompt in [one.make(300, 0.3, 2), *different]]
    assert len(set(numbers)) == 5


def test_what_a_haystack_says_is_content(tokenizer: Tokenizer, tmp_path: Path) -> None:
    names = sorted(tokenizer.specials)
    path = tmp_path / "sly.txt"
    path.write_text("".join(f"{name} says stop. " for name in names) * 30)
    prompt = _maker(tokenizer, str(path), lengths=(900,)).make(900, 0.5, 0)
    assert names[0] in _content(tokenizer, prompt)


def test_a_short_text_repeats(tokenizer: Tokenizer, story: str) -> None:
    ids = tokenizer.encode(STORY)
    whole = read_haystack(tokenizer, [story], 3 * len(ids) + 7)
    assert list(whole.ids) == ids * 3 + ids[:7] and whole.text_tokens == len(ids)
    cut = read_haystack(tokenizer, [story], 60, generator_tokens=25)
    assert list(cut.ids) == ids[:25] * 2 + ids[:10] and cut.text_tokens == 25
    assert cut.sha256 != read_haystack(tokenizer, [story], 60).sha256
    with pytest.raises(UsageError, match="no such source"):
        read_haystack(tokenizer, ["/nowhere"], 60)
    with pytest.raises(HerdError, match="gave no document"):
        Path(story).with_name("empty.txt").touch()
        read_haystack(tokenizer, [str(Path(story).with_name("empty.txt"))], 60)


@pytest.mark.parametrize("name", ["llama2.tokenizer.json", "llama3.tokenizer.model", "llama4.tokenizer.model"])
def test_full_stops_and_answers_of_the_real_vocabularies(shared_data: Path, name: str) -> None:
    vocabulary = load(shared_data / "tokenizers" / name)
    question, answer = question_ids(vocabulary, ("Singapore",)), answer_ids(vocabulary, 1234567)
    pieces = [vocabulary.token_bytes(i) for i in answer]
    if name.startswith("llama2"):  # EasyContext's full stops, and the byte
        assert period_ids(vocabulary) == {29889, 869, 3 + ord(".")}
        assert vocabulary.token_bytes(question[-1]) == b":" and pieces == [b" ", *(b"%d" % i for i in range(1, 8))]
    else:
        assert period_ids(vocabulary) == set(vocabulary.encode(".")) | set(vocabulary.encode(" ."))
        assert vocabulary.token_bytes(question[-1]) == b" " and pieces == [b"123", b"456", b"7"]
    assert question + answer == vocabulary.encode(QUESTION + "1234567")


def test_the_published_grids() -> None:
    grids = {name: NeedleConfig(**options) for name, options in PRESETS.items()}
    first = grids["gradient-1"]
    assert len(first.lengths) == 13 and (first.lengths[0], first.lengths[-1]) == (100, 1_040_200)
    assert first.depths == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0) and first.digits == 8
    assert grids["gradient-2"].lengths[1] - grids["gradient-2"].lengths[0] == 173_350
    assert [grids[f"gradient-{i}"].generator_tokens for i in (1, 2, 3)] == [25, 150_000, 925_000]
    easy = grids["easycontext"]
    assert easy.lengths[:2] == (1000, 2000) and len(easy.depths) == 11 and (easy.digits, easy.samples) == (7, 10)
    assert all(grid.length_of == "haystack" for grid in grids.values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"depths": (0.5, 1.5)}, "0 to 1"),
        ({"needles": 2, "ask": 3}, "more than needles"),
        ({"needles": 12, "distractors": 12}, "cities"),
        ({"needles": 9, "digits": 1}, "different numbers"),
        ({"lengths": ()}, "or more"),
        ({"lengths": (0,)}, "greater than 0"),
        ({"digits": 40}, "digits"),
        ({"samples": 0}, "samples"),
    ],
)
def test_wrong_settings(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_config(NeedleConfig, {"lengths": (100,), "depths": even_depths(3), **options}, "test")


def test_a_length_without_room(tokenizer: Tokenizer, story: str) -> None:
    maker = _maker(tokenizer, story)
    with pytest.raises(UsageError, match="no room for a haystack") as caught:
        maker.make(40, 0.5, 0)
    assert caught.value.value == 40
