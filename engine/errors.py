"""What can go wrong, by who can mend it. The command line turns each into its exit code."""

from pathlib import Path


class AlureError(Exception):
    """The work failed (exit code 1)."""


class InputError(AlureError):
    """Something the user gave is wrong: a file, a column, an option, a configuration (exit code 2).

    The message names the thing, what was expected, what came, and what to do.
    """


class Interrupted(AlureError):
    """Stopped by a signal between two units of work; the same command goes on from there (exit code 75)."""


def refuse_s3(path: Path, what: str) -> None:
    """InputError where a path was given as s3://, of which pathlib leaves one slash: only stores may be there."""
    if path.parts[:1] == ("s3:",):
        raise InputError(
            f"{what}: expected a local path, got s3://{'/'.join(path.parts[1:])}; only a store may be on S3"
        )
