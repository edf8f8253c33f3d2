"""The input of `fishrt render`: lines of JSON, of CSV or of text, and what a line may say."""

from __future__ import annotations

import csv
import difflib
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, get_args

from ..audio.formats import FORMATS
from ..errors import FishrtError, PromptError

InputFormat = Literal["jsonl", "csv", "text"]
INPUT_FORMATS: tuple[InputFormat, ...] = get_args(InputFormat)
ROW_FORMATS = tuple(name for name in FORMATS if name in ("wav", "flac", "ogg", "mp3"))
"""The formats of results: files that carry a comment."""
_BY_SUFFIX: dict[str, InputFormat] = {".csv": "csv", ".txt": "text"}


@dataclass(frozen=True, slots=True)
class Line:
    """What a line asks for; None: not given. `fishrt speak` has options of the same meanings."""

    text: str | None = None
    """With `turns`, made of them."""
    id: str | None = None
    voice: str | list[str] | None = None
    references: list[dict[str, str]] | None = None
    """Recordings to imitate, after the voices: `audio`, a path relative to the file of the job, and `text`, its words."""
    turns: list[dict[str, Any]] | None = None
    """A dialogue: each with its `text`, and with its `voice`, or its `speaker`, counted over voices and references from 0."""
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    max_frames: int | None = None
    system: str | None = None
    speed: float | None = None
    format: str | None = None


NAMES = tuple(field.name for field in fields(Line))
_NUMBERS = ("seed", "temperature", "top_p", "top_k", "repetition_penalty", "max_frames", "speed")
_WHOLE = ("seed", "top_k", "max_frames")


def input_format(path: Path) -> InputFormat:
    """Return the format of a file by its ending: .csv, .txt, else lines of JSON."""
    return _BY_SUFFIX.get(path.suffix.lower(), "jsonl")


def read_lines(data: bytes, kind: InputFormat) -> Iterator[tuple[int, Line | FishrtError]]:
    """Yield the lines of an input with their numbers, from 1, blank ones counted; for a bad line its error.

    Raises FishrtError for a table whose columns are not known.
    """
    for number, value in (_csv if kind == "csv" else _lines)(data.removeprefix(b"\xef\xbb\xbf"), kind):
        if isinstance(value, FishrtError):
            yield number, value
            continue
        try:
            yield number, _line(value)
        except FishrtError as error:
            yield number, error


def content_id(line: Line) -> str:
    """Return the id of a line without one: 16 hex digits of its content, so that lines may be inserted above it."""
    given = {name: value for name in NAMES if name != "id" and (value := getattr(line, name)) is not None}
    return blake2b(canonical(given), digest_size=8).hexdigest()


def canonical(value: Any) -> bytes:
    """Return a value of JSON as bytes, the same for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True).encode()


def _lines(data: bytes, kind: str) -> Iterator[tuple[int, Any]]:
    for number, raw in enumerate(data.split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            yield number, PromptError(f"the line is not UTF-8: {error.reason} at byte {error.start}")
            continue
        if kind == "text":
            yield number, {"text": text.strip()}
            continue
        try:
            yield number, json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "a number is too long, or lists are too deep")
            yield number, FishrtError(f"the line is not JSON: {reason}", hint='write {"text": "…"} on one line')


def _csv(data: bytes, _: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(data.decode(errors="surrogateescape"), newline=""))
    header = [name.strip() for name in next(reader, [])]
    for name in header:
        _check_name(name, "column")
    if header and not {"text", "turns"} & set(header):
        raise FishrtError("the table has no column text", hint=f"its first line names the columns: {', '.join(NAMES)}")
    if len(set(header)) < len(header):
        raise FishrtError("two columns of the table have one name", hint="give each column a name of its own")
    last = reader.line_num
    for cells in reader:
        number, last = last + 1, reader.line_num
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > len(header):
            yield number, FishrtError(f"the line has {len(cells)} cells, and the table {len(header)} columns")
        elif any("\udc80" <= character <= "\udcff" for cell in cells for character in cell):
            yield number, PromptError("the line is not UTF-8")
        else:
            try:
                named = zip(header, cells, strict=False)
                yield number, {name: _cell(name, cell) for name, cell in named if cell.strip()}
            except FishrtError as error:
                yield number, error


def _cell(name: str, cell: str) -> Any:
    """Return the value of a cell: of a number its number, and of a list, which is written as in JSON, its list."""
    listed = name in ("turns", "references") or (name == "voice" and cell.lstrip().startswith("["))
    if name not in _NUMBERS and not listed:
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        wanted = "a list as in JSON" if listed else "a number"
        raise FishrtError(f"{name} is {cell!r}; {wanted} is expected") from None


def _line(value: Any) -> Line:
    """Return a line that has been checked on its own. Raises FishrtError."""
    if not isinstance(value, dict):
        raise FishrtError(f"the line is no object: {_short(value)}", hint='write {"text": "…"}')
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise PromptError("the line has half of a surrogate pair", hint="write the character itself") from None
    given = {name: each for name, each in value.items() if each is not None}
    for name, each in given.items():
        _check_name(name, "field")
        if wanted := _wanted(name, each):
            raise FishrtError(f"{name} is {_short(each)}; {wanted} is expected")
    if isinstance(given.get("id"), int):
        given["id"] = str(given["id"])
    line = Line(**given)
    if (line.text is None) == (line.turns is None):
        raise FishrtError("the line needs a text, or turns" if line.text is None else "the line has a text and turns: give one")
    return line


def _wanted(name: str, value: Any) -> str | None:
    """Return what a field must be; None if it is that."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    texts = isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)
    match name:
        case "id":
            return None if whole or (isinstance(value, str) and value.strip()) else "a text or a whole number"
        case "voice":
            return None if texts or isinstance(value, str) else "a name, or a list of names,"
        case "references":
            return None if _listed(value, ({"audio"}, {"audio", "text"})) else 'a list of {"audio": "FILE", "text": "WORDS"}'
        case "turns":
            told = isinstance(value, list) and [{**each, "speaker": ""} if _speaker(each) else each for each in value]
            possible = _listed(told, ({"voice", "text"},)) or _listed(told, ({"speaker", "text"},))
            return None if possible else 'a list of {"voice": "NAME", "text": "…"}, or of {"speaker": 0, "text": "…"},'
        case "format":
            return None if value in ROW_FORMATS else f"one of {', '.join(ROW_FORMATS)}"
        case _ if name in _WHOLE:
            return None if whole and value >= (name != "seed") else f"a whole number of at least {int(name != 'seed')}"
        case _ if name in _NUMBERS:
            return None if whole or isinstance(value, float) else "a number"
    return None if isinstance(value, str) else "a text"


def _speaker(turn: Any) -> bool:
    found = turn.get("speaker") if isinstance(turn, dict) else None
    return isinstance(found, int) and not isinstance(found, bool) and found >= 0


def _listed(value: Any, shapes: Sequence[set[str]]) -> bool:
    """Return whether a value is a list of objects of texts, all with the keys of one of these shapes."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, Mapping) and each.keys() in shapes for each in value)
        and all(isinstance(text, str) for each in value for text in each.values())
    )


def _check_name(name: str, what: str) -> None:
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(NAMES)}"
        raise FishrtError(f"there is no {what} {name!r:.80}", hint=hint)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"
