"""The tiktoken file of Llama 3 and 4 (`tokenizer.model`): a line per token, its bytes in base64, a space, its rank."""

from __future__ import annotations

import binascii
from base64 import b64encode
from pathlib import Path

from herd.errors import FileFormatError


def read_ranks(data: bytes, path: Path) -> dict[bytes, int]:
    """Parse the file. Every line is checked: strict base64, ranks 0, 1, 2 … in order, no token twice.

    Raises `FileFormatError` with the line's number and offset.
    """
    ranks: dict[bytes, int] = {}
    offset = 0
    for line in data.splitlines(keepends=True):
        if not line.strip() and offset + len(line) == len(data):
            break  # a last, empty line
        problem = "the line is not 'base64 rank'"
        try:
            encoded, number = line.split()
            token = binascii.a2b_base64(encoded, strict_mode=True)
            rank = int(number)
            if not token:
                problem = "the token is empty"
            elif rank != len(ranks) or not number.isdigit():
                problem = f"the rank should be {len(ranks)}"
            elif token in ranks:
                problem = f"the token is that of rank {ranks[token]} again"
            else:
                ranks[token] = rank
                offset += len(line)
                continue
        except ValueError:  # binascii.Error is one
            pass
        raise FileFormatError(
            problem, file=path, field=f"line {len(ranks) + 1}", offset=offset, value=line[:80].decode("latin-1").strip()
        )
    return ranks


def write_ranks(ranks: dict[bytes, int]) -> bytes:
    """The file's content for ranks 0 … n-1."""
    return b"".join(b64encode(token) + b" %d\n" % ranks[token] for token in sorted(ranks, key=ranks.__getitem__))
