"""`herd.LLM`: a model you can generate, stream, chat, score and embed with. One face over every backend.

The smallest use is `LLM("runs/pocket").generate("def", max_tokens=32).text`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack, cast, get_args, overload

import numpy as np
import numpy.typing as npt

from herd.engine.backend import Backend, BackendOptions, CacheFull, EngineClosed, KvType, checked_cpus, open_backend
from herd.engine.constraint import Grammars
from herd.engine.live_sequence import LiveSequence
from herd.engine.prompts import Prompt, Prompts, check_ids, n_bytes, several_of
from herd.engine.request import DEFAULT_MAX_TOKENS, Chunk, Completion, Sampling, SamplingOptions, Score, check_whole
from herd.engine.sampler import fold_seed, fresh_seed
from herd.engine.scheduler import Scheduler
from herd.engine.scoring import Windows
from herd.engine.speculation import open_drafter
from herd.engine.text import StreamDecoder
from herd.errors import ContextLengthExceeded, HerdError, UsageError

if TYPE_CHECKING:
    from herd.architecture import LlamaConfig
    from herd.tokenizer import Message, Tokenizer

T = TypeVar("T")


class LLM:
    """A loaded model with its tokenizer.

    path: a checkpoint directory, a GGUF file, a run directory, or a pulled repository.
    quant: how weights are held in memory: a number format or mix ("bf16", "q8_0", "q4_k_m", …); None: as they are
        stored. The torch backend knows "f32" (None) and "bf16".
    ctx: tokens of context, at most the model's own (None: all of it).
    threads: CPU threads (None: all that this process may use).
    kv: how the cache is held, "bf16", "f32" or "int8" (not in torch).
    backend: "native", "torch", or "auto": torch if it has a GPU and what is asked for, else the first installed.
    draft: what guesses the next tokens, for the model to check several at once: "ngram" (what followed the same tokens
        before), or a smaller model of the same vocabulary. On the native backend results do not change.
    cpus: processors to bind the native backend's threads to, one each; the calling thread, their first, is left alone.
    page_tokens: tokens of a page of the native backend's cache, a multiple of 16: prompts share whole pages.
    memory: bytes that weights, cache and working space take together at most (None: what is free); what they may take
        then is the attribute of this name.

    Raises UsageError for a wrong argument, HerdError for a path that is no model, ResourceError before loading when
    memory will not do, MissingDependency when no backend is installed.
    Several threads may call one LLM; their sequences share the batch. Times in the results are wall clock.
    """

    def __init__(
        self,
        path: str | Path,
        quant: str | None = None,
        ctx: int | None = None,
        threads: int | None = None,
        kv: KvType | str = "bf16",
        backend: str = "auto",
        draft: str | Path | None = None,
        cpus: Sequence[int] = (),
        page_tokens: int = 64,
        memory: int | None = None,
    ) -> None:
        from herd import checkpoint, tokenizer

        if kv not in get_args(KvType):
            raise UsageError("unknown cache type", value=kv, allowed=", ".join(get_args(KvType)))
        ctx = None if ctx is None else check_whole("ctx", ctx, 1, 1 << 30)
        threads = None if threads is None else check_whole("threads", threads, 1, 4096)
        memory = None if memory is None else check_whole("memory", memory, 0, 1 << 60)
        page_tokens = check_whole("page_tokens", page_tokens, 16, 4096)
        if page_tokens % 16:
            raise UsageError("a page has whole tiles of 16 tokens", value=page_tokens, allowed="a multiple of 16")
        resolved = checkpoint.resolve(str(path))
        how = (quant, ctx, threads, cast("KvType", kv), checked_cpus(cpus), page_tokens)
        options = BackendOptions(resolved, *how, memory=memory)
        self._backend: Backend | None = open_backend(backend, options)
        self.path: Path = resolved
        try:
            self.tokenizer: Tokenizer = tokenizer.load(resolved)
            self._drafter = (
                None if draft is None else open_drafter(draft, self._backend, self.tokenizer, backend, options)
            )
        except BaseException:
            self._backend.close()  # what the caller tries next needs its memory
            raise
        self._grammars = Grammars(self.tokenizer)
        self.memory = self._backend.memory + (0 if self._drafter is None else self._drafter.memory)
        parts = (self.tokenizer.stop_ids, self.tokenizer.vocab_size, self._drafter, self._grammars)
        self._scheduler = Scheduler(self._backend, *parts)
        self._adapters: dict[str, object] = {}  # by name, something that no other adapter has
        self._lock = threading.RLock()

    @property
    def config(self) -> LlamaConfig:
        """The model's shape."""
        return self._open().config

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self._open().context

    def close(self) -> None:
        """Free the model; a second call does nothing. Running streams end with an error."""
        with self._lock:
            if self._backend is not None:
                self._scheduler.abort(EngineClosed())
                self._backend.close()
                self._backend = None
                if self._drafter is not None:
                    self._drafter.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def load_adapter(self, path: str | Path, name: str) -> None:
        """Load a low-rank adapter (a directory as PEFT writes it) for requests that say `adapter=name`.

        Raises FileFormatError when it does not fit the model, UsageError when the name is taken.
        """
        from herd.checkpoint import read_adapter

        with self._lock:
            if not isinstance(name, str) or name in self._adapters:
                raise UsageError("this is no name for a new adapter", value=name, allowed="a text that is not in use")
            self._open().load_adapter(name, read_adapter(path, self.config))
            self._adapters[name] = object()

    def unload_adapter(self, name: str) -> None:
        """Free an adapter. Raises UsageError when there is none of this name, or while requests with it run."""
        with self._lock:
            self._check_adapter(name)
            if self._scheduler.uses_adapter(name):
                raise UsageError(
                    "requests with this adapter are running", value=name, fix="let them end, or close them"
                )
            self._open().unload_adapter(name)
            del self._adapters[name]

    @overload
    def generate(self, prompt: Prompt, *, n: Literal[1] = 1, **options: Unpack[SamplingOptions]) -> Completion: ...

    @overload
    def generate(
        self, prompt: Prompt, *, n: int, **options: Unpack[SamplingOptions]
    ) -> Completion | list[Completion]: ...

    @overload
    def generate(self, prompt: Prompts, *, n: int = 1, **options: Unpack[SamplingOptions]) -> list[Completion]: ...

    def generate(self, prompt: Prompt | Prompts, *, n: int = 1, **options: Any) -> Completion | list[Completion]:
        """Continue one prompt or many; returns one Completion for one prompt, a list in the same order for a list.

        A text is encoded with BOS in front and never yields control tokens; a list of ints is taken as token ids as
        they are. `options` are the fields of `Sampling`. With n > 1 the result is a list of n completions for each
        prompt, one prompt after the other; a prompt is computed once for all n.
        Raises ContextLengthExceeded when a prompt (and max_tokens, where given) does not fit: nothing is ever cut.
        """
        sampling = Sampling.from_options(options)
        n = check_whole("n", n, 1, 1024)
        prompts, single = self._prompts(prompt)
        completions = self._run(prompts, sampling, n, continues_text=True)
        return completions[0] if single and n == 1 else completions

    def stream(self, prompt: Prompt, **options: Unpack[SamplingOptions]) -> Generator[Chunk, None, None]:
        """Continue one prompt, token by token. The chunks' texts join to the text `generate` gives.

        Arguments are checked at once, work begins with the first chunk asked for; closing the iterator ends the work.
        """
        sampling = Sampling.from_options(options)
        prompts, single = self._prompts(prompt)
        if not single:
            raise UsageError("a stream is one completion of one prompt", fix="use generate for several")
        return self._stream(prompts[0], sampling, continues_text=True)

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        stream: Literal[False] = False,
        n: Literal[1] = 1,
        **options: Unpack[SamplingOptions],
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        stream: Literal[False] = False,
        n: int,
        **options: Unpack[SamplingOptions],
    ) -> Completion | list[Completion]: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        stream: Literal[True],
        **options: Unpack[SamplingOptions],
    ) -> Generator[Chunk, None, None]: ...

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        stream: bool = False,
        n: int = 1,
        **options: Any,
    ) -> Any:
        """Answer a dialogue in the model's own chat format; a Completion, or an iterator of chunks with `stream`.

        With n > 1 a list of n answers; the dialogue is computed once for all of them. Contents never become control
        tokens, whatever they contain. `options` as for `generate`.
        """
        sampling = Sampling.from_options(options)
        n = check_whole("n", n, 1, 1024)
        if stream and n > 1:
            raise UsageError("a stream is one answer", value=f"n={n}", fix="leave stream out, or n")
        ids = self._check_ids(self.chat_ids(messages, tools))
        if stream:
            return self._stream(ids, sampling, continues_text=False)
        answers = self._run([ids], sampling, n, continues_text=False)
        return answers[0] if n == 1 else answers

    def chat_ids(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """The prompt that `chat` sends: the dialogue's token ids, up to where the assistant begins."""
        encoded = self.tokenizer.encode_dialog(
            list(messages), tools=None if tools is None else list(tools), add_generation_prompt=True
        )
        return list(encoded.ids)

    @overload
    def score(self, texts: Prompt, *, overlap: int | None = None, adapter: str | None = None) -> Score: ...

    @overload
    def score(self, texts: Prompts, *, overlap: int | None = None, adapter: str | None = None) -> list[Score]: ...

    def score(
        self, texts: Prompt | Prompts, *, overlap: int | None = None, adapter: str | None = None
    ) -> Score | list[Score]:
        """How likely each text is, token by token. A text gets BOS in front; ids are taken as they are.

        A text longer than the context raises ContextLengthExceeded, unless `overlap` says how many tokens of what came
        before each further window of the text sees at least; then any length is scored, every token once.
        `adapter`: the name of one that is loaded.
        """
        sequences, single = self._prompts(texts)
        if overlap is None:
            self._check_fit(sequences)
        windows = Windows(sequences, self.context, overlap)
        vocabulary = min(self.tokenizer.vocab_size, self.config.vocab_size)
        beyond = next((i for ids in sequences for i in ids if i >= vocabulary), None)
        if beyond is not None:
            raise UsageError("this row of the head stands for no token", value=beyond, allowed=f"0 to {vocabulary - 1}")
        with self._lock:
            if adapter is not None:
                self._check_adapter(adapter)
            results = self._with_room(lambda backend: backend.score(windows.tokens, vocabulary, adapter))
        logprobs = windows.joined(results)
        scores = [
            Score(ids[1:], logprobs_i, n_bytes(self.tokenizer, text, ids))
            for ids, logprobs_i, text in zip(sequences, logprobs, [texts] if single else texts, strict=True)
        ]
        return scores[0] if single else scores

    def embed(
        self, texts: Prompt | Prompts, *, normalise: bool = False, adapter: str | None = None
    ) -> npt.NDArray[np.float32]:
        """Mean of the final hidden states over a text's tokens (BOS included): [D] for one text, [N, D] for a list.

        With `normalise` every vector has length 1. `adapter`: the name of one that is loaded. Raises
        ContextLengthExceeded for a text that does not fit.
        """
        sequences, single = self._fitting(texts)
        with self._lock:
            if adapter is not None:
                self._check_adapter(adapter)
            vectors_ND = self._with_room(lambda backend: backend.embed(sequences, adapter))
        if normalise:
            vectors_ND = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        return cast("npt.NDArray[np.float32]", vectors_ND[0] if single else vectors_ND)

    def embed_in_pieces(self, ids: Sequence[int]) -> Generator[None, int, npt.NDArray[np.float32]]:
        """`embed` of one prompt of token ids, bit for bit, for a caller that drives the batch itself with `step`.

        Each `send(n)` computes up to n more tokens, and may come between steps; the last returns the vector. Room for
        all of it is held until then, or until `close()`. Raises CacheFull where there is not so much room: whether the
        batch makes way (`Scheduler.make_way`) is the caller's to decide.
        """
        (prompt,) = self._fitting([list(ids)])[0]
        with self._lock:
            return self._open().embed_in_pieces(prompt)

    def _with_room(self, work: Callable[[Backend], T]) -> T:
        """Run something that needs room in the cache; where streams hold it all, they give way and go on later."""
        try:
            return work(self._open())
        except CacheFull:
            self._scheduler.make_way()
            return work(self._open())

    def _open(self) -> Backend:
        if self._backend is None:
            raise EngineClosed()
        return self._backend

    def begin(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        n: int = 1,
        continues_text: bool = True,
        on_chunk: Callable[[int, Chunk], None] | None = None,
        salt: str = "",
    ) -> list[LiveSequence]:
        """Queue n completions of one prompt of token ids, for a caller that drives the batch itself with `step`.

        `on_chunk` gets the completion's number with each token; `continues_text` is False for answers in a chat. What
        was computed for another `salt` is not taken for the beginning of a prompt.
        Raises UsageError and ContextLengthExceeded before anything is queued. A grammar is not tried once more, as that
        may take a second in which the batch stands still: `max_tokens` has done so, or what it says is not known here.
        """
        ids = self._check_ids(prompt)
        max_tokens = self.max_tokens(ids, replace(sampling, grammar=None))
        seed = fresh_seed() if sampling.seed is None else sampling.seed
        sequences: list[LiveSequence] = []
        with self._lock:
            self._open()
            if sampling.adapter is not None:
                self._check_adapter(sampling.adapter)  # it may have been unloaded meanwhile
            for j in range(n):
                sequences.append(
                    self._scheduler.add(
                        ids,
                        sampling,
                        decoder=self._decoder(sampling, continues_text),
                        max_tokens=max_tokens,
                        seed=fold_seed(seed, j),
                        leader=sequences[0] if j else None,
                        on_chunk=None if on_chunk is None else partial(on_chunk, j),
                        salt=salt,
                    )
                )
        return sequences

    def step(self) -> None:
        """One step of the shared batch, if there is any. What goes wrong ends all its sequences, and is raised."""
        with self._lock:
            self._open()
            if not self._scheduler.idle:
                self._scheduler.step()

    def cancel(self, sequences: Iterable[LiveSequence]) -> None:
        """End sequences now, with what they have; those that have ended stay as they are."""
        with self._lock:
            for sequence in sequences:
                self._scheduler.cancel(sequence)

    @property
    def backend(self) -> Backend:
        """What computes."""
        return self._open()

    @property
    def scheduler(self) -> Scheduler:
        """The batch, for a caller that drives it; only one thread may."""
        return self._scheduler

    def _run(self, prompts: list[list[int]], sampling: Sampling, n: int, *, continues_text: bool) -> list[Completion]:
        for prompt in prompts:
            self.max_tokens(prompt, sampling)  # raises before any work
        sequences: dict[int, list[LiveSequence]] = {}
        try:
            with self._lock:
                # Longest first: the cache gets its final shape at once, and prompts of like length enter together.
                for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
                    sequences[i] = self.begin(prompts[i], sampling, n=n, continues_text=continues_text)
            for sequence in chain.from_iterable(sequences.values()):
                while sequence.completion is None:
                    self._advance(sequence)
        finally:
            self.cancel(chain.from_iterable(sequences.values()))
        return [cast(Completion, sequence.completion) for i in range(len(prompts)) for sequence in sequences[i]]

    def _stream(self, prompt: list[int], sampling: Sampling, *, continues_text: bool) -> Generator[Chunk, None, None]:
        self.max_tokens(prompt, sampling)  # raises here, not at the first chunk
        if sampling.seed is None:
            sampling = replace(sampling, seed=fresh_seed())

        adapter = self._adapters.get(sampling.adapter or "")

        def chunks_as_they_come() -> Generator[Chunk, None, None]:
            chunks: deque[Chunk] = deque()
            if sampling.adapter in self._adapters and self._adapters[sampling.adapter] is not adapter:
                raise UsageError("another adapter has this name since the stream was made", value=sampling.adapter)
            (sequence,) = self.begin(
                prompt, sampling, continues_text=continues_text, on_chunk=lambda _, chunk: chunks.append(chunk)
            )
            try:
                while True:
                    while chunks:
                        chunk = chunks.popleft()
                        yield chunk
                        if chunk.finish_reason is not None:
                            return
                    self._advance(sequence)
            finally:
                self.cancel([sequence])

        return chunks_as_they_come()

    def _decoder(self, sampling: Sampling, continues_text: bool) -> StreamDecoder:
        """Text that goes on or follows a grammar keeps the space that a token begins with; a chat's answer drops it."""
        keep = continues_text or sampling.grammar is not None
        return self.tokenizer.stream(skip_specials=sampling.skip_specials, keep_first_space=keep)

    def _advance(self, sequence: LiveSequence) -> None:
        """One step of the shared batch, unless another caller's step has finished `sequence` meanwhile."""
        with self._lock:
            if sequence.error is not None:
                if isinstance(sequence.error, HerdError):
                    raise sequence.error
                raise HerdError("generation stopped: a step of the shared batch failed") from sequence.error
            if sequence.completion is None:
                self._scheduler.step()

    def _prompts(self, prompt: Prompt | Prompts) -> tuple[list[list[int]], bool]:
        """Token ids of each prompt, and whether it was a single one."""
        several, single = several_of(prompt)
        return [self._encode(p) if isinstance(p, str) else self._check_ids(p) for p in several], single

    def _fitting(self, texts: Prompt | Prompts) -> tuple[list[list[int]], bool]:
        """The same, of prompts that fit in the context."""
        sequences, single = self._prompts(texts)
        self._check_fit(sequences)
        return sequences, single

    def _check_fit(self, sequences: Sequence[Sequence[int]]) -> None:
        for ids in sequences:
            if len(ids) > self.context:
                raise self._too_long(len(ids))

    def _encode(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_id
        ids = list(self.tokenizer.encode(text))
        return self._check_ids(ids if bos is None else [bos, *ids])

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        return check_ids(ids, self.config.vocab_size)

    def max_tokens(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """How many tokens an answer may have. Raises what is wrong with a request, before anything runs."""
        needed = len(prompt) + (sampling.max_tokens or 1)
        if needed > self.context:
            raise self._too_long(needed)
        if sampling.adapter is not None:
            self._check_adapter(sampling.adapter)
        last = self.config.vocab_size - 1
        if (biased := max(sampling.logit_bias or (), default=0)) > last:
            raise UsageError("logit_bias names a token the model does not have", value=biased, allowed=f"0 to {last}")
        if sampling.grammar is not None:
            self._grammars.check(sampling.grammar)
        return sampling.max_tokens or min(DEFAULT_MAX_TOKENS, self.context - len(prompt))

    def _too_long(self, needed: int) -> ContextLengthExceeded:
        return ContextLengthExceeded(needed, self.context, self.config.context_length)

    def _check_adapter(self, name: str) -> None:
        if not isinstance(name, str) or name not in self._adapters:
            known = ", ".join(sorted(self._adapters)) or "none is loaded"
            raise UsageError("no such adapter", value=name, allowed=known)
