"""Random access to what text files hold, by an index of byte offsets.

Documents of plain text, or lines of JSON that a caller parses.

d documents of a file.
"""

import dataclasses
import glob
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class File:
  """Where the documents of one file are."""

  path: str
  starts_d: np.ndarray  # [d] int64, offset of the first byte
  stops_d: np.ndarray  # [d] int64, offset past the last byte
  crcs_d: np.ndarray  # [d] int64, CRC-32 of the bytes
  parse: Callable[[bytes], Any]
  """What makes a document of these bytes."""

  def read(self, i: int) -> Any:
    """Document i; OSError where the file is gone or is another one."""
    with open(self.path, 'rb') as file:
      file.seek(self.starts_d[i])
      content = file.read(self.stops_d[i] - self.starts_d[i])
    if zlib.crc32(content.strip()) != self.crcs_d[i]:
      raise OSError(
        f'{self.path} has changed since it was opened: other bytes at offset '
        f'{self.starts_d[i]:,}; put the old file back, or start anew with it'
      )
    return self.parse(content)

  def place(self, i: int) -> str:
    """Where document i is, in words."""
    with open(self.path, 'rb') as file:
      line = 1 + file.read(self.starts_d[i]).count(b'\n')
    return f'{self.path}, line {line}'

  def where(self, keep: Callable[[np.ndarray], np.ndarray]) -> 'File':
    """The documents whose CRC satisfies `keep`, from [d] to a mask [d]."""
    kept_d = keep(self.crcs_d)
    columns = (self.starts_d, self.stops_d, self.crcs_d)
    return File(self.path, *(x_d[kept_d] for x_d in columns), self.parse)


class Texts:
  """Documents of several files, a grain random-access source."""

  def __init__(self, files: Iterable[File]):
    """The documents of files, in their order."""
    self._files = tuple(files)
    self._stops = np.cumsum([len(file.starts_d) for file in self._files])

  def __len__(self) -> int:
    """Number of documents."""
    return int(self._stops[-1])

  def __getitem__(self, i: int) -> Any:
    """Document i, read from its file."""
    file, j = self._at(i)
    return file.read(j)

  def place(self, i: int) -> str:
    """Where document i is, in words."""
    file, j = self._at(i)
    return file.place(j)

  def where(self, keep: Callable[[np.ndarray], np.ndarray]) -> 'Texts':
    """The documents whose CRC satisfies `keep`."""
    return Texts(file.where(keep) for file in self._files)

  def _at(self, i: int) -> tuple[File, int]:
    f = int(np.searchsorted(self._stops, i, side='right'))
    # Counted from the end of file f, which is where document stops[f] begins.
    return self._files[f], i - int(self._stops[f])


def expand(pattern: str) -> list[str]:
  """Files of a path or glob, sorted; FileNotFoundError if there are none."""
  pattern = os.path.expanduser(pattern)
  found = [pattern] if os.path.exists(pattern) else []
  found = found or sorted(glob.glob(pattern, recursive=True))
  paths = [path for path in found if os.path.isfile(path)]
  if not paths:
    raise FileNotFoundError(
      f'no file matches {pattern!r}: give the path of a text file, or a quoted '
      "glob such as 'corpus/**/*.jsonl'"
    )
  return paths


def index(path: str, separator: str | None) -> File:
  """Finds the documents of a file and checks that each can be read."""
  if path.endswith('.jsonl'):
    rule = 'a line must be a JSON object whose field "text" is a string'
    return index_lines(path, _text, rule)
  return _file(path, _parts(path, separator), bytes.decode)


def index_lines(path: str, parse: Callable[[bytes], Any], rule: str) -> File:
  """Finds the lines of a file and checks that each can be parsed.

  Args:
    path: of the file.
    parse: from a line to a document; what is false is left out, and so are
      blank lines.
    rule: what a line must be, for the error that names file and line.

  Raises:
    ValueError: `parse` raises ValueError, KeyError, TypeError or
      AttributeError.
  """

  def spans():
    start = 0
    with open(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        stop = start + len(line)
        if line.strip() and _checked(parse, line, path, number, rule):
          yield start, stop, zlib.crc32(line.strip())
        start = stop

  return _file(path, spans(), parse)


def _file(
  path: str,
  spans: Iterable[tuple[int, int, int]],
  parse: Callable[[bytes], Any],
) -> File:
  return File(path, *np.array(list(spans), np.int64).reshape(-1, 3).T, parse)


def _checked(
  parse: Callable[[bytes], Any], line: bytes, path: str, number: int, rule: str
) -> Any:
  try:
    return parse(line)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    shown = line[:60].decode('utf-8', 'replace').strip()
    raise ValueError(
      f'{path}, line {number}: {rule}, got {shown!r} '
      f'({type(error).__name__}: {error}): correct or remove the line'
    ) from error


def _text(line: bytes) -> str:
  """The document of a line; '' if it is blank."""
  text = json.loads(line)['text']
  # JSON can spell half a surrogate pair, which is no Unicode text.
  text.encode()
  return text if text.strip() else ''


def _parts(path: str, separator: str | None) -> Iterator[tuple[int, int, int]]:
  """Spans and CRCs between separators, white space around them left out."""
  with open(path, 'rb') as file:
    content = file.read()
  try:
    content.decode()
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{path} must be UTF-8 text, got byte {content[error.start]:#04x} at '
      f'offset {error.start}: convert it, or leave it out of the glob'
    ) from error
  start = 0
  for match in _separator(separator).finditer(content):
    yield from _stripped(content, start, match.start())
    start = match.end()
  yield from _stripped(content, start, len(content))


def _separator(separator: str | None) -> re.Pattern[bytes]:
  """The separator, its newlines in either convention; none never matches."""
  if not separator:
    return re.compile(rb'(?!)')
  return re.compile(
    rb'\r?\n'.join(map(re.escape, separator.encode().split(b'\n')))
  )


def _stripped(
  content: bytes, start: int, stop: int
) -> Iterator[tuple[int, int, int]]:
  part = content[start:stop]
  text = part.strip()
  if text:
    start += len(part) - len(part.lstrip())
    yield start, start + len(text), zlib.crc32(text)
