"""The exceptions that a caller can act on.

Every message says what is wrong, where, both numbers if there are two, and the way out. The
command line prints the message alone (the traceback only with `--verbose`) and exits with
`exit_code`: 2 for bad input, 1 for a run that failed.

    GlmQuantError
    ├── InputError (2)            what was asked for cannot be made from what was given
    │   ├── RecipeError           the recipe, with file and line
    │   ├── SourceError           the place the checkpoint should come from
    │   ├── CheckpointError       the source checkpoint
    │   │   ├── HeaderError       a safetensors header or an index lies
    │   │   ├── MissingTensorError
    │   │   ├── ShapeError        shape or dtype is not what config.json implies
    │   │   └── WeightError       a value in a weight is NaN, Inf or out of range
    │   └── OutputError           the output folder holds something else
    └── RunError (1)              the run itself went wrong
        ├── BusyError             another run holds the workspace
        ├── DiskSpaceError
        ├── IntegrityError        bytes on disk are not the bytes that were recorded
        ├── ParityError           the build does not compute what the reference computes
        ├── EvaluationError
        ├── CardError             a number that the card needs was not measured
        ├── PublishError
        ├── ApprovalError         a person's word is missing, or was no
        └── ServiceError          the Prefect server or its set-up
"""


class GlmQuantError(Exception):
    """The root: catch it to catch everything this package raises on purpose.

    Attributes:
        exit_code: of the command line.
        may_pass: whether the same again, later, may succeed: a server that did not answer.
    """

    exit_code = 1
    may_pass = False


class InputError(GlmQuantError):
    """Bad input: nothing expensive was started."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe cannot be read, or does not fit the checkpoint."""


class SourceError(InputError):
    """The source does not exist or cannot be reached."""


class CheckpointError(InputError):
    """The source checkpoint is not what it says it is."""


class HeaderError(CheckpointError):
    """A safetensors header or an index is malformed or contradicts its file."""


class MissingTensorError(CheckpointError):
    """A tensor that config.json implies is in no shard."""


class ShapeError(CheckpointError):
    """A tensor's shape or dtype is not what config.json implies."""


class WeightError(CheckpointError):
    """A weight holds NaN, Inf, or a value its target dtype cannot hold."""


class OutputError(InputError):
    """The output folder holds something that is not ours to overwrite."""


class RunError(GlmQuantError):
    """The run failed; what was finished is kept and the same command resumes."""


class BusyError(RunError):
    """Another process is working in this workspace."""


class DiskSpaceError(RunError):
    """The disk has, or would have, too little room."""


class IntegrityError(RunError):
    """Bytes on disk differ from what was recorded when they were written."""


class ParityError(RunError):
    """A parity bound is broken."""


class EvaluationError(RunError):
    """An evaluation failed or broke a bound."""


class CardError(RunError):
    """The card needs a record that is missing."""


class PublishError(RunError):
    """A target refused, or publishing is not allowed."""


class ApprovalError(RunError):
    """Publishing needs a person's word, which is missing or was no."""


class ServiceError(RunError):
    """The Prefect server cannot be reached, or refused what the service needs."""
