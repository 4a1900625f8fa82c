"""Spellings of published software, such as `SJLT-4096` or `Random-128*128`, turned into the language."""

import math
import re

from vestige.errors import SpecError

_LEGACY = re.compile(r"([a-z_]+?)(?:_([0-9]+))?-([1-9][0-9]*)(?:[*x×]([1-9][0-9]*))?", re.IGNORECASE)
_NAMES = {
    "random": "mask",
    "randommask": "mask",
    "random_mask": "mask",
    "selective_mask": "selective",
    "selectivemask": "selective",
    "gaussian": "gauss",
    "normal": "gauss",
    "identity": "none",
}
_GRASS_BLOWUP = 4  # published default: the mask keeps four times as many numbers as the sketch


def modern_spelling(stage: str) -> list[str]:
    """Return the stage in the language; itself when it is not one of the old spellings.

    A dense projection with a size for each side is `logra`; GraSS and FactGraSS are two stages each. Options belong to
    the sketch, except those of `selective_grass`, which name the file of its mask.
    """
    if stage.lower() == "identity":
        return ["none"]
    head, comma, options = stage.partition(",")
    match = _LEGACY.fullmatch(head.strip())
    if match is None:
        return [_dense_sides(stage)]
    name, blowup, first, second = match[1].lower(), match[2], int(match[3]), match[4]
    if name in ("grass", "selective_grass") and not second:
        kept = int(blowup or _GRASS_BLOWUP) * first
        if name == "grass":
            return [f"mask:{kept}", f"sjlt:{first}{comma}{options}"]
        return [f"selective:{kept}{comma}{options}", f"sjlt:{first}"]
    if name == "factgrass" and not second and not blowup:
        return [_factgrass_mask(first, stage), f"sjlt:{first}{comma}{options}"]
    if blowup:
        return [stage]
    size = f"{first}x{second}" if second else f"{first}"
    return [_dense_sides(f"{_NAMES.get(name, name)}:{size}{comma}{options}")]


def _factgrass_mask(size: int, given: str) -> str:
    side = math.isqrt(size)
    if side * side != size:
        near = max(1, round(math.sqrt(size))) ** 2
        raise SpecError(
            f"'{given}': FactGraSS keeps 2*sqrt(K) entries of each side, so K must be a square. "
            f"Write factgrass-{near}, or give the sides yourself: 'mask:{2 * side}x{2 * side} | sjlt:{size}'."
        )
    return f"mask:{2 * side}x{2 * side}"


def _dense_sides(stage: str) -> str:
    """Rewrite `gauss:64x64` and `rademacher:64x64`: they are Kronecker projections, whose name is `logra`."""
    match = re.fullmatch(r"(gauss|rademacher)\s*:\s*([0-9]+[x*×][0-9]+)", stage.strip(), re.IGNORECASE)
    if match is None:
        return stage
    return f"logra:{match[2]}" + (",init=rademacher" if match[1].lower() == "rademacher" else "")
