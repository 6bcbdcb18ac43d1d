"""Random access to the documents of files, by an index of byte offsets.

A document is a part of a plain text file, or a record (`train.data.records`)
that a caller parses.

d documents of a file.
"""

import dataclasses
import glob
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from train.data import records
from train.data.records import Record, RecordError


@dataclasses.dataclass(frozen=True)
class File:
  """Where the documents of one file are."""

  path: str
  starts_d: np.ndarray  # [d] int64, offset of the first byte
  stops_d: np.ndarray  # [d] int64, offset past the last byte
  crcs_d: np.ndarray  # [d] int64, CRC-32 of the bytes
  numbers_d: np.ndarray  # [d] int64, from 1, by which an error names it
  parse: Callable[[bytes], Any]
  """What makes a document of these bytes."""
  unit: str = 'line'
  """The unit that the numbers count."""
  is_copied: bool = False
  """Whether the offsets are those of the spool, which has a copy."""

  def read(self, i: int) -> Any:
    """Document i; OSError where the file is gone or is another one."""
    start, stop = int(self.starts_d[i]), int(self.stops_d[i])
    if self.is_copied:
      return self.parse(records.spool().read(start, stop))
    with open(self.path, 'rb') as file:
      file.seek(start)
      content = file.read(stop - start)
    if zlib.crc32(content.strip()) != self.crcs_d[i]:
      raise OSError(
        f'{self.path} has changed since it was opened: other bytes at offset '
        f'{start:,}; put the old file back, or start a new run with it'
      )
    return self.parse(content)

  def place(self, i: int) -> str:
    """Where document i is, in words."""
    return f'{self.path}, {self.unit} {self.numbers_d[i]}'

  def where(self, keep: Callable[[np.ndarray], np.ndarray]) -> 'File':
    """The documents whose CRC satisfies `keep`, from [d] to a mask [d]."""
    kept_d = keep(self.crcs_d)
    return dataclasses.replace(
      self,
      starts_d=self.starts_d[kept_d],
      stops_d=self.stops_d[kept_d],
      crcs_d=self.crcs_d[kept_d],
      numbers_d=self.numbers_d[kept_d],
    )


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


class _Span(NamedTuple):
  """Where a document is."""

  start: int
  stop: int
  crc: int
  number: int


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
  """Finds the documents of a file and checks that each can be read.

  Args:
    path: of a file. Records must have a field "text"; a .csv or .tsv has
      records if its first line names such a column, and a .json file if it
      holds a list. Any other file is plain text.
    separator: of the documents of plain text; None makes the file one.

  Raises:
    ImportError: Parquet needs the package `datasets`.
    ValueError: a file or a record cannot be read; the message names it.
  """
  if _has_texts(path):
    rule = 'a record must be a JSON object whose field "text" is a string'
    return index_records(path, _text, rule)
  with records.naming(path), records.open_bytes(path) as file:
    content = file.read()
  is_copied = records.is_compressed(path)
  spans = (
    _copied(span, text) if is_copied else span
    for span, text in _parts(path, content, separator)
  )
  return _file(path, spans, bytes.decode, is_copied=is_copied)


def index_records(
  path: str,
  parse: Callable[[Record], Any],
  rule: str,
  seen: Callable[[Record, Any, str], None] | None = None,
) -> File:
  """Finds the records of a file and checks that each can be parsed.

  Args:
    path: of the file.
    parse: from a record to a document. A false document is left out, and so
      are blank lines.
    rule: the form of a record, for the error that names file and line.
    seen: called with each record, its document and its place.

  Raises:
    ImportError: Parquet needs the package `datasets`.
    ValueError: a record cannot be read, or `parse` raises ValueError, KeyError,
      TypeError or AttributeError.
  """
  is_copied = not records.has_lines(path)
  unit = 'line'
  if is_copied:
    unit, numbered = records.read(path)
    found = _dumped(numbered)
  else:
    found = _lines(path)

  def spans() -> Iterator[_Span]:
    for span, content in found:
      place = f'{path}, {unit} {span.number}'
      record, item = _checked(parse, content, place, rule)
      if seen is not None:
        seen(record, item, place)
      if item:
        yield _copied(span, content) if is_copied else span

  return _file(
    path,
    spans(),
    lambda content: parse(records.parse_object(content)),
    unit=unit,
    is_copied=is_copied,
  )


def _file(
  path: str,
  spans: Iterable[_Span],
  parse: Callable[[bytes], Any],
  **options: Any,
) -> File:
  table = np.array(list(spans), np.int64).reshape(-1, 4)
  starts_d, stops_d, crcs_d, numbers_d = table.T
  return File(path, starts_d, stops_d, crcs_d, numbers_d, parse, **options)


def _lines(path: str) -> Iterator[tuple[_Span, bytes]]:
  """Lines of a file that are not blank, where they are in it."""
  start = 0
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      stop = start + len(line)
      if line.strip():
        yield _Span(start, stop, zlib.crc32(line.strip()), number), line
      start = stop


def _dumped(
  numbered: Iterable[tuple[int, Record]],
) -> Iterator[tuple[_Span, bytes]]:
  """JSON of records, which has no place in a file yet."""
  for number, record in numbered:
    content = records.dump(record)
    yield _Span(0, 0, zlib.crc32(content), number), content


def _copied(span: _Span, content: bytes) -> _Span:
  """Copies a document into the spool, and returns where it is there."""
  start = records.spool().append(content)
  return span._replace(start=start, stop=start + len(content))


def _checked(
  parse: Callable[[Record], Any], content: bytes, place: str, rule: str
) -> tuple[Record, Any]:
  try:
    record = records.parse_object(content)
    return record, parse(record)
  except RecordError as error:
    raise ValueError(f'{place}: {error}') from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    shown = content[:60].decode('utf-8', 'replace').strip()
    raise ValueError(
      f'{place}: {rule}, got {shown!r} '
      f'({type(error).__name__}: {error}): correct or remove the line'
    ) from error


def _has_texts(path: str) -> bool:
  kind = records.kind_of(path)
  if kind in ('.csv', '.tsv'):
    return 'text' in records.header(path)
  if kind in ('.jsonl', '.ndjson', '.parquet', '.arrow'):
    return True
  return records.is_list(path)


def _text(record: Record) -> str:
  """The document of a record; '' if it is blank."""
  text = record['text']
  if not isinstance(text, str):
    raise TypeError(f'got {text!r:.40}')
  return text if text.strip() else ''


def _parts(
  path: str, content: bytes, separator: str | None
) -> Iterator[tuple[_Span, bytes]]:
  """Documents between separators, white space around them left out."""
  try:
    content.decode()
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{path} must be UTF-8 text, got byte {content[error.start]:#04x} at '
      f'offset {error.start}: convert it, or leave it out of the glob'
    ) from error
  start = counted = 0
  number = 1
  ends = [match.span() for match in _separator(separator).finditer(content)]
  for stop, after in [*ends, (len(content), len(content))]:
    part = content[start:stop]
    text = part.strip()
    if text:
      start += len(part) - len(part.lstrip())
      number += content.count(b'\n', counted, start)
      counted = start
      stop = start + len(text)
      yield _Span(start, stop, zlib.crc32(text), number), text
    start = after


def _separator(separator: str | None) -> re.Pattern[bytes]:
  """The separator, its newlines in either convention; none never matches."""
  if not separator:
    return re.compile(rb'(?!)')
  return re.compile(
    rb'\r?\n'.join(map(re.escape, separator.encode().split(b'\n')))
  )
