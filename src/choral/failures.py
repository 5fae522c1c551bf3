"""What stopped a job, in two forms: for whoever ran it, and for a report that may be passed on.

An error of the user's own code is named by its file and line, without the frames of torch and of Choral. Its text may
hold data values, so a report gets no more than its kind and its place.
"""

from __future__ import annotations

import errno
import os
import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

from choral.errors import ChoralError

_OF_SYSTEMS = {
    errno.ENOSPC: "make room on that disk, or name a place on another; what was complete before is kept",
    errno.EDQUOT: "your quota is used up: make room, or name another place; what was complete before is kept",
    errno.EACCES: "this user may not: name a place of your own",
    errno.EPERM: "this user may not: name a place of your own",
    errno.EROFS: "nothing can be written there: name another place",
    errno.ENOTDIR: "a part of that path is a file: name another place",
    errno.ENOENT: "name a path in a folder that is there, and can be written to",
}
_LONGEST = 400  # characters of an error's own text
_LIBRARIES = tuple(
    os.path.realpath(folder) + os.sep
    for folder in {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    if folder
)


@dataclass(frozen=True)
class Failure:
    """message, hint: for the terminal. reason: for a report, without data values. trace: Python's traceback."""

    message: str
    hint: str
    reason: str
    trace: str

    def lines(self, *, debug: bool, prefix: str = "") -> str:
        """What is printed on stderr, each line ended. prefix: what was being done."""
        said = f"choral: {prefix}{self.message}\n"
        if self.hint:
            said += f"  hint: {self.hint}\n"
        return self.trace + said if debug else said


def failure_of(error: BaseException) -> Failure:
    """Say what `error` is: Choral's own refusal, an error of the user's code, of the machine, or a defect here."""
    trace = "".join([getattr(error, "trace", ""), *traceback.format_exception(error)])
    if isinstance(error, ChoralError):
        return Failure(str(error), error.hint, str(error), trace)
    kind, said = type(error).__name__, _said(error)
    if (place := place_of(error)) is not None:
        file, line, function = place
        where = f"line {line}" + (f", in {function}" if function else "")
        return Failure(
            f"{_near(file)}, {where}: {kind}{said}",
            _hint(error, file),
            f"{kind} in the user's own code ({file.name}, {where})",
            trace,
        )
    if isinstance(error, OSError):
        said = error.strerror or kind
        named = f"{error.filename}: " if error.filename else ""
        return Failure(f"{named}{said}", _OF_SYSTEMS.get(error.errno or 0, ""), f"{kind}: {said}", trace)
    return Failure(
        f"stopped by {kind}{said}, which is of no file of yours",
        "--debug shows the whole traceback; it belongs into a bug report",
        f"{kind}, of no file of the user's",
        trace,
    )


def _said(error: BaseException) -> str:
    """The first line of an error's own text, kept short."""
    if isinstance(error, SystemExit):
        return f": the code ended the process with {error.code!r}"
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f": {first[:_LONGEST]}{'...' if len(first) > _LONGEST else ''}" if first else ""


def _hint(error: BaseException, file: Path) -> str:
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name and ((file.parent / f"{name}.py").is_file() or (file.parent / name).is_dir()):
        return f"{name} lies beside the file, and Python does not look there: run with PYTHONPATH={file.parent}"
    if name:
        return f"check the spelling of {name}, or install it in the environment that choral runs in"
    return "the error is in your own code; --debug shows the whole traceback"


def place_of(error: BaseException) -> tuple[Path, int, str] | None:
    """File, line and function of the innermost frame that is neither Choral's nor a library's."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno and _is_users(error.filename, ""):
        return Path(error.filename), error.lineno, ""
    found, link = None, error.__traceback__
    while isinstance(link, TracebackType):
        frame: FrameType = link.tb_frame
        code = frame.f_code
        if _is_users(code.co_filename, str(frame.f_globals.get("__name__", ""))):
            function = "" if code.co_name.startswith("<") else code.co_name
            found = Path(code.co_filename), link.tb_lineno, function
        link = link.tb_next
    return found


def _is_users(filename: str, module: str) -> bool:
    if filename.startswith("<") or module.startswith("choral.") or Path(filename).parent == Path(__file__).parent:
        return False
    real = Path(os.path.realpath(filename))
    return not {"site-packages", "dist-packages"} & set(real.parts) and not str(real).startswith(_LIBRARIES)


def _near(file: Path) -> str:
    """The path as the user would type it here, if that is shorter."""
    return min((str(file), os.path.relpath(file)), key=len)
