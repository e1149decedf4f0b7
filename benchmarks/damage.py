"""Damaged files: flipped bits, changed bytes, lost ends."""

from __future__ import annotations

import random


def damaged(content: bytes, seed: int) -> bytes:
    """Return the content with some bytes flipped or zeroed, or without its end."""
    draw = random.Random(seed)
    damage = bytearray(content)
    at = draw.randrange(len(damage))
    if seed % 3 == 0:
        damage[at] ^= 1 << draw.randrange(8)
    elif seed % 3 == 1:
        n = min(draw.choice((1, 16, 512, 4096)), len(damage) - at)
        damage[at : at + n] = bytes(b ^ 0xA5 for b in damage[at : at + n])
    else:
        del damage[at:]
    return bytes(damage)
