"""`herd.LLM` on every backend, with a real tiny model: against transformers, and against itself."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import herd
from herd import LLM, ContextLengthExceeded, HerdError, ResourceError, UsageError, tokenizer
from herd.engine import memory

torch = pytest.importorskip("torch")

CONTEXT = 192
PROMPTS = ["def ", "import os\n\n\ndef main():", "", "class A:\n    x = 1", "日本語 🦙", "return " * 20, "x"]


def ids_of(llm: LLM, text: str) -> list[int]:
    return [llm.tokenizer.bos_id, *llm.tokenizer.encode(text)]


def peer(path: Path):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def greedy_of_transformers(make_model: Callable[..., Path]) -> list[tuple[Path, list[list[int]]]]:
    """Models with grouped heads, tied or not, scaled RoPE; and the tokens after each of PROMPTS, each alone."""
    from herd.architecture import RopeScaling

    changes = [
        {},
        {"tied_embeddings": True, "n_kv_heads": 6, "rope_theta": 500_000.0},
        {"rope_scaling": RopeScaling("llama3", 8.0, original_context=64), "generation": "llama3.1"},
    ]
    results = []
    for change in changes:
        path = make_model(talkative="tied_embeddings" not in change, **change)
        theirs, answers = peer(path), []
        encoder = tokenizer.load(path)
        for prompt in PROMPTS:
            ids = torch.tensor([[encoder.bos_id, *encoder.encode(prompt)]])
            with torch.inference_mode():
                expected = theirs.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False,
                    eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
            answers.append(expected[0, ids.shape[1] :].tolist())
        results.append((path, answers))
    return results


def test_greedy_tokens_equal_transformers(
    greedy_of_transformers: list[tuple[Path, list[list[int]]]], backend: str
) -> None:
    """Ragged prompts in one batch give what transformers gives each alone."""
    for path, expected in greedy_of_transformers:
        with LLM(path, kv="f32", backend=backend) as llm:
            completions = llm.generate(PROMPTS, temperature=0, max_tokens=64, ignore_eos=True)
            assert [completion.token_ids for completion in completions] == expected


def test_bf16_cache_stays_close(tiny: Path, llm: LLM, backend: str) -> None:
    """A cache in bfloat16 (8 bits of mantissa) changes log-probabilities by rounding only."""
    with LLM(tiny, backend=backend) as rounded:
        prompt = llm.generate("def ", temperature=1.0, seed=3, max_tokens=60, ignore_eos=True)
        ids = ids_of(llm, "def ") + prompt.token_ids
        exact = llm.generate(ids, temperature=0, max_tokens=1, top_logprobs=20).top_logprobs
        close = rounded.generate(ids, temperature=0, max_tokens=1, top_logprobs=20).top_logprobs
        assert exact is not None and close is not None
        close_by_id = dict(close[0])
        gaps = [abs(logprob - close_by_id[i]) for i, logprob in exact[0] if i in close_by_id]
        assert len(gaps) > 15 and max(gaps) < 0.05


def test_seeded_requests_repeat_alone_and_in_a_crowd(llm: LLM) -> None:
    options = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "max_tokens": 24}
    crowd = llm.generate(PROMPTS * 4, **options)
    for i, prompt in enumerate(PROMPTS):
        alone = llm.generate(prompt, **options)
        for copy in crowd[i :: len(PROMPTS)]:
            assert copy.token_ids == alone.token_ids and copy.seed == 11
    unseeded = llm.generate("def ", max_tokens=24)
    assert llm.generate("def ", max_tokens=24, seed=unseeded.seed).token_ids == unseeded.token_ids
    assert len({tuple(llm.generate("def ", max_tokens=24).token_ids) for _ in range(4)}) > 1


def test_n_completions_of_one_prompt(llm: LLM) -> None:
    many = llm.generate(PROMPTS[:2], n=5, seed=3, max_tokens=10, temperature=1.0)
    assert len(many) == 10
    assert [c.token_ids for c in many[:5]] == [
        c.token_ids for c in llm.generate(PROMPTS[0], n=5, seed=3, max_tokens=10, temperature=1.0)
    ]
    assert len({tuple(c.token_ids) for c in many[:5]}) > 1
    again = llm.generate(PROMPTS[1], seed=many[7].seed, max_tokens=10, temperature=1.0)
    assert again.token_ids == many[7].token_ids


def test_more_sequences_than_places_and_growth(llm: LLM) -> None:
    """More requests than run at once, long and short mixed: same answers as one by one, in order."""
    prompts = [[llm.tokenizer.bos_id, *range(5, 5 + 1 + i * 37 % 120)] for i in range(300)]
    together = llm.generate(prompts, temperature=0, max_tokens=8)
    for i in range(0, 300, 13):
        assert llm.generate(prompts[i], temperature=0, max_tokens=8).token_ids == together[i].token_ids


def test_prompt_longer_than_a_piece(make_model: Callable[..., Path], backend: str) -> None:
    from herd.engine.scheduler import PREFILL_TOKENS

    path = make_model(context_length=4 * PREFILL_TOKENS, talkative=True)
    ids = [5 + i * 31 % 500 for i in range(2 * PREFILL_TOKENS + 77)]
    with LLM(path, kv="f32", backend=backend) as llm, torch.inference_mode():
        others = llm.generate([ids, ids[:50], ids[:1500]], temperature=0, max_tokens=6)
        theirs = peer(path)
        for prompt, completion in zip([ids, ids[:50], ids[:1500]], others, strict=True):
            expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
            assert completion.token_ids == expected[0, len(prompt) :].tolist()


def test_a_batch_that_grows_while_it_runs(make_model: Callable[..., Path], backend: str) -> None:
    """A running stream keeps what it has when more and longer sequences force the cache into a new shape."""
    path = make_model(context_length=1000, talkative=True)
    with LLM(path, kv="f32", backend=backend) as llm:
        expected = llm.generate("def ", temperature=0, max_tokens=30).text
    with LLM(path, kv="f32", backend=backend) as llm:
        stream = llm.stream("def ", temperature=0, max_tokens=30)
        text = "".join(next(stream).text for _ in range(10))
        others = llm.generate(["import " * 60] * 5, temperature=0, max_tokens=10)
        assert text + "".join(chunk.text for chunk in stream) == expected
        assert len({tuple(c.token_ids) for c in others}) == 1


def test_spaces_of_sentencepiece(make_model: Callable[..., Path], repository: Path, tmp_path: Path) -> None:
    """A continuation keeps the space its first token begins with, an answer in a chat does not: as `decode` has it."""
    import io

    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((repository / "LICENSE").read_text().splitlines()),
        model_writer=written,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    small = tokenizer.load(tmp_path / "tokenizer.model")
    path = make_model(small=small, vocab_size=small.vocab_size, generation="llama2")
    with LLM(path) as llm:
        assert llm.tokenizer.chat_format == "llama2"
        spaces = 0
        for seed in range(30):
            options = {"temperature": 1.0, "seed": seed, "max_tokens": 4, "ignore_eos": True}
            completion = llm.generate("import herd", **options)
            whole = llm.tokenizer.decode(llm.tokenizer.encode("import herd") + completion.token_ids)
            assert whole == "import herd" + completion.text
            spaces += completion.text.startswith(" ")
            answer = llm.chat([{"role": "user", "content": "hello"}], **options)
            assert answer.text == llm.tokenizer.decode(answer.token_ids)
        assert spaces > 3


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.sampled_from(PROMPTS),
    seed=st.integers(0, 10_000),
    max_tokens=st.integers(1, 40),
    stop=st.lists(st.text("aeinrst \n(", min_size=1, max_size=2), max_size=3),
    temperature=st.sampled_from([0.0, 0.8, 1.5]),
)
def test_stream_joins_to_generate(
    llm: LLM, prompt: str, seed: int, max_tokens: int, stop: list[str], temperature: float
) -> None:
    options = {"seed": seed, "max_tokens": max_tokens, "stop": stop, "temperature": temperature, "logprobs": True}
    whole = llm.generate(prompt, **options)
    chunks = list(llm.stream(prompt, **options))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [chunk.token_id for chunk in chunks] == whole.token_ids
    assert [chunk.logprob for chunk in chunks] == whole.logprobs
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [whole.finish_reason]
    last = chunks[-1].completion
    assert last is not None and (last.text, last.token_ids, last.stop) == (whole.text, whole.token_ids, whole.stop)
    assert not any(s in whole.text for s in stop)
    spoken = whole.token_ids[:-1] if isinstance(whole.stop, int) else whole.token_ids
    full = llm.tokenizer.decode(spoken)
    if isinstance(whole.stop, str):
        assert full.startswith(whole.text + whole.stop)
    else:
        assert whole.text == full


def test_interleaved_streams_and_threads(llm: LLM) -> None:
    """Streams taken in turns, a generate in between, and callers in threads: everybody gets his own answer."""
    expected = [llm.generate(p, temperature=0, max_tokens=15, ignore_eos=True) for p in PROMPTS]
    streams = [llm.stream(p, temperature=0, max_tokens=15, ignore_eos=True) for p in PROMPTS]
    texts = [""] * len(PROMPTS)
    for turn in range(15):
        for i, stream in enumerate(streams):
            texts[i] += next(stream).text
        if turn == 5:
            assert llm.generate("x", temperature=0, max_tokens=15, ignore_eos=True).text == expected[-1].text
    assert texts == [completion.text for completion in expected]

    results: dict[int, list[str]] = {}

    def ask(i: int) -> None:
        results[i] = [llm.generate(PROMPTS[i], temperature=0, max_tokens=15, ignore_eos=True).text for _ in range(3)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[i] == [expected[i].text] * 3 for i in range(len(PROMPTS)))


def test_an_abandoned_stream_leaves_nothing_behind(llm: LLM) -> None:
    before = llm.generate("def ", temperature=0, max_tokens=5)
    for taken in range(4):
        stream = llm.stream("def ", max_tokens=100, seed=taken, ignore_eos=True)
        for _ in range(taken):
            next(stream)
        stream.close()
    assert llm._scheduler.idle
    assert llm.generate("def ", temperature=0, max_tokens=5).token_ids == before.token_ids


def test_stop_tokens_and_reasons(llm: LLM) -> None:
    free = llm.generate("def ", temperature=0, max_tokens=30, ignore_eos=True)
    assert (free.finish_reason, free.stop, free.usage.completion_tokens) == ("length", None, 30)
    assert free.usage.total_tokens == free.usage.prompt_tokens + 30
    stop_id = free.token_ids[12]
    first = free.token_ids.index(stop_id)
    cut = llm.generate("def ", temperature=0, max_tokens=30, ignore_eos=True, stop_token_ids=[stop_id])
    assert (cut.finish_reason, cut.stop, cut.token_ids) == ("stop", stop_id, free.token_ids[: first + 1])
    assert cut.text == llm.tokenizer.decode(free.token_ids[:first])
    assert cut.timings.decode_tokens_per_s > 0 and cut.timings.prefill_tokens_per_s > 0
    for stop_id in llm.tokenizer.stop_ids:  # every one of Llama 3's stop tokens ends an answer
        ended = llm.generate("def ", temperature=0, logit_bias={stop_id: 100.0})
        assert (ended.finish_reason, ended.stop, ended.text, ended.token_ids) == ("stop", stop_id, "", [stop_id])


def test_generated_logprobs_equal_scores(llm: LLM) -> None:
    """Decoding through the cache and scoring in one pass agree: train and run see the same probabilities."""
    prompt = ids_of(llm, "def main(")
    completion = llm.generate(prompt, temperature=0.7, max_tokens=40, ignore_eos=True, top_logprobs=3)
    score = llm.score(prompt + completion.token_ids)
    assert completion.logprobs is not None
    np.testing.assert_allclose(completion.logprobs, score.logprobs[len(prompt) - 1 :], atol=2e-5)
    assert completion.top_logprobs is not None and all(len(top) == 3 for top in completion.top_logprobs)


def test_scores_equal_transformers(tiny: Path, llm: LLM) -> None:
    theirs = peer(tiny)
    texts = [*PROMPTS, "a longer text, " * 12]
    for text, score in zip(texts, llm.score(texts), strict=True):
        ids = torch.tensor([ids_of(llm, text)])
        with torch.inference_mode():
            logprobs = torch.log_softmax(theirs(ids).logits[0].double(), dim=-1)
        expected = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
        np.testing.assert_allclose(score.logprobs, expected.numpy(), atol=2e-5)
        assert score.token_ids == ids[0, 1:].tolist() and score.n_bytes == len(text.encode())
        if text:
            assert score.bits_per_byte == pytest.approx(-expected.sum().item() / np.log(2) / len(text.encode()))
    assert llm.score("a\ud800").n_bytes == 4, "a lone surrogate counts as the U+FFFD that is scored in its place"
    by_ids = llm.score([ids_of(llm, text) for text in texts])
    assert [s.n_bytes for s in by_ids] == [s.n_bytes for s in llm.score(texts)]


def test_scoring_in_windows(llm: LLM) -> None:
    """Every token once; each equals the score of its window alone."""
    ids = [5 + i * 17 % 500 for i in range(3 * CONTEXT + 11)]
    with pytest.raises(ContextLengthExceeded):
        llm.score(ids)
    overlap = 50
    score = llm.score(ids, overlap=overlap)
    assert score.token_ids == ids[1:] and len(score.logprobs) == len(ids) - 1
    np.testing.assert_allclose(score.logprobs[: CONTEXT - 1], llm.score(ids[:CONTEXT]).logprobs, atol=1e-5)
    second = llm.score(ids[CONTEXT - overlap : 2 * CONTEXT - overlap]).logprobs
    np.testing.assert_allclose(
        score.logprobs[CONTEXT - 1 : 2 * CONTEXT - overlap - 1], second[overlap - 1 :], atol=1e-5
    )
    exact = llm.score(ids[: CONTEXT + 1], overlap=overlap)
    assert len(exact.logprobs) == CONTEXT


def test_embeddings_are_mean_hidden_states(tiny: Path, llm: LLM) -> None:
    theirs = peer(tiny)
    vectors = llm.embed(PROMPTS)
    for text, vector in zip(PROMPTS, vectors, strict=True):
        with torch.inference_mode():
            hidden = theirs.model(torch.tensor([ids_of(llm, text)])).last_hidden_state[0]
        np.testing.assert_allclose(vector, hidden.mean(0).numpy(), atol=1e-5)
    unit = llm.embed("def ", normalise=True)
    assert unit.shape == (48,) and np.linalg.norm(unit) == pytest.approx(1.0, abs=1e-6)


def test_chat_is_the_chat_format(llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|eot_id|>"}]
    ids = llm.tokenizer.encode_dialog(messages, add_generation_prompt=True).ids
    assert llm.chat_ids(messages) == list(ids) and ids.count(llm.tokenizer.bos_id) == 1
    expected = llm.generate(list(ids), temperature=0, max_tokens=12)
    assert llm.chat(messages, temperature=0, max_tokens=12).token_ids == expected.token_ids
    chunks = llm.chat(messages, stream=True, temperature=0, max_tokens=12)
    assert "".join(chunk.text for chunk in chunks) == expected.text


def test_several_answers_to_one_dialogue(llm: LLM) -> None:
    """Each is what its seed gives alone; the first one's prompt is the others' too."""
    messages = [{"role": "user", "content": "Say something about pages, and about what is on them. " * 2}]
    options = {"temperature": 1.0, "max_tokens": 10, "ignore_eos": True}
    several = llm.chat(messages, n=np.int64(4), seed=3, **options)
    assert len(several) == 4 and len({tuple(answer.token_ids) for answer in several}) > 1
    for answer in several:
        assert answer.token_ids == llm.chat(messages, n=1, seed=answer.seed, **options).token_ids
    assert [answer.timings.reused_tokens for answer in several[1:]] == [len(llm.chat_ids(messages))] * 3
    with pytest.raises(UsageError, match=r"a stream is one answer; got n=2; to fix: leave stream out"):
        llm.chat(messages, stream=True, n=2)


def test_a_full_context_is_an_error_with_both_numbers(llm: LLM) -> None:
    ids = [5] * (CONTEXT - 4)
    assert llm.generate(ids, max_tokens=4, ignore_eos=True, temperature=0).usage.total_tokens == CONTEXT
    rest = llm.generate(ids, ignore_eos=True, temperature=0)
    assert rest.usage.total_tokens == CONTEXT and rest.finish_reason == "length"
    with pytest.raises(ContextLengthExceeded, match=rf"{CONTEXT + 1}.*{CONTEXT}"):
        llm.generate([[5], ids], max_tokens=5)
    with pytest.raises(ContextLengthExceeded, match=rf"{CONTEXT + 1}.*{CONTEXT}"):
        llm.stream([5] * CONTEXT)
    for call in (llm.embed, llm.score):
        with pytest.raises(ContextLengthExceeded):
            call([5] * (CONTEXT + 1))
    assert len(llm.score([5] * CONTEXT).logprobs) == CONTEXT - 1


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.generate([]) == [] and llm.generate([[]]),
        lambda llm: llm.generate([600]),
        lambda llm: llm.generate([[1], [-1]]),
        lambda llm: llm.generate([1.5]),
        lambda llm: llm.generate(5),
        lambda llm: llm.generate("x", n=0),
        lambda llm: llm.chat([{"role": "user", "content": "x"}], n=0),
        lambda llm: llm.generate("x", temprature=0.5),
        lambda llm: llm.generate("x", logit_bias={600: 1.0}),
        lambda llm: llm.stream(["a", "b"]),
        lambda llm: llm.score("x", overlap=0),
        lambda llm: llm.chat([{"role": "nobody", "content": "x"}]),
    ],
)
def test_wrong_calls_are_usage_errors(llm: LLM, call: Callable[[LLM], object]) -> None:
    with pytest.raises(UsageError):
        call(llm)


def free_memory(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    """Let the system say that so much is free."""
    monkeypatch.setattr(memory, "available_bytes", lambda: n_bytes)
    monkeypatch.setattr("herd.engine.native_weights.available_bytes", lambda: n_bytes)


def test_wrong_models_and_arguments(tiny: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"torch": [{"kv": "int8"}, {"quant": "q8_0"}], "native": [{"quant": "q9_k"}]}[backend]
    for wrong in ({"kv": "q3"}, {"ctx": 0}, {"ctx": CONTEXT + 1}, {"threads": 0}, {"quant": "q1"}, *more):
        with pytest.raises(UsageError):
            LLM(tiny, **{"backend": backend, **wrong})
    with pytest.raises(UsageError, match=r"gpu.*auto, native, torch"):
        LLM(tiny, backend="gpu")
    with pytest.raises(HerdError, match="no such model"):
        LLM(str(tiny) + "x", backend=backend)
    with LLM(tiny, ctx=np.int64(64), threads=np.int64(1), backend=backend) as short:
        assert short.context == 64 and type(short.context) is int
        with pytest.raises(ContextLengthExceeded):
            short.generate([5] * 60, max_tokens=5)
        stream = short.stream("def ", max_tokens=20, ignore_eos=True)
        next(stream)
    with pytest.raises(HerdError, match="closed"):
        next(stream)
    with pytest.raises(HerdError, match="closed"):
        short.generate("x")
    short.close()

    free_memory(monkeypatch, 100_000)
    with pytest.raises(ResourceError, match=r"MiB.*free.*to fix: use a smaller model") as caught:
        LLM(tiny, backend=backend)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("context", [192, 65_536])
def test_what_the_error_advises_can_be_loaded(
    make_model: Callable[..., Path], backend: str, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With less and less memory free: the way to load that the error names works with just that memory."""
    path = make_model(dim=256, head_dim=32, ffn_dim=512, context_length=context)
    seen = set()
    free = 1 << 29
    while True:
        free_memory(monkeypatch, free)
        free = int(free * 0.9)
        try:
            LLM(path, backend=backend).close()
        except ResourceError as error:
            assert error.fix is not None
            if error.fix == "use a smaller model":
                break
            advice = dict(re.findall(r'(quant|ctx)="?([a-z0-9_]+)"?', error.fix))
            seen.add(tuple(advice))
            as_options = dict(re.findall(r"--(\w+) (\w+)", error.fix))
            assert as_options == advice, error.fix
            how = {"quant": advice.get("quant"), "ctx": int(advice["ctx"]) if "ctx" in advice else None}
            with LLM(path, backend=backend, **how) as llm:
                assert llm.generate("x", max_tokens=3, ignore_eos=True).usage.completion_tokens == 3
    if context == 192:
        assert seen == {("quant",)}
    else:
        assert seen == ({("ctx",), ("quant", "ctx")} if backend == "native" else {("ctx",)})


