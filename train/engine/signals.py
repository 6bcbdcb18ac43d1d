"""Handles Ctrl-C and SIGTERM: saves before it ends, with the usual exit codes.

Before the first step is done there is nothing to save, and a signal ends the
program (`end_quietly`). During training, the first signal stops the loop after
the current step (`asked`). The answer is printed at once, even if the
interpreter waits for a device. Stopping takes as long as the rest of a step or
of a running validation, and one save.

A second signal, or SIGKILL, ends the program at once. It loses the steps since
the last finished checkpoint, but no checkpoint.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
  """The signal that stops the program, if one has arrived."""

  def __init__(self) -> None:
    """Starts without a signal, and without a step worth saving."""
    self.signal: int | None = None
    self.begun = False

  @property
  def code(self) -> int:
    """The exit code: 0, or 128 plus the signal's number, as in a shell."""
    return 0 if self.signal is None else 128 + self.signal


def end_quietly() -> None:
  """Makes signals end the program with one line and the signal's exit code."""

  def end(number: int, frame: Any) -> None:
    del frame
    print(f'{name(number)}: stopped, with nothing to save', file=sys.stderr)
    raise SystemExit(128 + number)

  for number in SIGNALS:
    signal.signal(number, end)


@contextlib.contextmanager
def asked() -> Iterator[Stop]:
  """Handles signals in its body; yields the `Stop` that the first signal sets.

  The second signal ends the program. The first one ends it too, if `begun` is
  still False.

  Python calls a signal handler only between bytecodes, which may be after the
  step or its compilation. `set_wakeup_fd` writes the signal's number to a
  socket at once, and a thread waits for it there.
  """
  stop = Stop()

  def ask(number: int, frame: Any) -> None:
    del frame
    stop.signal = number

  reader, writer = socket.socketpair()
  writer.setblocking(False)

  def listen() -> None:
    first = True
    while number := int.from_bytes(reader.recv(1)):
      if number not in SIGNALS:
        continue
      if first and not stop.begun:
        say(f'{name(number)}: stopped, with nothing new to save')
      if not (first and stop.begun):
        os._exit(128 + number)
      first = False
      stop.signal = number
      say(f'{name(number)}: will save after this step; again ends at once')

  thread = threading.Thread(target=listen, daemon=True)
  thread.start()
  with reader, writer:
    fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
      yield stop
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)
      signal.set_wakeup_fd(fd)
      writer.send(b'\0')
      thread.join()


def say(line: str) -> None:
  """Writes a line without Python's buffers, whose locks may be held."""
  os.write(2, f'\n{line}\n'.encode())


def name(number: int) -> str:
  """Returns the name of a signal.

  >>> name(15)
  'SIGTERM'
  """
  return signal.Signals(number).name
