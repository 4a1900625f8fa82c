"""The specs that every general test of compressors runs over."""

SPECS = [
    "none",
    "mask:40",
    "mask:4x5",
    "gauss:24",
    "rademacher:24",
    "sjlt:24",
    "sjlt:24,s=3",
    "sjlt:6x5",
    "logra:4x5",
    "logra:4x5,init=rademacher",
    "tensorsketch:24",
    "tensorsketch:7",
    "mask:6x8 | sjlt:16",
    "mask:60 | sjlt:16",
    "logra:6x6 | sjlt:16",
    "mask:6x8 | gauss:16",
    "mask:60 | rademacher:16",
    "mask:6x8 | logra:3x3",
    "mask:6x8 | tensorsketch:16",
    "tensorsketch:40 | sjlt:16",
    "sjlt:40 | mask:16",
]
SHAPE = (9, 13)
