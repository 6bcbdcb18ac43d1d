"""Ctrl-C and SIGTERM: an end that loses nothing, with the usual exit codes.

Before training there is nothing to save, and the program ends
(`end_quietly`), while the first step compiles too. While it trains it is told
to stop after the step (`asked`), and answers at once, even where the
interpreter waits for a device. The grace period that it needs is what is left
of a step, or of a validation that runs, and one save. A second signal, and
SIGKILL, lose what came after the last checkpoint that was finished, and no
checkpoint.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
  """Whether a signal asked the program to stop, and which."""

  def __init__(self):
    """Nobody has asked, and nothing is done that is worth a save."""
    self.signal: int | None = None
    self.begun = False

  @property
  def code(self) -> int:
    """The exit code: 0, or 128 and the signal's number, as of a shell."""
    return 0 if self.signal is None else 128 + self.signal


def end_quietly() -> None:
  """Lets a signal end the program in one line, with the signal's exit code."""

  def end(number, frame):
    del frame
    print(f'{name(number)}: stopped, with nothing to save', file=sys.stderr)
    raise SystemExit(128 + number)

  for number in SIGNALS:
    signal.signal(number, end)


@contextlib.contextmanager
def asked() -> Iterator[Stop]:
  """Yields what the first signal sets; the second one ends the program.

  So does the first, as long as nothing is `begun`.

  Python runs a handler once the interpreter has its turn, which may be after
  the step, or after its compilation. The number itself comes through a socket
  at once, and a thread waits there.
  """
  stop = Stop()

  def ask(number, frame):
    del frame
    stop.signal = number

  reader, writer = socket.socketpair()
  writer.setblocking(False)

  def listen():
    first = True
    while number := int.from_bytes(reader.recv(1)):
      if number not in SIGNALS:
        continue
      if first and not stop.begun:
        say(f'{name(number)}: stopped, with nothing new to save')
      if not (first and stop.begun):
        os._exit(128 + number)
      first, stop.signal = False, number
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
  """Writes a line past all buffers, whose locks others may hold."""
  os.write(2, f'\n{line}\n'.encode())


def name(number: int) -> str:
  """Returns the name of a signal.

  >>> name(15)
  'SIGTERM'
  """
  return signal.Signals(number).name
