"""The errors that ssdkd raises on purpose; the commands print them as one sentence and exit with their code."""


class SsdkdError(Exception):
    """A mistake in what the user gave (a file, a name, a value): says what is wrong, where, and what to do."""

    exit_code = 2


class ConfigError(SsdkdError):
    """A configuration that cannot be run: unknown key, wrong type, impossible combination."""


class CheckpointError(SsdkdError):
    """A weights, policy or run file that is missing, damaged, of another model, or not safe to read."""


class DataError(SsdkdError):
    """An evaluation set that is missing, damaged, or does not fit the teacher."""


class NumericalError(SsdkdError):
    """Training left the finite numbers and could not be brought back."""

    exit_code = 3
