"""The one error class for bad input."""


class InputError(ValueError):
    """Something given to rankmamba cannot be used.

    The message says what was expected, what came (the value, and the file and line where there is one) and what to do about it.
    Everything a user can cause raises this class; anything else that surfaces is a defect of ours.
    """
