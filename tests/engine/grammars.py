"""Grammars that several tests share, and ways to follow one without a model.

Answers come from logits that are drawn anew for every token, so that all of a grammar is visited.
"""

from __future__ import annotations

import numpy as np

from herd import tokenizer
from herd.engine import Grammar, Sampling
from herd.engine.constraint import Constraint, Grammars
from herd.engine.sampler import SamplerRow, sample

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SUM = Grammar.lark('start: expr\nexpr: expr "+" term | term\nterm: /[0-9]{1,3}/ | "(" expr ")"')
GRAMMARS = {
    "schema": Grammar.json_schema(PERSON),
    "compact": Grammar.json_schema(PERSON, compact=True),
    "regex": Grammar.regex("[a-f]{2,5}(-[0-9]+)?"),
    "choice": Grammar.choice(["yes", "no", "maybe so", "ж"]),
    "lark": SUM,
}


def walk(
    grammars: Grammars, tok: tokenizer.Tokenizer, grammar: Grammar, seed: int, *, longest: int = 100, ends: float = 4.0
) -> str | None:
    """An answer under logits that are noise, with quotes, brackets and stop tokens likelier by `ends`; None if cut."""
    rng = np.random.default_rng(seed)
    row = SamplerRow(Sampling(temperature=1.0, top_p=1.0, grammar=grammar), seed, (), start(grammars, tok, grammar))
    likely = [i for i in range(tok.vocab_size) if tok.token_bytes(i) in (b'"', b"}", b"]", b")")] + list(tok.stop_ids)
    ids: list[int] = []
    for _ in range(longest):
        logits_V = rng.normal(0, 1.5, tok.vocab_size).astype(np.float32)
        logits_V[likely] += ends
        (choice,) = sample(logits_V[None], [row])
        if choice.token_id in tok.stop_ids:
            return tok.decode(ids, keep_first_space=True)
        assert choice.token_id not in tok.specials.values()
        ids.append(choice.token_id)
    return None


def start(grammars: Grammars, tok: tokenizer.Tokenizer, grammar: Grammar) -> Constraint:
    return Constraint(grammars, grammar, tok.stop_ids)


def ids_allowed(constraint: Constraint) -> set[int]:
    """One bit after the other, as the definition says."""
    bits = constraint.allowed().tolist()
    return {8 * i + j for i, byte in enumerate(bits) for j in range(8) if byte >> j & 1}


def accepts(grammars: Grammars, tok: tokenizer.Tokenizer, grammar: Grammar, text: str) -> bool:
    """Whether a text can be written, always with the longest token that is allowed, and may end there."""
    constraint, rest = start(grammars, tok, grammar), text.encode()
    while rest:
        allowed = ids_allowed(constraint) - set(tok.specials.values())
        fitting = [i for i in allowed if rest.startswith(tok.token_bytes(i))]
        if not fitting:
            return False
        token_id = max(fitting, key=lambda i: len(tok.token_bytes(i)))
        rest = rest[len(tok.token_bytes(token_id)) :]
        constraint.commit(token_id)
    return tok.eos_id in ids_allowed(constraint)
