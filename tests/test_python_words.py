"""The Python functions: their arguments are documented, and their errors speak of arguments and not of flags."""

import inspect
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

import vestige
from vestige.errors import SpecError, UserError
from vestige.registry import COMMANDS, import_object
from vestige.settings import Settings, with_settings

FUNCTIONS = [command.name for command in COMMANDS if command.function]


class Ask(Settings):
    """What the function of these tests takes."""

    positional: ClassVar[tuple[str, ...]] = ("run",)
    run: Path = Field(description="The run.")
    k: int = Field(20, ge=1, description="Rows, as --k of others.")
    method: str = Field("influence", description="How to score.")
    options: dict[str, str] = Field({}, description="Options.")
    trust: bool = Field(True, description="Run the checks.")
    skip_bad: bool = Field(False, description="Leave out what is not finite.")


def fails_with(message: str) -> str:
    """Return what a caller in Python reads where the function raises this."""

    @with_settings(Ask)
    def ask(settings: Ask) -> None:
        """Ask."""
        raise UserError(message)

    with pytest.raises(UserError) as caught:
        ask("run")
    with pytest.raises(UserError) as typed:
        ask.run(Ask(run=Path("run")))  # pyright: ignore[reportFunctionMemberAccess]
    assert str(typed.value) == message
    return str(caught.value)


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("Type --run VALUE, or `run: VALUE` in a config file.", "Pass run=...."),
        ("Drop --skip-bad, or type --k 5.", "Drop skip_bad=True, or pass k=5."),
        ("Give --no-trust.", "Give trust=False."),
        ("Type --option relative=loss.", 'Pass options={"relative": "loss"}.'),
        (
            "Type --method influence, or --method with one of: a, b.",
            'Pass method="influence", or `method` with one of: a, b.',
        ),
        ("Give --run FOLDER --k K.", "Give run=FOLDER, k=K."),
        ("Make it again:\nvestige ask --run r --k 3", "Make it again:\nvestige ask --run r --k 3"),
        ("Run `vestige ask --k 3` first. Then drop --k.", "Run `vestige ask --k 3` first. Then drop `k`."),
        ("--elsewhere is another's.", "--elsewhere is another's."),
    ],
)
def test_a_message_names_arguments_in_python_and_flags_on_the_command_line(typed, read):
    assert fails_with(typed) == read


def test_wrong_settings_are_answered_in_arguments():
    with pytest.raises(SpecError, match=r"`queries` is missing: .* Pass queries=\.\.\."):
        vestige.attribute(index="idx", out="run")
    with pytest.raises(SpecError, match=r"`k` was 0, expected greater than 0\. `k`: Proponents"):
        vestige.attribute(index="idx", out="run", queries="q", k=0)
    with pytest.raises(SpecError, match=r"Pass index=FOLDER .* model=MODEL, data=FILE"):
        vestige.attribute(out="run", queries="q")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_documented_with_type_and_default(name):
    command = COMMANDS.find(name)
    doc = inspect.getdoc(import_object(command.function)) or ""
    arguments = doc[doc.index("Args:") :]
    for key, field in command.settings.model_fields.items():
        line = next(line for line in arguments.splitlines() if line.startswith(f"    {key} ("))
        assert ("required" if field.is_required() else "default ") in line
    assert all(len(line) <= 120 for line in doc.splitlines())
    assert not any(section in doc[: doc.index("Args:")] for section in ("Raises:", "Returns:"))


def test_the_documentation_of_an_argument_is_one_line_of_its_setting():
    @with_settings(Ask)
    def ask(settings: Ask) -> None:
        """Ask.

        Raises:
            UserError: Always.
        """

    assert ask.__doc__ == (
        "Ask.\n\nArgs:\n    run (Path, required): The run.\n    k (int, default 20): Rows, as `k` of others.\n"
        "    method (str, default 'influence'): How to score.\n    options (dict[str, str], default {}): Options.\n"
        "    trust (bool, default True): Run the checks.\n"
        "    skip_bad (bool, default False): Leave out what is not finite.\n\nRaises:\n    UserError: Always."
    )


def test_the_package_lists_its_public_names_alone():
    assert [name for name in dir(vestige) if not name.startswith("__")] == vestige.__all__
