"""`vestige methods`."""

from vestige.registry import command
from vestige.settings import MethodsSettings
from vestige.terminal import say, show


@command("methods", MethodsSettings, order=200)
def methods(settings: MethodsSettings) -> None:
    """List the attribution methods, or print what one estimates, costs and takes.

    Those of installed packages stand among the built-in ones.
    """
    from vestige.methods import describe_method, method_table

    if settings.name is None:
        show(method_table(), file_width=160)
    else:
        say(describe_method(settings.name))
