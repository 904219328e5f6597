"""What a user can mend: reported in one line, without a traceback."""


class UserError(ValueError):
    """An argument, a file or an entry of a file that is not as it has to be; the message names it."""
