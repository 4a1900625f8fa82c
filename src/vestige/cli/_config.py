"""Settings from a file: a YAML with the names of the flags, or the run.json of an earlier run."""

from pathlib import Path
from typing import Any

from vestige.errors import SpecError
from vestige.parsing import parse_yaml
from vestige.settings import Settings, flag, nearest


def read_config(path: Path, settings: type[Settings]) -> dict[str, Any]:
    """Read the settings of a config file, with names checked and values as the file has them.

    Args:
        path: A YAML or JSON mapping from names to values. Of a `run.json`, its `config` part is taken: an
            earlier run is replayed.
        settings: The settings of the verb that is to be run.

    Raises:
        SpecError: The file cannot be read, is not a mapping, holds an unknown name, or comes from a Python
            program that passed a live object.
    """
    content = _parse(path)
    if isinstance(content, dict) and {"vestige", "config"} <= content.keys():
        content = content["config"]
    if not isinstance(content, dict):
        raise SpecError(f"{path} holds a {type(content).__name__}. Expected lines such as `model: my-model`.")
    known = list(settings.model_fields)
    unknown = [
        f"{path}: unknown setting `{name}`. {nearest(str(name), known)}" for name in content if name not in known
    ]
    if unknown:
        raise SpecError("\n".join(unknown))
    for name, value in content.items():
        if isinstance(value, str) and value.startswith("<") and value.endswith(">"):
            raise SpecError(
                f"{path}: `{name}` was a live {value[1:-1]} in a Python program, which a file cannot hold. "
                f"Type {flag(name)} VALUE beside --config."
            )
    return content


def _parse(path: Path) -> Any:
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"The config file {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise SpecError(f"The config file {path} is neither YAML nor JSON that can be used: {error}.") from None
