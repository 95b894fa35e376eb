"""Quantities in words: seconds, bytes, counts and FLOPs as people read them."""

from __future__ import annotations

_STEPS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `4 min 05 s`, `1 h 02 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(n_bytes: float) -> str:
    """Bytes in powers of 1000: `512 B`, `9.6 MB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{_three(n_bytes / scale)} {unit}"
    return f"{n_bytes:.0f} B"


def count(number: float) -> str:
    """A count with three digits: `950`, `12.3k`, `4.98M`, `1.2B`."""
    for scale, letter in _STEPS:
        if abs(number) >= scale * 0.9995:
            return f"{_three(number / scale)}{letter}"
    return f"{number:.0f}"


def counted(number: int, noun: str) -> str:
    """`1 document`, `1,200 documents`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def scientific(number: float, digits: int = 2) -> str:
    """`1.23 × 10¹⁴`."""
    if number == 0:
        return "0"
    mantissa, exponent = f"{number:.{digits}e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def _three(value: float) -> str:
    """Three significant digits without an exponent: 1.23, 12.3, 123."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