def test_plans_are_the_releases_own_figures() -> None:
    """8B: 8.03e9 weights, and 128 KiB of bf16 cache per token."""
    config = herd.releases["llama3.1-8b"].config
    plan = memory.plan_memory(config, weights="f32", kv="bf16", context=131_072, prefill_tokens=1024, rows=1)
    assert plan.weights == 4 * 8_030_261_248 and plan.cache_per_token == 131_072 and plan.cache == 16 << 30


def test_bf16_weights(tiny: Path, llm: LLM, backend: str) -> None:
    with LLM(tiny, quant="bf16", backend=backend) as half:
        exact = llm.score("def main(argv):\n    return 0\n")
        close = half.score("def main(argv):\n    return 0\n")
        np.testing.assert_allclose(close.logprobs, exact.logprobs, atol=0.15)
        assert half.generate("def ", max_tokens=5, temperature=0).usage.completion_tokens > 0


def test_how_likely_a_prompt_was(llm: LLM) -> None:
    """The same as `score` says, in pieces and beside other answers, and whatever is remembered of the prompt."""
    texts = ["def f(x):\n    return x\n" * 4, "def f(x):\n    return x\n" * 4 + "x", PROMPTS[4], "a"]
    options: dict[str, object] = {"max_tokens": 3, "temperature": 0, "prompt_logprobs": True, "top_logprobs": 2}
    for _ in range(2):
        for text, found in zip(texts, llm.generate(texts, **options), strict=True):
            expected = llm.score(text)
            assert found.prompt_logprobs == pytest.approx(expected.logprobs, abs=1e-6)
            assert found.prompt_top_logprobs is not None
            for token_id, logprob, top in zip(
                expected.token_ids, found.prompt_logprobs or [], found.prompt_top_logprobs, strict=True
            ):
                assert len(top) == 2 and top[0][1] >= top[1][1] >= (logprob if token_id not in dict(top) else -1e9)
    first, second = llm.generate(texts[0], n=2, **options)
    assert first.prompt_logprobs == second.prompt_logprobs
    assert llm.generate(texts[0], max_tokens=1).prompt_logprobs is None
