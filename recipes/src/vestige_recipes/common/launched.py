"""A study hands on where the work runs to the verbs that it is made of."""

from typing import Any

from vestige.settings import LaunchSettings
from vestige_recipes.common.registry import StudySettings


def launched(settings: StudySettings) -> dict[str, Any]:
    """The settings of where work runs, as arguments of another verb."""
    return {name: getattr(settings, name) for name in LaunchSettings.model_fields}
