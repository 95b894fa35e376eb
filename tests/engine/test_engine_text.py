"""Stop strings over token boundaries, against a character-by-character definition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.engine.text import StopMatcher, TextStream

LETTERS = st.text(alphabet="abc", max_size=30)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)


def by_definition(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The stop that is complete first ends the text; of several complete at once, the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def pieces(data: st.DataObject, text: str) -> list[str]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=len(text))))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(max_examples=400, deadline=None)
@given(text=LETTERS, stops=STOPS, data=st.data())
def test_same_result_for_every_split(text: str, stops: list[str], data: st.DataObject) -> None:
    expected, matched = by_definition(text, stops)
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces(data, text):
        shown += matcher.push(piece)
        assert expected.startswith(shown), "showed text that a stop string takes back"
    shown += matcher.flush() if matcher.matched is None else ""
    assert (shown, matcher.matched) == (expected, matched)


@settings(max_examples=200, deadline=None)
@given(text=LETTERS, stops=STOPS)
def test_withholds_no_more_than_needed(text: str, stops: list[str]) -> None:
    """What is withheld could always be completed to a stop string."""
    matcher = StopMatcher(stops)
    shown = ""
    for i, character in enumerate(text):
        shown += matcher.push(character)
        if matcher.matched is not None:
            return
        held = text[len(shown) : i + 1]
        assert not held or any(stop.startswith(held) for stop in stops)


class Bytes:
    """A decoder whose tokens are single bytes, written for the test on Python's own incremental decoder."""

    def __init__(self) -> None:
        import codecs

        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id]))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=20), stops=st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_parts_join_to_the_text(text: str, stops: list[str]) -> None:
    text = text.encode("utf-8", "replace").decode()
    stops = [stop.encode("utf-8", "replace").decode() for stop in stops]
    stream = TextStream(Bytes(), stops)
    parts = []
    for byte in text.encode():
        parts.append(stream.push(byte))
        if stream.matched_stop is not None:
            break
    else:
        parts.append(stream.finish())
    assert "".join(parts) == stream.text == by_definition(text, stops)[0]
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


@pytest.mark.parametrize("stops", [[], ["\ufffd!"]])
def test_an_unfinished_character_comes_out_at_the_end(stops: list[str]) -> None:
    stream = TextStream(Bytes(), stops)
    assert stream.push(0xE2) == "" and stream.push(0x82) == ""
    assert stream.finish() == "\ufffd" == stream.text
