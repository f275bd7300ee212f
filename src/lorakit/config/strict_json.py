"""JSON that means one thing only: read without guessing, written the same way every time.

Guarantees of `loads`: the size and the nesting are bounded before anything is parsed; a key that occurs twice,
NaN, infinity, a number that overflows and half a surrogate pair are errors; every rejection is an
`AdapterFormatError` that says where. Guarantees of `dumps`: equal objects give equal bytes, whatever the hash
seed.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from typing import Any

from lorakit.errors import AdapterFormatError, ConfigError

_BRACKETS = frozenset(b"[]{}")
_NOT_STRUCTURE = bytes(sorted(set(range(256)) - _BRACKETS - {ord('"')}))
_TO_ZERO = bytes.maketrans(b"123456789", b"0" * 9)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_OTHER_UNICODE = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_INT_LETTERS = 20  # -2**63 has this many


def loads(data: bytes | str, *, where: str, max_bytes: int = 1 << 20, max_depth: int = 32) -> Any:
    """Parse JSON from an untrusted source.

    Args:
        data: UTF-8 bytes, with or without a byte-order mark, or text.
        where: the file (and field) that the data is from; every message opens with it.
        max_bytes: the longest input that is looked at.
        max_depth: the deepest nesting of lists and objects that is certainly accepted; a nesting more than twice
            as deep is certainly refused.

    Raises:
        AdapterFormatError: too long, too deep, not UTF-8, not JSON, or with duplicate keys, NaN, infinity,
            integers beyond 64 bits or broken surrogate pairs.
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if len(raw) > max_bytes:
        raise AdapterFormatError(f"{where}: {len(raw):,} bytes of JSON, at most {max_bytes:,} are read")
    text = _decoded(raw, where)
    _check_depth(raw, max_depth, where)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer if _may_be_long(raw) else None,
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise AdapterFormatError(
            f"{where}: not valid JSON at {place}: {error.msg}; mend or restore it"
        ) from None
    except ValueError as error:
        raise AdapterFormatError(f"{where}: {error}") from None
    if _SURROGATE.search(text):
        _check_surrogates(value, where)
    return value


def dumps(obj: object) -> bytes:
    r"""Write JSON as UTF-8: keys sorted, two spaces of indent, sets as sorted lists, a newline at the end.

    Raises:
        ConfigError: a value that JSON cannot hold (NaN, infinity, an object, a set of unlike things).
    """
    try:
        text = json.dumps(
            obj, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False, default=_sorted_list
        )
        return (text + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot be written as JSON: {error}") from None


def _decoded(raw: bytes, where: str) -> str:
    if raw.startswith(_OTHER_UNICODE) or b"\0" in raw[:4]:
        raise AdapterFormatError(f"{where}: encoded as UTF-16 or UTF-32 (or not text); save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AdapterFormatError(
            f"{where}: not UTF-8 text, byte {error.start} is 0x{raw[error.start]:02x}; save it as UTF-8"
        ) from None


def _check_depth(raw: bytes, max_depth: int, where: str) -> None:
    """Peel matching brackets off from the inside, one level a round, all at C speed."""
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = b"".join(bare.translate(None, _NOT_STRUCTURE).split(b'"')[::2])
    for _ in range(max_depth):
        peeled = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if len(peeled) == len(brackets):
            break
        brackets = peeled
    if len(brackets) > max_depth:  # a few unmatched ones are left for the parser, which tells their place
        raise AdapterFormatError(
            f"{where}: lists and objects nested more than {max_depth} deep, or brackets that do not match"
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = sorted({key for key, _ in pairs if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
        names = ", ".join(ascii(key[:80]) for key in twice[:5])
        raise ValueError(f"the key {names} occurs more than once in one object; keep one of them")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number; write a finite one")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large; write a finite one")
    return number


def _may_be_long(raw: bytes) -> bool:
    """Whether any integer may be too long: as a rule none is, and then the parser need not ask about each."""
    return b"0" * _INT_LETTERS in raw.translate(_TO_ZERO)


def _integer(text: str) -> int:
    if len(text) > _INT_LETTERS:
        raise ValueError(f"the integer {text[:40]}... is longer than 64 bits")
    return int(text)


def _check_surrogates(value: object, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise AdapterFormatError(
            f"{where}: a text holds half of a surrogate pair (\\ud800 ... \\udfff)"
        ) from None


def _sorted_list(value: object) -> list[Any]:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
