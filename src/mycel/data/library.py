"""The built-in corpus: the Python standard library installed on this machine.

Real English and real code without a download. Six unlike domains of it are private, one for each party of the
default recipe; the rest is public text, from which a small base model learns the language and the format of
the instructions. Files are read where Python keeps them; nothing is imported and nothing is written.
"""

from __future__ import annotations

import importlib.util
import random
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path

from mycel.data.definitions import as_example, definitions
from mycel.data.examples import Example
from mycel.data.modules import SourceFile, read_source, source_files
from mycel.data.prose import pieces_of_code, pieces_of_prose, pieces_of_table
from mycel.errors import DataError

# Modules come and go between versions of Python; a name that is not there is passed over.
PRIVATE_DOMAINS: dict[str, tuple[str, ...]] = {
    "web": (
        *("http", "urllib", "xmlrpc", "wsgiref", "socketserver", "socket", "ssl", "ftplib", "ipaddress"),
        *("webbrowser", "cgi", "cgitb", "nntplib", "telnetlib", "nturl2path"),
    ),
    "concurrency": (
        *("asyncio", "multiprocessing", "concurrent", "threading", "_threading_local", "subprocess", "queue"),
        *("selectors", "sched", "signal", "asyncore", "asynchat"),
    ),
    "mail-and-parsing": (
        *("email", "mailbox", "imaplib", "smtplib", "smtpd", "poplib", "mailcap", "mimetypes", "html", "_markupbase"),
        *("configparser", "json", "csv", "plistlib", "tomllib", "netrc", "shlex", "quopri", "base64", "uu", "xdrlib"),
    ),
    "numbers": (
        *("numbers", "decimal", "_pydecimal", "fractions", "statistics", "random", "secrets", "datetime"),
        *("_pydatetime", "calendar", "_strptime", "zoneinfo", "heapq", "bisect", "operator", "_pylong", "colorsys"),
    ),
    "testing-and-debugging": (
        *("unittest", "doctest", "pdb", "bdb", "trace", "traceback", "tracemalloc", "inspect", "dis", "pydoc"),
        *("logging", "warnings", "cProfile", "profile", "pstats", "timeit", "code", "cmd", "symtable", "linecache"),
    ),
    "graphical-interfaces": ("tkinter", "idlelib", "turtle", "turtledemo", "curses"),
}
# Some systems ship Python without tkinter and idlelib; then the graphical side of a library that is always
# installed beside this one stands in.
STAND_IN = "matplotlib"
STAND_IN_MODULES = {"backend_bases", "backend_managers", "backend_tools", "backends", "widgets", "figure", "pyplot"}


def private_examples(domain: str) -> list[Example]:
    """Unlike examples of one private domain, in the order of their files, labelled with the domain.

    Raises
    ------
    DataError
        The domain is unknown, or none of its source files is on this machine.
    """
    if domain not in PRIVATE_DOMAINS:
        known = ", ".join(PRIVATE_DOMAINS)
        raise DataError(f"the built-in corpus has no domain {domain!r}: use one of {known}")
    return list(_private(_root(), domain))


def public_examples() -> list[Example]:
    """Unlike examples from the packages of no private domain; no response is also a private one."""
    return _public(_public_files(_root()))


def public_text() -> Iterator[str]:
    """Pieces of public text in a fixed shuffled order, so that any first part of them is like the whole.

    Instructions in the format of the private ones, prose of docstrings and comments, code, and the language
    reference; a piece has about a thousand characters at most.
    """
    root = _root()
    pieces: list[str] = []

    def read() -> Iterator[SourceFile]:
        for file in _public_files(root):
            pieces.extend(chain(pieces_of_prose(file), pieces_of_code(file)))
            yield file

    pieces.extend(example.prompt + example.response for example in _public(read()))
    reference = read_source(root / "pydoc_data" / "topics.py", "topics")
    if reference is not None:
        pieces.extend(pieces_of_table(reference, left_out={"debugger"}))  # it documents a private module
    random.Random(0).shuffle(pieces)
    return iter(pieces)


def _public(files: Iterable[SourceFile]) -> list[Example]:
    private = (example.response for domain in PRIVATE_DOMAINS for example in _private(_root(), domain))
    return _unlike(files, "public", private)


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@cache
def _private(root: Path, domain: str) -> tuple[Example, ...]:
    names = PRIVATE_DOMAINS[domain]
    files = source_files(root, set(names).__contains__)
    if domain == "graphical-interfaces" and not (root / "tkinter").is_dir():
        files = chain(files, _stand_ins())
    found = _unlike(files, domain, ())
    if not found:
        raise DataError(
            f"the built-in corpus finds no source of {', '.join(names)} in {root}: "
            "install Python with the .py files of its standard library, or name another data.source"
        )
    return tuple(found)


def _stand_ins() -> Iterator[SourceFile]:
    spec = importlib.util.find_spec(STAND_IN)
    for folder in spec.submodule_search_locations or () if spec else ():
        yield from source_files(Path(folder), STAND_IN_MODULES.__contains__, f"{STAND_IN}.")


def _public_files(root: Path) -> Iterator[SourceFile]:
    private = {name for names in PRIVATE_DOMAINS.values() for name in names}
    return source_files(root, lambda name: name not in private)


def _unlike(files: Iterable[SourceFile], label: str, taken: Iterable[str]) -> list[Example]:
    found: list[Example] = []
    seen = {response.casefold() for response in taken}
    for file in files:
        for definition in definitions(file):
            example = as_example(definition, label)
            if example is not None and example.response.casefold() not in seen:
                seen.add(example.response.casefold())
                found.append(example)
    return found
