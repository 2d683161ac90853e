"""The one exception that speaks to the person at the keyboard."""


class UserError(Exception):
    """Bad input: one sentence that names the file or key, what is wrong and what would be right.

    The tools print it without a traceback and end with exit status 1.
    """
