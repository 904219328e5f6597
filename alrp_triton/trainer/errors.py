"""What a user can mend: reported in one line, without a traceback."""


class UserError(ValueError):
    """An argument, a file or an entry of a file that is not as it has to be; the message names it."""


def in_a_line(error: object) -> str:
    """What another library says, which may be of many lines and without end."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"
