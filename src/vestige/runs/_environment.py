"""The environment of a run: versions of software."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "vestige",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "numpy",
    "safetensors",
    "pyarrow",
)


def environment() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages that scores depend on; import none of them."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
