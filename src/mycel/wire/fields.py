"""The fields of a message in protobuf's wire format, read without its description, and strictly."""

from __future__ import annotations

from mycel.errors import ParcelError

Fields = dict[int, list[int | bytes]]
VARINT, EIGHT, COUNTED, FOUR = 0, 1, 2, 5  # protobuf's wire types; groups, long out of use, are refused


def fields(content: bytes) -> Fields:
    """Return the values of each field by its number: whole numbers as they are, everything else as bytes.

    Raises
    ------
    ParcelError
        If the content is not laid out as a message.
    """
    found: Fields = {}
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            value, at = _varint(content, at)
            found.setdefault(number, []).append(value)
            continue
        if kind == COUNTED:
            length, at = _varint(content, at)
        elif kind in {EIGHT, FOUR}:
            length = 8 if kind == EIGHT else 4
        else:
            raise ParcelError(f"field {number} is of the wire type {kind}, which no message has")
        if at + length > len(content):
            raise ParcelError(f"field {number} claims {length:,} bytes, and {len(content) - at:,} are left")
        found.setdefault(number, []).append(content[at : at + length])
        at += length
    return found


def only(found: Fields, number: int) -> int | bytes:
    """Return the value of a field that has to be there, once: of two, readers may take either."""
    values = found.get(number, [])
    if len(values) != 1:
        raise ParcelError(f"field {number} is there {len(values)} times, once is right")
    return values[0]


def inner(found: Fields, number: int) -> Fields:
    """Return the fields of the one message that lies in a field."""
    value = only(found, number)
    if not isinstance(value, bytes):
        raise ParcelError(f"field {number} is a number, a message is right")
    return fields(value)


def varint(number: int) -> bytes:
    """Write a whole number of 64 bits at most: seven bits a byte, the least first."""
    more = [number >> shift & 127 | 128 for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*more[:-1], more[-1] & 127])


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            raise ParcelError("a number is cut off")
        byte, at = content[at], at + 1
        value |= (byte & 127) << shift
        if not byte & 128:
            return value & (1 << 64) - 1, at
    raise ParcelError("a number has more than 64 bits")
