"""Errors that are meant for people."""


class UserError(ValueError):
    """Bad input, told in one line: what was wrong, what would be right. The command line prints it and exits with 2."""
