"""What a user can get wrong."""


class UsageError(ValueError):
    """A mistake in what was asked for, not in mpitrain.

    Its text is one line that says what is wrong and what to do about it. The command line prints that line on one rank
    and exits with code 2; everything else shows a traceback.
    """

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(text.split()))
