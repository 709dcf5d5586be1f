"""The one error class for bad input."""


class InputError(ValueError):
    """Something given to rankmamba cannot be used.

    The message says what was expected, what came (the value, and the file and line where there is one) and what to do about it.
    Every error that a user can cause is of this class; any other that surfaces is a bug of ours.
    """
