"""Grammars in the sampler and in the engine: batches, forks, guesses and places given up change no answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd import LLM, UsageError, checkpoint, tokenizer
from herd.engine import Grammar, Sampling
from herd.engine.constraint import GrammarFailed, Grammars
from herd.engine.sampler import SamplerRow, fold_seed, sample
from tests.engine.grammars import GRAMMARS, PERSON, SUM, accepts, ids_allowed, start, walk

pytest.importorskip("llguidance")


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    which=st.sampled_from(list(GRAMMARS)),
    options=st.fixed_dictionaries(
        {"temperature": st.sampled_from([0.0, 0.7, 3.0])},
        optional={"top_k": st.integers(1, 80), "top_p": st.sampled_from([0.0, 0.5, 1.0]), "min_p": st.just(0.1),
                  "typical_p": st.just(0.5), "repetition_penalty": st.just(1.7), "logit_bias": st.just({5: 9.0})},
    ),
)  # fmt: skip
def test_choices_are_those_among_what_is_allowed(
    grammars: Grammars, tok: tokenizer.Tokenizer, seed: int, which: str, options: dict[str, Any]
) -> None:
    """Equal to the choice without a grammar where every other token has a logit of -inf; log-probabilities are not."""
    rng = np.random.default_rng(seed)
    free = Sampling.from_options({**options, "logprobs": True})
    bound = Sampling.from_options({**options, "logprobs": True, "grammar": GRAMMARS[which]})
    row = SamplerRow(bound, seed, (), start(grammars, tok, GRAMMARS[which]))
    twin, other = SamplerRow(free, seed, ()), SamplerRow(free, seed + 1, ())
    assert row.constraint is not None
    padding = 40  # rows of the head that stand for no token
    for _ in range(12):
        logits_V = rng.normal(0, 3, tok.vocab_size + padding).astype(np.float32)
        allowed_V = np.isin(np.arange(tok.vocab_size + padding), list(ids_allowed(row.constraint)))
        only = np.where(allowed_V, logits_V, -np.inf).astype(np.float32)
        expected = sample(only[None], [twin])[0].token_id
        choice = sample(np.stack([logits_V, logits_V[::-1]]), [row, other])[0]
        assert choice.token_id == expected
        exact = logits_V.astype(np.float64)
        assert choice.logprob == pytest.approx(exact[expected] - np.log(np.exp(exact).sum()), abs=1e-6)
        if expected in tok.stop_ids:
            return


@pytest.fixture(scope="module")
def drafted(make_model: Callable[..., Path], tiny: Path) -> Iterator[dict[str, LLM]]:
    """The tiny model plain, with guesses from its text, and with guesses of a model that is nearly the same."""
    pytest.importorskip("herd._native")
    with checkpoint.open_checkpoint(tiny) as opened:
        rng = np.random.default_rng(1)
        near = {name: opened[name] + rng.normal(0, 0.02, opened.shape(name)).astype(np.float32) for name in opened}
        draft = tiny.parent / "near"
        checkpoint.save(draft, opened.config, near, format="hf", dtype="f32", tokenizer=opened.tokenizer)
    models = {
        "plain": LLM(tiny, kv="f32"),
        "ngram": LLM(tiny, kv="f32", draft="ngram"),
        "model": LLM(tiny, draft=draft),
    }
    models["plain16"] = LLM(tiny)
    yield models
    for model in models.values():
        model.close()


def ids_of(answers: Any) -> list[tuple[list[int], str, str]]:
    return [(answer.token_ids, answer.text, answer.finish_reason) for answer in answers]


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5}])
@pytest.mark.parametrize("which", list(GRAMMARS))
def test_company_guesses_and_new_beginnings_change_nothing(
    drafted: dict[str, LLM], which: str, sampling: dict[str, Any]
) -> None:
    options = {"grammar": GRAMMARS[which], "max_tokens": 50, **sampling}
    prompts = ["def f(x):\n    return x\n" * 3, "import os", "x", "1+1+1+1+1+1"]
    plain = drafted["plain"]
    alone = ids_of(plain.generate(prompt, **options) for prompt in prompts)
    assert ids_of(plain.generate(prompts, **options)) == alone

    free = plain.begin(plain.tokenizer.encode("import sys"), Sampling(max_tokens=60, seed=1))  # others beside them
    others = [plain.begin(plain._encode("x"), Sampling(grammar=g, max_tokens=50, seed=2)) for g in GRAMMARS.values()]
    assert ids_of(plain.generate(prompts, **options)) == alone
    plain.cancel([*free, *(sequence for started in others for sequence in started)])

    again = []
    for prompt in prompts:
        for chunk in plain.stream(prompt, **options):
            plain.scheduler.make_way()  # its place is taken after every token
            if chunk.completion is not None:
                again.append(chunk.completion)
    assert ids_of(again) == alone

    assert ids_of(drafted["ngram"].generate(prompts, **options)) == alone
    usual = ids_of(drafted["plain16"].generate(prompts, **options))
    assert ids_of(drafted["model"].generate(prompts, **options)) == usual


@pytest.mark.parametrize("which", list(GRAMMARS))
def test_several_answers_have_a_state_each(llm: LLM, which: str) -> None:
    options = {"grammar": GRAMMARS[which], "max_tokens": 40, "temperature": 1.2}
    together = llm.generate("some prompt", n=5, seed=11, **options)
    assert isinstance(together, list)
    apart = [llm.generate("some prompt", seed=fold_seed(11, i), **options) for i in range(5)]
    assert ids_of(together) == ids_of(apart)
    assert len({answer.text for answer in together}) > 1


def test_how_an_answer_ends(llm: LLM) -> None:
    yes = llm.generate("x", grammar=Grammar.choice(["yes"]), temperature=0)
    assert (yes.text, yes.finish_reason, yes.usage.completion_tokens) == ("yes", "stop", len(yes.token_ids))
    assert yes.stop == yes.token_ids[-1] in llm.tokenizer.stop_ids
    n = len(yes.token_ids) - 1
    complete = llm.generate("x", grammar=Grammar.choice(["yes"]), temperature=0, max_tokens=n)
    assert (complete.text, complete.finish_reason, complete.stop) == ("yes", "stop", None)
    for grammar in (Grammar.regex("a{1,100}"), Grammar.regex("a{50}")):  # one may end, one may not
        bias = {i: -100.0 for i in llm.tokenizer.stop_ids}
        cut = llm.generate("x", grammar=grammar, temperature=0, max_tokens=3, logit_bias=bias)
        assert cut.finish_reason == "length" and set(cut.text) == {"a"}
    stopped = llm.generate("x", grammar=Grammar.regex("abcd"), stop="c")
    assert (stopped.text, stopped.stop) == ("ab", "c")
    letter = llm.tokenizer.encode("b")[0]
    early = llm.generate("x", grammar=Grammar.regex("[ab]{9}"), stop_token_ids=[letter], logit_bias={letter: 50.0})
    assert (early.text, early.stop, early.finish_reason) == ("", letter, "stop")


def test_options_that_make_no_sense(llm: LLM) -> None:
    with pytest.raises(UsageError, match="grammar is no Grammar"):
        llm.generate("x", grammar={"type": "object"})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="ignore_eos"):
        llm.generate("x", grammar=Grammar.regex("a"), ignore_eos=True)
    with pytest.raises(UsageError, match="no text leads"):
        llm.stream("x", grammar=Grammar.lark("start: start"))  # at once, not with the first chunk


def test_log_probabilities_are_the_models_own(llm: LLM) -> None:
    answer = llm.generate("def ", grammar=GRAMMARS["schema"], logprobs=True, seed=3, max_tokens=30)
    prompt = llm._encode("def ")
    score = llm.score([*prompt, *answer.token_ids])
    assert answer.logprobs == pytest.approx(score.logprobs[len(prompt) - 1 :], abs=1e-3)


def test_an_answer_that_cannot_go_on_ends_alone(llm: LLM) -> None:
    """A way into a rule without an end: it shows only on that way."""
    trap = Grammar.lark('start: "ax" dead | "b"\ndead: dead "c"')
    a, b = llm.tokenizer.encode("a")[0], llm.tokenizer.encode("b")[0]
    assert llm.generate("x", grammar=trap, logit_bias={b: 90.0}).text == "b"
    expected = llm.generate("y", seed=1, max_tokens=20, grammar=SUM)
    (caught,) = llm.begin(llm._encode("x"), Sampling(grammar=trap, logit_bias={a: 90.0}, seed=0))
    (fine,) = llm.begin(llm._encode("y"), Sampling(seed=1, max_tokens=20, grammar=SUM))
    while fine.completion is None:
        llm.step()
    assert isinstance(caught.error, GrammarFailed) and "no text leads on" in str(caught.error)
    assert ids_of([fine.completion]) == ids_of([expected])
    assert llm.scheduler.idle
    with pytest.raises(UsageError, match="no text leads on"):
        llm.generate("x", grammar=trap, logit_bias={a: 90.0})


def test_a_limit_that_is_met_while_generating(llm: LLM) -> None:
    """Many states, one after the other: the answer ends with an error, and the same grammar works for the next one."""
    heavy = Grammar.regex("(.*a.{60}b)")
    (caught,) = llm.begin(llm._encode("x"), Sampling(grammar=heavy, max_tokens=150, seed=0, temperature=5.0))
    constraint = caught.row.constraint
    assert constraint is not None
    constraint.allowed()
    constraint._matcher.consume_token(llm.tokenizer.eos_id)  # nothing it could take: its state is an error
    constraint._bits = None
    llm.step()
    assert isinstance(caught.error, UsageError)
    assert llm.generate("x", grammar=heavy, max_tokens=20, seed=0).usage.completion_tokens == 20


def test_threads_share_a_model(llm: LLM) -> None:
    expected = {name: ids_of([llm.generate("x", grammar=g, seed=4, max_tokens=30)]) for name, g in GRAMMARS.items()}
    results: dict[str, Any] = {}

    def run(name: str) -> None:
        results[name] = ids_of([llm.generate("x", grammar=GRAMMARS[name], seed=4, max_tokens=30)])

    threads = [threading.Thread(target=run, args=[name]) for name in GRAMMARS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected


def test_a_sentencepiece_vocabulary(shared_data: Path, make_model: Callable[..., Path]) -> None:
    """Tokens that begin with a space, bytes that are tokens too, and the space that a chat would drop."""
    small = tokenizer.load(shared_data / "tokenizers" / "ggml-vocab-llama-spm.gguf")
    grammars = Grammars(small)
    for grammar, text in (
        (Grammar.regex("[a-z 日é\n]+"), "the day 日é\n"),
        (GRAMMARS["schema"], '{"name": "Ж", "age": 3}'),
    ):
        grammars.check(grammar)
        assert accepts(grammars, small, grammar, text)
    for seed in range(5):
        text = walk(grammars, small, GRAMMARS["compact"], seed, ends=9.0)
        assert text is None or jsonschema.validate(json.loads(text), PERSON) is None
    with LLM(make_model(small=small)) as llm:
        answer = llm.chat([{"role": "user", "content": "Hi"}], grammar=Grammar.choice([" yes", " no"]), max_tokens=20)
        assert (answer.text in (" yes", " no"), answer.finish_reason) == (True, "stop")
