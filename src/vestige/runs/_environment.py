"""What a run was made with: versions, and the most memory it held."""

import platform
import sys
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
    """Versions of Python, the platform and the packages that scores depend on; imports none of them."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_bytes() -> int:
    """The most resident memory of this process so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in kibibytes, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
