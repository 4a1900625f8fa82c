import platform

import torch

from vestige.runs import environment
from vestige.timing import peak_memory_bytes


def test_versions_are_those_of_the_imported_packages():
    found = environment()
    assert found["python"] == platform.python_version()
    assert torch.__version__.startswith(found["torch"]), "the metadata of some builds leaves out +cu124"


def test_peak_memory_is_in_bytes():
    assert 20 * 2**20 < peak_memory_bytes() < 2**40
