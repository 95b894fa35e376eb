"""Makes answers follow a grammar: which tokens may come next, as a mask on a row of logits, for every backend.

llguidance compiles a grammar against the model's own tokens and says for each position which of them can still lead to
a sentence. A control token never can, whatever the grammar says; stop tokens come in exactly where the grammar is
complete. Where the next bytes are certain, their usual tokens are the only ones allowed.

Every answer has a matcher of its own, so that what one takes of llguidance's limits is nobody else's. It is compiled
beside the batch, and what the masks of a request may take of the processor is bounded: others wait for them.
"""

from __future__ import annotations

import importlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from herd.engine.grammar import MAX_BYTES, MAX_DEPTH, Grammar
from herd.engine.grammar_trial import compiled, compiling, trial
from herd.errors import MissingDependency, UsageError

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer

__all__ = ["MAX_BYTES", "MAX_DEPTH", "Constraint", "Grammar", "GrammarFailed", "Grammars"]

# For each byte of bits, what is added to the logits of its eight tokens: one look-up for eight, whatever is allowed.
_ALLOWED = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_PENALTIES = np.where(_ALLOWED, 0.0, -np.inf).astype(np.float32)

Bits = npt.NDArray[np.uint8]
"""A bit for each token, the first of a byte the lowest."""

REMEMBERED = 256
"""Grammars that are known to compile, at most."""
_LOOK_AHEAD = 8  # tokens of a grammar that are tried before any answer begins
# Processor time of masks: so much for each token (0.1 ms are usual, 0.5 ms many), and so much beyond that for all
# answers of a request together.
# A grammar such as "start: s; s: s s | /[a-z]/" takes longer with every token: 0.04 s for the 36th.
TOKEN_S, BEYOND_S = 0.005, 0.25

_DEAD_END = "NoExtension"  # begins llguidance's message
_SLOW = "masks take too long"  # as if it were one of llguidance's
# What its messages about its limits begin with or contain, and what is too large then.
_TOO_LARGE = {
    "too many expressions": "its regular expressions and repetitions",
    "too many states": "its regular expressions and repetitions",
    "lexer precomputation failed": "its regular expressions and repetitions",
    "fuel exhausted": "its regular expressions and repetitions",
    "Unable to determine if regex is empty": "its regular expressions together",
    "(grammar) too big": "its terminals",
    "Too many items": "the number of its alternatives at one place",
    "items; max is": "the number of its alternatives at one place",
    "schema too large": "the number of its combinations",
    "stack level": "the depth of its combinations",
    "grammar size": "the number of its rules",
    _SLOW: "the number of ways to read a text by it",
}


class GrammarFailed(UsageError):
    """A grammar cannot be compiled or followed. `rows`: those of a batch that end by it, while generating."""

    def __init__(self, grammar: Grammar, message: str, rows: Iterable[int] = ()) -> None:
        self.grammar, self.message, self.rows = grammar, message, list(rows)
        what, fix = f"this {grammar.kind} cannot be followed: {_plain(message)}", None
        for part, large in _TOO_LARGE.items():
            if part in message:
                what, fix = f"this {grammar.kind} is too large: {large}", "shorten it, or ask for less at a time"
        super().__init__(what, value=grammar.text, fix=fix)


