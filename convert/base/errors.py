"""The one exception that reaches a person."""


class UserError(Exception):
    """Bad input, told in one sentence that names the file, tensor or flag, and the mend.

    The command line prints the sentence and exits with 1; no traceback, no partial output.
    """
