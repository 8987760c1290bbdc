"""From a process class to its name and back."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from prunus.errors import ProcessClassNotFoundError

if TYPE_CHECKING:
    from prunus.processes.process import Process

ANY_MODULE = ("*",)


def class_id(process_class: type) -> str:
    """The name under which a class is kept: ``module:QualName``."""
    return f"{process_class.__module__}:{process_class.__qualname__}"


def load_class(identifier: str, allowed: Sequence[str] = ANY_MODULE) -> type[Process]:
    """The process class ``module:QualName``.

    Only modules that match one of the `allowed` patterns (``mypackage``, ``mypackage.*``) are imported. Raises
    `ProcessClassNotFoundError` with a reason that says what to do, whatever the import of the module does.
    """
    from prunus.processes.process import Process

    module_name, colon, qualname = identifier.partition(":")
    if not colon or not module_name or not qualname:
        head, dot, tail = identifier.rpartition(".")
        meant = f", here perhaps {head}:{tail}" if dot and head and tail[:1].isupper() and not colon else ""
        raise ProcessClassNotFoundError(identifier, f"write it as package.module:Class{meant}")
    if module_name == "__main__":
        raise ProcessClassNotFoundError(
            identifier, "it was defined in a script, which nobody else can import; put the class into a module"
        )
    if "<locals>" in qualname:
        raise ProcessClassNotFoundError(
            identifier, "it was defined inside a function; move the class to the top level of its module"
        )
    if not any(fnmatch.fnmatchcase(module_name, pattern) for pattern in allowed):
        raise ProcessClassNotFoundError(
            identifier, f"the module is not among those allowed here ({', '.join(allowed) or 'none'}); add it there"
        )
    try:
        found: object = (module := importlib.import_module(module_name))
    except (Exception, SystemExit) as error:  # importing runs any code
        missing = isinstance(error, ModuleNotFoundError) and module_name.startswith(str(error.name))
        reason = (
            f"there is no module {error.name!r} here; install it, or put its folder on the PYTHONPATH of the workers"
            if missing and isinstance(error, ModuleNotFoundError)
            else f"importing its module fails with {type(error).__name__}: {error}"
        )
        raise ProcessClassNotFoundError(identifier, reason) from error
    for name in qualname.split("."):
        found = getattr(found, name, None)
        if found is None:
            raise ProcessClassNotFoundError(identifier, f"the module has no {qualname!r}; {_what_now(module, name)}")
    if not (isinstance(found, type) and issubclass(found, Process)):
        raise ProcessClassNotFoundError(identifier, "it is no Process class; derive it from prunus.Process")
    return found


def _what_now(module: ModuleType, name: str) -> str:
    """What to do about a class that its module does not have: it was misspelt, or renamed."""
    near = difflib.get_close_matches(name, [each for each in vars(module) if not each.startswith("_")], 1)
    meant = f"did you mean {near[0]!r}? If it" if near else "if it"
    return f"{meant} was renamed or moved, keep the old name as well"