class Grammars:
    """Compiles grammars for one tokenizer. Several threads may use it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocabulary = tokenizer.vocab_size
        self._tokenizer = tokenizer
        self._compiler: Any = None
        self._building = threading.Lock()
        self._lock = threading.Lock()
        self._known: OrderedDict[Grammar, None] = OrderedDict()  # used last at the end
        self._content = _packed(self.vocabulary, set(range(self.vocabulary)) - set(tokenizer.specials.values()))

    def check(self, grammar: Grammar) -> None:
        """Compile a grammar, unless that was done before. It takes milliseconds, and some two seconds at the most.

        Raises UsageError for one that llguidance does not take, that is too large, or that no answer can follow;
        MissingDependency without llguidance.
        """
        with self._lock:
            if grammar in self._known:
                self._known.move_to_end(grammar)
                return
        compiler = self._tokens()
        message = trial.error(_source(grammar))
        if message is None:
            raise UsageError(
                f"this {grammar.kind} takes too long or too much memory to compile",
                value=grammar.text,
                fix="shorten it, above all what is nested, repeated or combined",
            )
        if message:
            raise GrammarFailed(grammar, message)
        self._look_ahead(grammar, compiled(compiler, _source(grammar)))
        with self._lock:
            self._known[grammar] = None
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)

    def start(self, grammar: Grammar, *, later: bool = False) -> Future[Any]:
        """A matcher at the beginning of a grammar, for one answer alone: it comes from another thread.

        What is wanted `later` comes when nothing else is left to be compiled.
        """
        return compiling(self._tokens(), _source(grammar), later=later)

    def _look_ahead(self, grammar: Grammar, matcher: Any) -> None:
        """Go some tokens into a grammar: most that are too large meet a limit there."""
        for i in range(_LOOK_AHEAD):
            try:
                ids = np.flatnonzero(np.unpackbits(self.next_tokens(grammar, matcher), bitorder="little"))
            except GrammarFailed as error:
                if i and error.message.startswith(_DEAD_END):
                    return  # other ways may lead on
                raise
            if not len(ids):
                return
            matcher.consume_token(int(ids[len(ids) // 2]))

    def next_tokens(self, grammar: Grammar, matcher: Any) -> Bits:
        """A bit for each token that may come next. Raises GrammarFailed where there is none, or a limit was met."""
        words = np.empty(len(self._content) // 4, np.uint32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if matcher.is_error():
            raise GrammarFailed(grammar, matcher.get_error())
        bits = words.view(np.uint8)
        bits &= self._content
        if not bits.any() and not matcher.is_accepting():
            raise GrammarFailed(grammar, _DEAD_END)
        return bits

    def _tokens(self) -> Any:
        """llguidance's view of the vocabulary, made with the first grammar (0.3 to 2 s for 128,256 tokens)."""
        with self._building:
            if self._compiler is None:
                try:
                    llguidance = importlib.import_module("llguidance")
                except ImportError:
                    raise MissingDependency("llguidance", extra="serve") from None
                self._compiler = llguidance.LLTokenizer(_Tokens(self._tokenizer), eos_token=self._tokenizer.eos_id)
            return self._compiler


