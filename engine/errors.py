"""What can go wrong, by who can mend it. The command line turns each into its exit code."""


class AlureError(Exception):
    """The work failed (exit code 1)."""


class InputError(AlureError):
    """Something the user gave is wrong: a file, a column, an option, a configuration (exit code 2).

    The message names the thing, what was expected, what came, and what to do.
    """


class Interrupted(AlureError):
    """Stopped by a signal between two units of work; the same command goes on from there (exit code 75)."""
