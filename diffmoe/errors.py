"""The one exception for input that a user can mend."""


class UserError(Exception):
    """A wrong setting, file or folder: the message names it, its value and the way out.

    Commands print the message alone, without a traceback, and exit with code 2.
    """