class _Tokens:
    """A tokenizer as llguidance asks for it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.vocabulary.encode_continuation
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids: list[int] = []
        for i in tokenizer.specials.values():
            self.tokens[i] = b"\xff control %d" % i  # the first byte marks it; no grammar can spell such a name

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class Constraint:
    """Where one answer stands in its grammar."""

    def __init__(
        self, grammars: Grammars, grammar: Grammar, stop_ids: Iterable[int], beside: Constraint | None = None
    ) -> None:
        """`stop_ids` end the answer: they may come where the grammar is complete.

        `beside`: that of another answer to the same request.
        """
        self._grammars = grammars
        self._grammar = grammar
        self._stop_ids = frozenset(stop_ids)
        self._ends = _packed(grammars.vocabulary, [i for i in self._stop_ids if i < grammars.vocabulary])
        self._coming: Future[Any] | None = None
        self._matcher: Any = None
        self._bits: Bits | None = None
        self._failure: GrammarFailed | None = None
        self._spent: _Spent = _Spent() if beside is None else beside._spent
        self._unpaid = 0.0
        self.mask_s = 0.0
        """Seconds that the last mask took: the next one is not likely to be cheaper."""
        self.sat_out = 0
        """Steps of the batch for which it has waited for its next mask."""

    def prepare(self, *, later: bool = False) -> bool:
        """Have the grammar compiled, unless that was done; whether it is, so that `allowed` waits for nothing.

        What goes wrong shows in `allowed`. `later`: when nothing else is left to be compiled.
        """
        if self._coming is None:
            try:
                self._coming = self._grammars.start(self._grammar, later=later)
            except Exception as error:  # no thread can be started, say
                self._coming = Future()
                self._coming.set_exception(error)
        return self._coming.done()

    def wait(self, seconds: float) -> None:
        """Wait until the grammar is compiled or given up, but no longer than that."""
        if self._coming is not None:
            wait([self._coming], seconds)

    def give_up(self) -> None:
        """The answer is not wanted any more: what has not begun to be compiled never will be."""
        if self._coming is not None:
            self._coming.cancel()

    @property
    def complete(self) -> bool:
        """Nothing but the end can follow."""
        return self._matcher is not None and self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def ready(self) -> bool:
        """`allowed` takes no time."""
        return self._bits is not None or self._failure is not None

    def take_unpaid(self) -> float:
        """Seconds of the processor that it took since this was asked for before."""
        unpaid, self._unpaid = self._unpaid, 0.0
        return unpaid

    def allowed(self) -> Bits:
        """A bit for each token that may come next. Raises GrammarFailed when there is none, or a limit was met."""
        if self._failure is not None:
            raise self._failure
        if self._bits is None:
            try:
                self._bits = self._computed()
            except GrammarFailed as error:
                self._failure = error
                raise
        return self._bits

    def _computed(self) -> Bits:
        if self._matcher is None:
            self.prepare()
            assert self._coming is not None
            error = self._coming.exception()
            if error is not None:  # a panic of the compiled library is not even an Exception
                raise GrammarFailed(self._grammar, f"compiling it failed: {error}") from error
            self._matcher = self._coming.result()
        began = time.thread_time()
        try:
            bits = self._grammars.next_tokens(self._grammar, self._matcher)
            if self._matcher.is_accepting():
                bits |= self._ends
        finally:
            self.mask_s = time.thread_time() - began
            self._count(self.mask_s)
        if self._spent.beyond > BEYOND_S:
            raise GrammarFailed(self._grammar, _SLOW)
        return bits

    def _count(self, seconds: float, allowed: float = 0.0) -> None:
        self._unpaid += seconds
        self._spent.beyond = max(0.0, self._spent.beyond + seconds - allowed)

    def masked(self, logits_V: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """A copy of a row of numbers, with -inf for what may not come; rows of the head without a token may not."""
        masked_V = np.take(_PENALTIES, self.allowed(), axis=0).reshape(-1)[: len(logits_V)]
        masked_V += logits_V[: len(masked_V)]
        if len(masked_V) < len(logits_V):
            masked_V = np.pad(masked_V, (0, len(logits_V) - len(masked_V)), constant_values=-np.inf)
        return masked_V

    def commit(self, token_id: int) -> None:
        """Go on behind a token that was chosen. A limit that is met here shows when the next one is asked for."""
        self._bits = None
        if token_id not in self._stop_ids:
            began = time.thread_time()
            self._matcher.consume_token(token_id)
            self._count(time.thread_time() - began, TOKEN_S)


class _Spent:
    """What the answers of one request have taken beyond their time for each token."""

    beyond = 0.0


def _packed(vocabulary: int, ids: Iterable[int]) -> Bits:
    """Bits for some tokens, in whole words of 32 as llguidance has them."""
    bools_V = np.zeros(-(-vocabulary // 32) * 32, np.bool_)
    bools_V[list(ids)] = True
    return np.packbits(bools_V, bitorder="little")


def _plain(message: str) -> str:
    """What llguidance says, in one line without the excerpt of the grammar."""
    if message.startswith(_DEAD_END):
        return "no text leads on from here to its end"
    if "coerce_one_of" in message:
        return "alternatives of a oneOf do not visibly exclude each other; anyOf may do"
    if "special token" in message:
        return "tokens by name or number are no content"
    message = message.rsplit("error: ", 1)[-1].split("\n   1 |")[0]
    return " ".join("".join(c if c.isprintable() else " " for c in message).split())[:300]


def _source(grammar: Grammar) -> str:
    """A grammar as llguidance reads it. Its kind decides how the text is read, never what the text looks like."""
    if grammar.kind == "JSON schema":
        return f'{{"grammars":[{{"json_schema":{grammar.text}}}]}}'
    if grammar.kind == "regular expression":
        matcher = importlib.import_module("llguidance").LLMatcher
        return str(matcher.grammar_from_regex(grammar.text))
    return json.dumps({"grammars": [{"lark_grammar": grammar.text}]})
