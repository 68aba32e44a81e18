"""The errors users meet: each names the thing, shows both sides and the next step, in at most four lines."""


class LoraxError(ValueError):
    """Base of every error this package raises on purpose."""


class SpecError(LoraxError):
    """A spec is malformed: unknown key, wrong type, a setting out of range."""


class PlanError(LoraxError):
    """A spec does not fit the params or the traced function."""


class AdapterError(LoraxError):
    """Factors or an adapter on disk do not fit the plan, the base, or are damaged."""


class StudyError(LoraxError):
    """A study's design, data or run folder cannot be used."""


class CompressError(LoraxError):
    """A compression that is impossible, that lacks data, or whose numbers are not finite."""


class ExportError(LoraxError):
    """A function or params that a deployment format cannot hold, or an exported file that cannot be used."""


class DataError(LoraxError):
    """A file of rows that cannot be read, a row that breaks its task's form, or rows too few to split."""


class ProcessLostError(LoraxError):
    """Another process of the program ended, or cannot be reached: no step of theirs together can be finished."""
