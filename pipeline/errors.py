"""The one exception for a user's mistake: the command line prints it as a single line and exits with code 2."""


class UserError(Exception):
    """Bad input from outside (recipe, file, checkpoint, environment): says what is wrong, where, and what would be valid."""
