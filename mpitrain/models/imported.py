"""Functions and classes of the user, named ``module:attribute`` on the command line."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from mpitrain.errors import UsageError


def imported(kind: str, name: str, *, otherwise: str) -> Callable[..., Any]:
    """Import ``module:attribute``, also from the working directory, and return the attribute. Local.

    Args:
        kind: The kind of object for messages, such as "model".
        name: The text ``module:attribute``.
        otherwise: An alternative for the user, for messages.

    Raises:
        UsageError: The attribute cannot be imported or called.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # missing in a console script; it stays for imports inside the function
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        raise UsageError(
            f"{kind} {name} cannot be imported ({type(error).__name__}: {error}): check the name, run in the folder of "
            f"the module, or {otherwise}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        where = getattr(module, "__file__", None)
        raise UsageError(f"module {module_name} ({where}) has no function '{attribute}': check its name")
    return function
