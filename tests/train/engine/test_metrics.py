import pytest

from train.engine import metrics


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'metrics.jsonl'


def test_lines_after_the_checkpoint_are_dropped(path):
  with metrics.opened(path, step=0, tensorboard=False) as log:
    for step in range(1, 6):
      log(step, {'loss': float(step)})
  with path.open('a') as file:
    # the process was killed while writing this line
    file.write('{"step": 6, "lo')
  with metrics.opened(path, step=3, tensorboard=False) as log:
    log(4, {'loss': 0.5})
  assert [line['loss'] for line in metrics.read(path)] == [1, 2, 3, 0.5]


@pytest.mark.parametrize('garbage', [b'\xff\xfe', b'[1]', b'{"loss": 1}', b''])
def test_garbage_is_named_and_left_out(path, capfd, garbage):
  path.write_bytes(b'{"step": 1}\n' + garbage + b'\n{"step": 2}\n')
  assert [line['step'] for line in metrics.read(path)] == [1, 2]
  with metrics.opened(path, step=2, tensorboard=False):
    pass
  assert f'{path}: left out are lines' in (err := capfd.readouterr().err)
  assert err.endswith('no metrics: 2\n')
  assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_line_is_on_disk_at_once(path):
  with metrics.opened(path, step=0, tensorboard=False) as log:
    log(1, {'loss': 2.0})
    assert metrics.read(path) == [{'step': 1, 'loss': 2.0}]


def test_plot_is_a_picture(path, tmp_path):
  with metrics.opened(path, step=0, tensorboard=False) as log:
    for step in range(1, 6):
      log(step, {'loss': 5.0 - step})
    log(5, {'validation_loss': 1.0})
  metrics.plot(path, tmp_path / 'curves.png', 'title')
  assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_tensorboard_gets_every_scalar(path, monkeypatch):
  calls = []

  class Writer:
    def __init__(self, directory, purge_step):
      calls.append((directory, purge_step))

    def add_scalar(self, name, value, step):
      calls.append((name, value, step))

    def close(self):
      calls.append('closed')

  monkeypatch.setattr(metrics, 'event_writer', lambda: Writer)
  with metrics.opened(path, step=2, tensorboard=True) as log:
    log(3, {'loss': 2.0})
  assert calls == [(str(path.parent), 3), ('loss', 2.0, 3), 'closed']
