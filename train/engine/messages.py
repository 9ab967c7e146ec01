"""How a command ends: with one line for what people can mend, a traceback for what they cannot."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch

from tokenflow_ext._build import build_info
from tokenflow_ext.errors import BuildFactsMissingError, TokenFlowError, printable

from .missing_package import not_installed

#: What options, files and machines are to blame for. Their messages name the option or file.
EXPECTED = (TokenFlowError, FloatingPointError)


class _Terminated(BaseException):
    """SIGTERM came: files that are being written are removed on the way out."""


def one_line(text: object) -> str:
    """A message as one line that any terminal can show: of what is not printable (parts of file
    names, as a rule) the escape."""
    return printable(" ".join(str(text).split("\n")).strip())


def out_of_memory(error: BaseException) -> str | None:
    """What to say where an error is about memory that there is not; None of any other error."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"out of memory: {one_line(str(error) or 'a smaller batch needs less')}"
    # torch has a class of its own for the memory of accelerators alone.
    asked = re.search(r"can't allocate memory.*?(\d+) bytes", str(error))
    if not isinstance(error, RuntimeError) or asked is None:
        return None
    return f"out of memory: asked for {int(asked[1]) / 2**30:.1f} GiB at once"


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


@contextmanager
def ending_in_one_line() -> Iterator[None]:
    """Run a command: an expected error, Ctrl-C and SIGTERM end the process with one line.

    The exit status is 1 for an error, 130 for Ctrl-C, 143 for SIGTERM. Any other exception is a
    fault of the program and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # a name must not end the work that it is printed for
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # One of several processes may wait for the others inside a collective, where Python's handlers
    # do not run: there SIGTERM does what it always does.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    handled = alone and threading.current_thread() is threading.main_thread()
    former = signal.signal(signal.SIGTERM, _terminate) if handled else None
    try:
        # Refuses an instruction set that this machine lacks before anything is read. Without the
        # facts, the first kernel refuses it.
        with suppress(BuildFactsMissingError):
            build_info()
        yield
    except EXPECTED as error:
        sys.exit(f"error: {one_line(error)}")
    except ModuleNotFoundError as error:
        sys.exit(not_installed(error))
    except (MemoryError, RuntimeError) as error:
        line = out_of_memory(error)
        if line is None:
            raise
        sys.exit(f"error: {line}")
    except BrokenPipeError:
        # As of `tokenflow ... | head`. At its end Python would flush the output once more.
        print("stopped: nobody reads the output any more", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno is None:
            raise
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except _Terminated:
        print("stopped by SIGTERM", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    finally:
        if handled:
            signal.signal(signal.SIGTERM, former or signal.SIG_DFL)
