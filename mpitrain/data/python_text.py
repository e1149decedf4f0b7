"""The text that comes with Python itself: the documentation behind ``help("with")``.

It is the language reference, about 450 KB of English with examples. Versions of Python differ in it.
"""

import functools
import importlib

from mpitrain.errors import UsageError

NAME = "python"
SEPARATOR = "\n\n"


@functools.cache
def python_text() -> str:
    """Return the documentation of Python, its topics in alphabetical order. Local.

    Raises:
        UsageError: This Python comes without it.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise UsageError(
            f"this Python comes without its documentation ({error}): import a text of your own with "
            "'mpitrain data import text'"
        ) from error
    return SEPARATOR.join(topics[name] for name in sorted(topics))
