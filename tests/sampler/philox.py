"""Philox 4x32-10 written anew, in Python's integers: what the kernels draw with."""

from __future__ import annotations

_WORD = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _WORD, (a >> 32) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, place: int) -> float:
    """The number in [0, 1) that a row draws with at a place of its seed's stream."""
    seed, place = seed % 2**64, place % 2**64
    words = philox((place & _WORD, place >> 32, 0, 0), (seed & _WORD, seed >> 32))
    return (words[1] << 32 | words[0]) / 2**64
