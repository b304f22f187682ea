"""Text made safe to show and store: no secrets, no control characters for a terminal."""

import re
import shlex
from pathlib import Path

HIDDEN = "***"
_PIPE = "pipe:"
# A password may contain raw slashes (AWS secrets do), unless a port follows the colon.
_ADDRESS = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)"
    r"(?P<user>[^\s/?#'\"]*@|[^\s/?#@:'\"]*:(?!\d+[/?#])[^\s'\"]*@)?"
    r"(?P<path>[^\s?#'\"]*)"
    r"(?P<query>\?[^\s#'\"]*)?"
    r"(?P<fragment>#[^\s'\"]*)?"
)


def redact(location: str) -> str:
    """A location of data (URL or `pipe:COMMAND`) without anything that may be a secret.

    In URLs, anywhere in the text, user, password, query values and fragment are hidden. Of a
    command remain the program, its first plain words, names of flags, URLs, and the shard's
    placeholder. A local path is returned unchanged.
    """
    if location.startswith(_PIPE):
        return _PIPE + _redact_command(location.removeprefix(_PIPE))
    return _ADDRESS.sub(_redact_address, location)


def without_folders(text: str) -> str:
    """The text with absolute paths shortened to their last part."""
    text = re.sub(r"file://\S*", _last_part, text)
    # Up to a comma, semicolon or quote: names of folders may contain spaces.
    return re.sub(r"(?<![^\s'\"=(])~?/[^,;'\"\n]*", _last_part, text)


def _last_part(found: re.Match[str]) -> str:
    return Path(found[0]).name or found[0]


def printable(text: str) -> str:
    """The text with everything unprintable escaped: control characters, newlines, bad UTF-8."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _redact_address(found: re.Match[str]) -> str:
    query = found["query"] or ""
    if query:
        query = "?" + "&".join(_redact_value(part) for part in query[1:].split("&"))
    user = f"{HIDDEN}@" if found["user"] else ""
    fragment = f"#{HIDDEN}" if found["fragment"] else ""
    return f"{found['scheme']}{user}{found['path']}{query}{fragment}"


def _redact_value(part: str) -> str:
    """part: `name=value`, or a value alone."""
    name, equals, _ = part.partition("=")
    return f"{name}={HIDDEN}" if equals else HIDDEN


def _redact_command(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:  # unbalanced quotes
        return HIDDEN
    shown: list[str] = []
    after_flag = False  # from here on a plain word may be a password
    for word in words:
        if word.startswith("-") and word != "-":
            after_flag = True
        if re.fullmatch(r"-[A-Za-z]|--[A-Za-z][A-Za-z0-9-]*", word):
            shown.append(word)
        elif _ADDRESS.fullmatch(word) or re.fullmatch(r"[\w./{}-]*\{\}[\w./{}-]*", word):
            shown.append(redact(word))
        elif not after_flag and re.fullmatch(r"[A-Za-z0-9_./-]{1,32}", word):
            shown.append(word)
        elif not shown or shown[-1] != HIDDEN:
            shown.append(HIDDEN)
    return " ".join(shown)
