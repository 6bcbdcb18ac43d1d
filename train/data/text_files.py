"""Random access to the records of files, by an index of byte offsets.

`train.data.records` reads the files. A document is made from a record by a
function of the caller.

Shapes: d documents of a file.
"""

import array
import dataclasses
import itertools
import operator
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from train.data.records import (
  Entry,
  Record,
  RecordError,
  no_space,
  parse_content,
  records,
  spool,
)


@dataclasses.dataclass(frozen=True)
class File:
  """The places of the documents in one file."""

  path: str
  """Path of the file."""
  starts_d: np.ndarray
  """[d] int64, offset of the first byte of each document."""
  stops_d: np.ndarray
  """[d] int64, offset past the last byte."""
  crcs_d: np.ndarray
  """[d] int64, CRC-32 of the bytes."""
  numbers_d: np.ndarray
  """[d] int64, number of the line, item or row, from 1, for errors."""
  parse: Callable[[Record], Any]
  """Converts a record into a document."""
  unit: str
  """The unit of the numbers: 'line', 'item' or 'row'."""
  is_text: bool
  """Whether the bytes are plain text, not JSON."""
  is_copied: bool
  """Whether the offsets are those of a copy in `train.data.records.spool`."""

  def read(self, i: int) -> Any:
    """Reads document i.

    Raises:
      OSError: the file has changed or does not exist.
    """
    start = int(self.starts_d[i])
    stop = int(self.stops_d[i])
    if self.is_copied:
      content = spool().read(start, stop)
    else:
      content = self._read_in_place(start, stop, int(self.crcs_d[i]))
    return self.parse(parse_content(content, is_text=self.is_text))

  def _read_in_place(self, start: int, stop: int, crc: int) -> bytes:
    with open(self.path, 'rb') as file:
      file.seek(start)
      content = file.read(stop - start)
    if zlib.crc32(content.strip()) != crc:
      raise OSError(
        f'{self.path} has changed since it was opened: other bytes at offset '
        f'{start:,}; put the old file back, or start a new run with it'
      )
    return content

  def place(self, i: int) -> str:
    """Returns the place of document i in words, for example file and line."""
    return f'{self.path}, {self.unit} {self.numbers_d[i]}'

  def where(self, keep: Callable[[np.ndarray], np.ndarray]) -> 'File':
    """Returns the documents for which the mask `keep(crcs_d)` is true."""
    kept_d = keep(self.crcs_d)
    return dataclasses.replace(
      self,
      starts_d=self.starts_d[kept_d],
      stops_d=self.stops_d[kept_d],
      crcs_d=self.crcs_d[kept_d],
      numbers_d=self.numbers_d[kept_d],
    )


class Texts:
  """Documents of several files, as a random-access source for grain."""

  def __init__(self, files: Iterable[File]) -> None:
    """Concatenates the documents of files."""
    self._files = tuple(files)
    self._stops = np.cumsum([len(file.starts_d) for file in self._files])

  def __len__(self) -> int:
    """Number of documents."""
    return int(self._stops[-1]) if self._files else 0

  def __getitem__(self, index: int) -> Any:
    """Reads a document from its file."""
    file, i = self._at(index)
    return file.read(i)

  def place(self, index: int) -> str:
    """Returns the place of a document in words, for example file and line."""
    file, i = self._at(index)
    return file.place(i)

  def where(self, keep: Callable[[np.ndarray], np.ndarray]) -> 'Texts':
    """Returns the documents for which the mask `keep(crcs_d)` is true."""
    return Texts(file.where(keep) for file in self._files)

  def _at(self, index: int) -> tuple[File, int]:
    """Returns the file of a document, and the document's index in it."""
    f = int(np.searchsorted(self._stops, index, side='right'))
    # The second value is a negative index: document stops[f] - 1 is the last
    # one of file f, at index -1.
    return self._files[f], index - int(self._stops[f])


def index_texts(pattern: str, separator: str | None) -> Texts:
  """Indexes the texts in one or several files, and checks each of them.

  Args:
    pattern: path or glob. A file has records with a field "text", or it is
      plain text, as `records(..., plain_text=True)` decides.
    separator: as in `records`.

  Raises:
    FileNotFoundError, ImportError, OSError, ValueError: as in `index`.
  """
  return index(
    records(pattern, plain_text=True, separator=separator),
    _text_of_record,
    'a record must be a JSON object whose field "text" is a string',
    _is_kept,
  )


def index(
  entries: Iterable[Entry],
  parse: Callable[[Record], Any],
  rule: str,
  is_kept: Callable[[Entry, Any], bool],
) -> Texts:
  """Indexes the records of files, and checks that each can be parsed.

  Documents are not held in memory. Those of JSON lines and of plain text are
  later read from their files; those of other files, and of compressed ones, are
  copied to `train.data.records.spool`.

  Args:
    entries: result of `records`.
    parse: converts a record into a document.
    rule: the required form of a record, for the error that names file and line.
    is_kept: `(entry, document) -> bool`, whether the document belongs to the
      result. It is called once for each record.

  Raises:
    FileNotFoundError: no file matches.
    ImportError: Parquet needs the package `datasets`.
    OSError: the directory for temporary files has no space for a copy.
    ValueError: a record cannot be read, or `parse` raises ValueError, KeyError,
      TypeError or AttributeError. The message names file and line.
  """
  return Texts(
    _file(path, group, parse, rule, is_kept)
    for path, group in itertools.groupby(entries, operator.attrgetter('path'))
  )


def _file(
  path: str,
  entries: Iterable[Entry],
  parse: Callable[[Record], Any],
  rule: str,
  is_kept: Callable[[Entry, Any], bool],
) -> File:
  """Indexes the records of one file, of which there is at least one."""
  table = array.array('q')
  entry = None
  for entry in entries:
    document = _checked(parse, entry, rule)
    if not is_kept(entry, document):
      continue
    content = entry.content
    start = _copied(path, content) if entry.start is None else entry.start
    crc = zlib.crc32(content.strip())
    table.extend((start, start + len(content), crc, entry.number))
  assert entry is not None
  starts_d, stops_d, crcs_d, numbers_d = (
    np.array(table, np.int64).reshape(-1, 4).T
  )
  return File(
    path,
    starts_d,
    stops_d,
    crcs_d,
    numbers_d,
    parse,
    unit=entry.unit,
    is_text=entry.is_text,
    is_copied=entry.start is None,
  )


def _copied(path: str, content: bytes) -> int:
  """Copies a document to the spool, and returns its offset there."""
  try:
    return spool().append(content)
  except OSError as error:
    raise no_space(path, error) from error


def _checked(parse: Callable[[Record], Any], entry: Entry, rule: str) -> Any:
  try:
    return parse(entry.record)
  except RecordError as error:
    raise ValueError(f'{entry.place}: {error}') from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    shown = entry.content[:60].decode('utf-8', 'replace').strip()
    raise ValueError(
      f'{entry.place}: {rule}, got {shown!r} '
      f'({type(error).__name__}: {error}): correct or remove the line'
    ) from error


def _text_of_record(record: Record) -> str:
  text = record['text']
  if not isinstance(text, str):
    raise TypeError(f'got {text!r:.40}')
  return text


def _is_kept(entry: Entry, text: str) -> bool:
  """Leaves out blank texts of records. Plain text has no blank documents."""
  return entry.is_text or bool(text.strip())
