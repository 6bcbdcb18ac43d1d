import gzip
import io
import json
import struct
import sys
import warnings
import zlib

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.train.data.test_corpus import frame
from train.data.images import pixels
from train.data.images.batches import (
  Augment,
  batches,
  shown,
  validation_batches,
)
from train.data.images.corpora import (
  FASHION,
  IdxImages,
  ImageFolders,
  ImageTfds,
)

RNG = np.random.default_rng(0)
SMALL = RNG.integers(256, size=(40, 6, 5), dtype=np.uint8)
LABELS = (np.arange(40) % 4).astype(np.uint8)
NAMES = ('a', 'b', 'c', 'd')


def write_idx(path, array, cut=0, **header):
  """Writes an idx file; `header` replaces the type or the sizes."""
  kind, shape = header.get('kind', 8), header.get('shape', array.shape)
  data = struct.pack(f'>HBB{len(shape)}I', 0, kind, len(shape), *shape)
  data += array.tobytes()
  data = data[: len(data) - cut]
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)


@pytest.fixture
def idx(tmp_path):
  """A directory of 40 training and 8 validation images."""
  write_idx(tmp_path / 'train-images-idx3-ubyte.gz', SMALL)
  write_idx(tmp_path / 'train-labels-idx1-ubyte.gz', LABELS)
  write_idx(tmp_path / 't10k-images-idx3-ubyte', SMALL[:8])
  write_idx(tmp_path / 't10k-labels-idx1-ubyte', LABELS[:8])
  return tmp_path


def picture(height, width, value=0, mode='RGB'):
  """A noisy image that differs for each value."""
  rng = np.random.default_rng(value)
  channels = len(mode)
  pixels_HWC = rng.integers(256, size=(height, width, channels), dtype=np.uint8)
  return Image.fromarray(pixels_HWC if channels > 1 else pixels_HWC[..., 0])


@pytest.fixture
def folders(tmp_path):
  """40 PNG files of 6 x 5 pixels in folders of 4 classes."""
  for i, image in enumerate(SMALL):
    file = tmp_path / 'train' / NAMES[LABELS[i]] / f'{i:02}.png'
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(file)
  return tmp_path / 'train'


def read(images, seed=0):
  return list(images.stream(seed=seed, repeat=False))


def contents(images):
  """The pixels and the label of each example, as a sorted list."""
  return sorted((x.image.tobytes(), x.label) for x in read(images))


WHOLE = sorted(
  (x.tobytes(), int(label)) for x, label in zip(SMALL, LABELS, strict=True)
)


class TestIdx:
  def test_images_and_labels(self, idx):
    corpus = IdxImages(str(idx), names=NAMES)
    train, validation = corpus.open('train'), corpus.open('validation')
    assert contents(train) == WHOLE and len(train) == 40
    assert len(validation) == 8
    assert train.shape == validation.shape == (6, 5, 1)
    assert train.num_classes == 4 and train.names == NAMES
    assert corpus.holds == 'images'
    example = read(train)[0]
    assert example.image.dtype == np.uint8 and example.image.shape == (6, 5, 1)

  def test_without_names_the_training_labels_count_classes(self, idx):
    validation = IdxImages(str(idx)).open('validation')
    assert validation.num_classes == 4 and validation.names is None

  def test_four_dimensions_end_with_channels(self, idx):
    colours = RNG.integers(256, size=(40, 6, 5, 3), dtype=np.uint8)
    write_idx(idx / 'train-images-idx3-ubyte.gz', colours)
    train = IdxImages(str(idx), validation=None).open('train')
    assert train.shape == (6, 5, 3)
    assert read(train)[0].image.tobytes() in {x.tobytes() for x in colours}

  def test_held_out_images_are_disjoint(self, idx):
    double = np.concatenate([SMALL, SMALL])
    write_idx(idx / 'train-images-idx3-ubyte.gz', double)
    labels = np.concatenate([LABELS, LABELS])
    write_idx(idx / 'train-labels-idx1-ubyte.gz', labels)
    corpus = IdxImages(str(idx), validation=None, holdout=0.3)
    train, validation = (
      contents(corpus.open(split)) for split in ('train', 'validation')
    )
    assert len(train) + len(validation) == 80 and validation
    # Copies of an image are on the same side.
    assert not set(train) & set(validation)

  def test_missing_files_name_the_package_and_the_option(
    self, tmp_path, monkeypatch
  ):
    from train.data.images import idx as idx_lib

    monkeypatch.setattr(idx_lib, 'FASHION_DIRECTORY', str(tmp_path))
    with pytest.raises(
      FileNotFoundError,
      match=r'dataset-fashion-mnist, or set corpus\.directory',
    ):
      IdxImages(str(tmp_path)).open('train')
    with pytest.raises(FileNotFoundError, match=r'\.gz in .*: set corpus\.dir'):
      IdxImages(str(tmp_path / 'other')).open('train')
    assert len(FASHION) == 10

  @pytest.mark.parametrize(
    'file, array, options, message',
    [
      ('train-images-idx3-ubyte.gz', SMALL, {'cut': 9}, r'1,200 .* has 1,191'),
      ('train-images-idx3-ubyte.gz', SMALL, {'kind': 13}, r'00 00 0d 03'),
      ('train-images-idx3-ubyte.gz', LABELS, {}, r'1 dimensions, but images'),
      ('train-labels-idx1-ubyte.gz', SMALL, {}, r'3 dimensions, but labels'),
      ('train-labels-idx1-ubyte.gz', LABELS[:7], {}, r'40 images, .* 7 labels'),
      ('t10k-images-idx3-ubyte', SMALL[:8, 1:], {}, r'\(5, 5, 1\), .*\(6, 5,'),
      (
        't10k-labels-idx1-ubyte',
        LABELS[:8] + 2,
        {},
        r'label 2 .*0\.\.3, got 4',
      ),
      ('train-images-idx3-ubyte.gz', SMALL[:0], {}, r'is empty.*0 x 6 x 5'),
      (
        'train-images-idx3-ubyte.gz',
        SMALL,
        {'shape': (39, 6, 5)},
        r'must have 1,170 bytes .*39 x 6 x 5, but has 1,200',
      ),
    ],
  )
  def test_a_wrong_file_is_named(self, idx, file, array, options, message):
    write_idx(idx / file, array, **options)
    corpus = IdxImages(str(idx))
    with pytest.raises(ValueError, match=message) as error:
      corpus.open('train')
      corpus.open('validation')
    assert str(idx / file) in str(error.value)

  @pytest.mark.parametrize('size', [2, 6, 100])
  def test_a_truncated_download_is_named(self, idx, size):
    file = idx / 'train-images-idx3-ubyte.gz'
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r'images-idx3-ubyte\.gz .*get the f'):
      IdxImages(str(idx)).open('train')

  def test_a_short_header_is_named(self, idx):
    (idx / 't10k-images-idx3-ubyte').write_bytes(bytes([0, 0, 8, 3, 0]))
    with pytest.raises(ValueError, match=r't10k-images.*ends in its header'):
      IdxImages(str(idx)).open('validation')

  def test_labels_beyond_the_names(self, idx):
    with pytest.raises(ValueError, match=r'0\.\.2, got 3; .*corpus\.names'):
      IdxImages(str(idx), names=NAMES[:3]).open('train')


class TestFolders:
  def test_folders_are_classes(self, folders):
    (folders / 'a' / 'notes.txt').write_text('ignored')
    (folders / 'a' / '.hidden.png').write_text('ignored')
    (folders / '.cache').mkdir()
    corpus = ImageFolders(str(folders), str(folders), channels=1)
    train = corpus.open('train')
    assert train.names == NAMES and train.num_classes == 4
    assert train.shape == (6, 5, 1) and contents(train) == WHOLE
    assert len(corpus.open('validation')) == 40
    assert all(f'/{NAMES[x.label]}/' in x.place for x in read(train))

  def test_files_in_deeper_folders_belong_to_the_class(self, folders):
    deep = folders / 'a' / 'x' / 'y'
    deep.mkdir(parents=True)
    hidden = folders / 'a' / '.checkpoints'
    hidden.mkdir()
    for directory in (deep, hidden):
      Image.fromarray(SMALL[0]).save(directory / 'z.PNG')
    train = ImageFolders(str(folders), str(folders)).open('train')
    assert len(train) == 41

  def test_held_out_images_are_disjoint(self, folders):
    corpus = ImageFolders(str(folders), holdout=0.3, channels=1)
    train, validation = (
      contents(corpus.open(split)) for split in ('train', 'validation')
    )
    assert sorted(train + validation) == WHOLE and validation

  def test_held_out_images_do_not_depend_on_the_directory(self, folders):
    moved = folders.parent / 'moved'
    find = lambda root: {
      x.place.split('/')[-1]
      for x in read(ImageFolders(str(root), holdout=0.3).open('validation'))
    }
    before = find(folders)
    folders.rename(moved)
    assert find(moved) == before

  def test_size_is_the_centred_square(self, folders):
    wide = picture(20, 40, 1)
    wide.save(folders / 'a' / '99.png')
    train = ImageFolders(str(folders), str(folders), size=8).open('train')
    assert train.shape == (8, 8, 3)
    found = {x.place[-6:]: x.image for x in read(train)}
    assert {x.shape for x in found.values()} == {(8, 8, 3)}
    # As other libraries do it: the shorter side first, then a crop.
    usual = wide.resize((16, 8), Image.Resampling.BICUBIC).crop((4, 0, 12, 8))
    np.testing.assert_array_equal(found['99.png'], pixels.to_array(usual))

  def test_images_of_two_sizes_name_the_first_odd_file(self, folders):
    for name in ('b/98.png', 'c/99.png'):
      picture(7, 5).save(folders / name)
    message = r'b/98\.png has 7 x 5 .*a/00\.png has 6 x 5: set corpus\.size'
    with pytest.raises(ValueError, match=message):
      ImageFolders(str(folders), str(folders)).open('train')

  @pytest.mark.parametrize('skip', [False, True])
  def test_splits_have_one_size(self, folders, skip):
    other = folders.parent / 'other'
    (other / 'a').mkdir(parents=True)
    picture(7, 5).save(other / 'a' / '0.png')
    corpus = ImageFolders(str(folders), str(other), skip_unreadable=skip)
    with pytest.raises(ValueError, match=r'0\.png has 7 x 5 .* has 6 x 5'):
      corpus.open('validation')

  def test_a_size_that_changes_after_opening_is_named(self, folders):
    train = ImageFolders(str(folders), str(folders)).open('train')
    picture(9, 5).save(folders / 'd' / '03.png')
    with pytest.raises(ValueError, match=r'd/03\.png has 9 x 5'):
      read(train)

  @pytest.mark.parametrize('size', [None, 4])
  @pytest.mark.parametrize('content', [b'', b'no image', 'truncated'])
  def test_an_unreadable_image_is_named(self, folders, size, content):
    file = folders / 'b' / '01.png'
    sound = file.read_bytes()
    file.write_bytes(sound[:-40] if content == 'truncated' else content)
    message = r'b/01\.png: Pillow cannot read it .*corpus\.skip_unreadable'
    corpus = ImageFolders(str(folders), str(folders), size=size)
    # Without a size, headers are read when the corpus is opened.
    with pytest.raises((ValueError, OSError), match=message):
      next(batches(corpus.open('train'), batch_size=40, seed=0))

  def test_unreadable_images_are_skipped_on_request(self, folders):
    first = folders / 'a' / '00.png'
    (folders / 'b' / '01.png').write_text('no image')
    first.write_bytes(first.read_bytes()[:-40])
    corpus = ImageFolders(
      str(folders), str(folders), channels=1, skip_unreadable=True
    )
    train = corpus.open('train')
    gone = {SMALL[0].tobytes(), SMALL[1].tobytes()}
    assert contents(train) == [x for x in WHOLE if x[0] not in gone]
    assert [path[-8:] for path in train.left_out] == ['a/00.png', 'b/01.png']
    text = printed(shown(train))
    assert '2 files that Pillow cannot read are left out' in text
    assert text.count('cannot read') == 1

  def test_no_folder(self, tmp_path):
    (tmp_path / '.hidden').mkdir()
    with pytest.raises(ValueError, match=r'has no folders: put the images'):
      ImageFolders(str(tmp_path)).open('train')
    with pytest.raises(FileNotFoundError, match=r'nowhere is not a directory'):
      ImageFolders(str(tmp_path / 'nowhere')).open('train')

  def test_an_empty_class(self, folders):
    (folders / 'e').mkdir()
    (folders / 'e' / 'photo.heic').write_text('')
    with pytest.raises(ValueError, match=r'/e has no image: .*\.png'):
      ImageFolders(str(folders)).open('train')

  def test_an_unknown_class_of_validation(self, folders):
    other = folders.parent / 'other'
    (other / 'z').mkdir(parents=True)
    with pytest.raises(ValueError, match=r"folder 'z', which is not a class"):
      ImageFolders(str(folders), str(other)).open('validation')

  def test_a_class_of_which_every_image_is_held_out(self, folders):
    (folders / 'e').mkdir()
    names = (f'{i}.png' for i in range(1000))
    held_out = lambda name: zlib.crc32(f'e/{name}'.encode()) < 2**31
    picture(6, 5).save(folders / 'e' / next(filter(held_out, names)))
    with pytest.raises(ValueError, match=r"of class 'e' \(holdout=0\.5\): add"):
      ImageFolders(str(folders), holdout=0.5).open('train')

  def test_an_empty_split(self, folders):
    corpus = ImageFolders(str(folders), holdout=1e-9)
    with pytest.raises(
      ValueError, match=r'validation split of .*holdout=1e-09'
    ):
      corpus.open('validation')

  @pytest.mark.parametrize(
    'options, message',
    [
      ({'size': 0}, 'size must be at least 1, got 0'),
      ({'channels': 2}, 'channels must be 1 .*got 2'),
      ({'holdout': 1.5}, 'holdout must be between 0 and 1'),
    ],
  )
  def test_wrong_options(self, folders, options, message):
    with pytest.raises(ValueError, match=message):
      ImageFolders(str(folders), **options).open('train')

  def test_missing_pillow_names_the_extra(self, folders, monkeypatch):
    monkeypatch.setitem(sys.modules, 'PIL.Image', None)
    with pytest.raises(ImportError, match=r"'galore-optax\[images\]'"):
      ImageFolders(str(folders)).open('train')


class TestDecode:
  def encoded(self, image, kind='PNG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()

  @pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA'])
  @pytest.mark.parametrize('channels', [1, 3, 4])
  def test_every_mode_of_8_bits(self, mode, channels):
    data = self.encoded(picture(4, 3).convert(mode))
    found = pixels.to_array(pixels.decode(data, channels))
    assert found.shape == (4, 3, channels) and found.dtype == np.uint8

  def test_cmyk(self):
    data = self.encoded(Image.new('CMYK', (3, 4), (0, 255, 255, 0)), 'JPEG')
    found = pixels.to_array(pixels.decode(data, 3))
    assert found[0, 0, 0] > 200 and found[0, 0, 1] < 50

  def test_a_transparent_palette_warns_of_nothing(self):
    palette = Image.new('P', (3, 4))
    data = self.encoded(palette, transparency=b'\0\1')
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      assert pixels.decode(data, 3).mode == 'RGB'

  def test_16_bits_are_refused(self):
    image = Image.fromarray(np.full((4, 3), 1000, np.uint16))
    with pytest.raises(ValueError, match='mode is I;16, which is not 8 bits'):
      pixels.decode(self.encoded(image), 1)

  def test_exif_orientation(self, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.zeros((20, 10, 3), np.uint8)
    upright[:10] = 255
    on_its_side = Image.fromarray(np.rot90(upright).copy())
    data = self.encoded(on_its_side, exif=exif)
    found = pixels.to_array(pixels.decode(data, 3))
    np.testing.assert_array_equal(found, upright)
    (tmp_path / 'a.png').write_bytes(data)
    assert pixels.size_in_header(str(tmp_path / 'a.png')) == (20, 10)


def prepare(directory, sizes=((6, 5),), label=None, image=None, bad=None):
  """Prepares 40 images as a TFDS set `toy`, in three shards."""
  import tensorflow_datasets as tfds

  shape = (None, None, 3) if len(sizes) > 1 else (*sizes[0], 3)
  label = label or tfds.features.ClassLabel(names=list(NAMES))
  image = image or tfds.features.Image(shape=shape)

  def stored(i):
    file = io.BytesIO()
    picture(*sizes[i % len(sizes)], i).save(file, 'PNG')
    return io.BytesIO(b'no image' if i == bad else file.getvalue())

  class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = 'toy'
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      features = {
        'image': image,
        'label': label,
        'file_name': tfds.features.Text(),
      }
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples()}

    def _generate_examples(self):
      is_image = isinstance(image, tfds.features.Image)
      for i in range(40):
        yield (
          i,
          {
            'image': stored(i) if is_image else 'a text',
            'label': -1 if bad == 'label' else i % 4,
            'file_name': f'{i}.png',
          },
        )

  builder = Toy(data_dir=directory, file_format='array_record')
  config = tfds.download.DownloadConfig(num_shards=3)
  builder.download_and_prepare(download_config=config)
  return builder


def as_tfrecord(builder, directory):
  """Writes a prepared set again, with its records in a tfrecord file."""
  import pathlib

  old, new = pathlib.Path(builder.data_dir), directory / 'toy/1.0.0'
  new.mkdir(parents=True)
  info = json.loads((old / 'dataset_info.json').read_text())
  info['fileFormat'] = 'tfrecord'
  info['splits'][0]['shardLengths'] = ['40']
  (new / 'dataset_info.json').write_text(json.dumps(info))
  for file in old.glob('*.txt'):
    (new / file.name).write_bytes(file.read_bytes())
  (new / 'features.json').write_bytes((old / 'features.json').read_bytes())
  records = builder.as_data_source('train').data_source
  path = new / 'toy-train.tfrecord-00000-of-00001'
  path.write_bytes(b''.join(frame(records[i]) for i in range(40)))
  return str(directory)


class TestTfds:
  @pytest.mark.parametrize('kind', ['array_record', 'tfrecord'])
  def test_prepared_images(self, tmp_path, kind):
    directory, builder = str(tmp_path), prepare(tmp_path)
    if kind == 'tfrecord':
      directory = as_tfrecord(builder, tmp_path / 'other')
    corpus = ImageTfds('toy', directory, validation='train')
    train = corpus.open('train')
    assert train.shape == (6, 5, 3) and train.names == NAMES
    assert len(train) == 40 and train.num_classes == 4
    expected = [(picture(6, 5, i).tobytes(), i % 4) for i in range(40)]
    assert contents(train) == sorted(expected)
    assert {x.place for x in read(train)} == {
      f'toy, image {i}.png' for i in range(40)
    }
    stream = batches(train, batch_size=16, seed=0)
    assert next(stream)['inputs'].shape == (16, 6, 5, 3)
    assert '9 are counted' in printed(shown(train, counted=9))
    assert 'tensorflow' not in sys.modules

  def test_images_of_several_sizes_need_a_size(self, tmp_path):
    prepare(tmp_path, sizes=((6, 5), (7, 9)))
    with pytest.raises(ValueError, match=r'toy have different sizes: set corp'):
      ImageTfds('toy', str(tmp_path)).open('train')
    train = ImageTfds('toy', str(tmp_path), size=4).open('train')
    assert {x.image.shape for x in read(train)} == {train.shape} == {(4, 4, 3)}

  def test_an_unreadable_image_is_named(self, tmp_path):
    prepare(tmp_path, bad=7)
    with pytest.raises(OSError, match=r'toy, image 7\.png: Pillow cannot'):
      read(ImageTfds('toy', str(tmp_path)).open('train'))

  def test_no_image_feature(self, tmp_path):
    import tensorflow_datasets as tfds

    prepare(tmp_path, image=tfds.features.Text())
    message = r"toy has no image feature 'image', but .*corpus\.image"
    with pytest.raises(ValueError, match=message):
      ImageTfds('toy', str(tmp_path)).open('train')
    with pytest.raises(ValueError, match=r"no image feature 'photo', but"):
      ImageTfds('toy', str(tmp_path), image='photo').open('train')

  def test_images_of_another_type(self, tmp_path):
    import tensorflow_datasets as tfds

    depth = tfds.features.Image(
      shape=(6, 5, 1), dtype=np.uint16, encoding_format='png'
    )
    prepare(tmp_path, image=depth)
    with pytest.raises(ValueError, match=r"'image' of toy is .*uint16"):
      ImageTfds('toy', str(tmp_path)).open('train')

  def test_no_classes(self, tmp_path):
    import tensorflow_datasets as tfds

    prepare(tmp_path, label=tfds.features.Scalar(dtype=np.int64))
    with pytest.raises(ValueError, match=r"no feature 'label' of classes"):
      ImageTfds('toy', str(tmp_path)).open('train')

  def test_a_split_without_labels(self, tmp_path):
    prepare(tmp_path, bad='label')
    with pytest.raises(ValueError, match=r'must be in 0\.\.3, got -1'):
      read(ImageTfds('toy', str(tmp_path)).open('train'))


def host(batch):
  return jax.tree.map(np.asarray, batch)


@pytest.fixture(params=['idx', 'folders', 'scale'])
def pipeline(request, tmp_path):
  """Starts an endless iterator of training batches."""
  if request.param == 'idx':
    directory = request.getfixturevalue('idx')
    examples = IdxImages(str(directory)).open('train')
    augment = Augment(crop=1, flip=True)
  else:
    directory = request.getfixturevalue('folders')
    size = 4 if request.param == 'scale' else None
    examples = ImageFolders(str(directory), str(directory), size=size)
    examples = examples.open('train')
    scaled = Augment(scale=(0.3, 1), flip=True)
    augment = scaled if size else Augment(crop=1, flip=True)
  return lambda seed=3: batches(
    examples, batch_size=8, seed=seed, augment=augment, noise=True
  )


class TestBatches:
  def test_arrays(self, idx):
    train = IdxImages(str(idx)).open('train')
    stream = batches(train, batch_size=8, seed=0)
    found = [host(next(stream)) for _ in range(5)]
    for batch in found:
      assert {k: (x.shape, x.dtype.name) for k, x in batch.items()} == {
        'inputs': ((8, 6, 5, 1), 'uint8'),
        'targets': ((8,), 'int32'),
        'weights': ((8,), 'float32'),
      }
      assert (batch['weights'] == 1).all()
    epoch = [
      (image.tobytes(), int(label))
      for batch in found
      for image, label in zip(batch['inputs'], batch['targets'], strict=True)
    ]
    assert sorted(epoch) == WHOLE and epoch != WHOLE

  def test_noise_and_put(self, idx):
    train = IdxImages(str(idx)).open('train')
    put = lambda batch: batch | {'put': True}
    stream = batches(train, batch_size=8, seed=0, noise=True, put=put)
    first, second = next(stream), next(stream)
    assert first['put'] and first['noise'].shape == (8, 2)
    assert first['noise'].dtype == np.uint32
    assert len(np.unique([first['noise'], second['noise']])) == 32

  def test_a_restored_iterator_returns_the_same_batches(self, pipeline):
    iterator = pipeline()
    for _ in range(4):
      next(iterator)
    state = iterator.get_state()
    expected = [host(next(iterator)) for _ in range(9)]
    text = json.dumps(json.loads(state) if isinstance(state, bytes) else state)
    assert len(text) < 3000
    restored = pipeline()
    restored.set_state(state)
    for batch in expected:
      jax.tree.map(np.testing.assert_array_equal, host(next(restored)), batch)

  def test_a_seed_decides_all(self, pipeline):
    first, again, other = (host(next(pipeline(seed))) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first['inputs'] != other['inputs']).any()
    assert (first['noise'] != other['noise']).any()

  def test_epochs_differ_in_order_and_augmentation(self, pipeline):
    stream = pipeline()
    epochs = []
    for _ in range(2):
      found = [host(next(stream)) for _ in range(5)]
      inputs = np.concatenate([batch['inputs'] for batch in found])
      targets = np.concatenate([batch['targets'] for batch in found])
      assert sorted(targets) == sorted(LABELS)
      epochs.append((targets.tolist(), {image.tobytes() for image in inputs}))
    assert epochs[0][0] != epochs[1][0]
    assert len(epochs[0][1] & epochs[1][1]) < 20

  def test_validation_is_a_fixed_pass_padded_with_weight_0(self, idx):
    validation = IdxImages(str(idx)).open('validation')
    once, again = (
      list(validation_batches(validation, batch_size=5)) for _ in range(2)
    )
    jax.tree.map(np.testing.assert_array_equal, once, again)
    assert isinstance(once[0]['inputs'], np.ndarray)
    assert [x['weights'].tolist() for x in once] == [[1] * 5, [1, 1, 1, 0, 0]]
    assert once[1]['inputs'].shape == (5, 6, 5, 1)
    assert not once[1]['inputs'][3:].any()
    whole = np.concatenate([x['inputs'] for x in once])[:8]
    assert {x.tobytes() for x in whole} == {x.tobytes() for x in SMALL[:8]}
    (limited,) = validation_batches(validation, batch_size=5, num_batches=1)
    np.testing.assert_array_equal(limited['inputs'], once[0]['inputs'])

  def test_batch_size_is_checked(self, idx):
    train = IdxImages(str(idx)).open('train')
    with pytest.raises(ValueError, match='batch_size must be at least 1'):
      batches(train, batch_size=0, seed=0)
    with pytest.raises(ValueError, match='batch_size must be at least 1'):
      validation_batches(train, batch_size=0)


class TestAugment:
  def images(self, idx, augment, count=400):
    """The changed copies of a single training image."""
    one = np.arange(1, 31, dtype=np.uint8).reshape(1, 6, 5)
    write_idx(idx / 'train-images-idx3-ubyte.gz', one)
    write_idx(idx / 'train-labels-idx1-ubyte.gz', LABELS[:1])
    train = IdxImages(str(idx)).open('train')
    stream = batches(train, batch_size=count, seed=0, augment=augment)
    return np.asarray(next(stream)['inputs'])[..., 0], one[0]

  def test_crop_moves_by_up_to_the_padding(self, idx):
    found, one = self.images(idx, Augment(crop=2))
    padded = np.pad(one, 2)
    crops = [padded[i : i + 6, j : j + 5] for i in range(5) for j in range(5)]
    expected = {crop.tobytes(): 0 for crop in crops}
    for image in found:
      expected[image.tobytes()] += 1
    assert len(expected) == 25 and min(expected.values()) > 2

  def test_flip_mirrors_half_of_the_images(self, idx):
    found, one = self.images(idx, Augment(flip=True))
    flipped = (found == one[:, ::-1]).all((1, 2))
    assert (flipped | (found == one).all((1, 2))).all()
    assert 0.4 < flipped.mean() < 0.6

  def test_scale_resizes_a_part(self, idx):
    found, one = self.images(idx, Augment(scale=(0.2, 0.4)), count=50)
    assert len({image.tobytes() for image in found}) == 50
    ranges = found.max((1, 2)).astype(int) - found.min((1, 2))
    assert (ranges < one.max() - one.min()).all()

  def test_scale_crops_the_stored_image(self, folders):
    """A crop of a large image is sharper than a crop of its small copy."""
    lines = np.zeros((64, 64), np.uint8)
    lines[::2] = 255
    for i in range(40):
      Image.fromarray(lines).save(folders / NAMES[i % 4] / f'{i:02}.png')
    corpus = ImageFolders(str(folders), str(folders), size=16, channels=1)
    augment = Augment(scale=(0.04, 0.05))
    train = corpus.open('train')
    (found,) = host(
      next(batches(train, batch_size=1, seed=0, augment=augment))
    )['inputs']
    assert np.ptp(found) > 100 > np.ptp(read(train)[0].image)

  @pytest.mark.parametrize('height, width', [(40, 40), (10, 80), (300, 7)])
  def test_a_random_box_is_inside_and_has_its_area(self, height, width):
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(300):
      box = pixels.random_box(
        height, width, uniform_4=rng.random(4), aspect=1.0, scale=(0.2, 1)
      )
      assert 0 <= box.left < box.right <= width
      assert 0 <= box.upper < box.lower <= height
      columns, rows = box.right - box.left, box.lower - box.upper
      areas.append(columns * rows / (height * width))
      if height == width:
        assert 0.74 < columns / rows < 1.34
    assert 0.2 <= min(areas) < 0.25 and 0.9 < max(areas) <= 1.0001

  def test_rounding_does_not_move_a_box_outside(self):
    uniform = np.random.default_rng(0).random((1000, 4))
    uniform[:, 2:] = 1
    for uniform_4 in uniform:
      box = pixels.random_box(
        7, 9, uniform_4=uniform_4, aspect=1.0, scale=(0.1, 1)
      )
      assert box.right <= 9 and box.lower <= 7

  @pytest.mark.parametrize(
    'options, message',
    [
      ({'crop': -1}, r'augment\.crop must be at least 0 pixels, got -1'),
      ({'scale': (0.5, 2)}, r'augment\.scale must be two shares .*\(0\.5, 2\)'),
      ({'scale': (0, 1)}, r'augment\.scale must be two shares'),
      ({'crop': 1, 'scale': (0.5, 1)}, 'both crop: set one'),
    ],
  )
  def test_wrong_sizes(self, options, message):
    with pytest.raises(ValueError, match=message):
      Augment(**options)


def printed(table):
  console = Console(width=100, file=io.StringIO())
  console.print(table)
  return ' '.join(console.file.getvalue().split())


class TestShown:
  def test_classes_sizes_and_an_image(self, idx):
    text = printed(shown(IdxImages(str(idx), names=NAMES).open('train')))
    assert (
      '40 images of 6 x 5 x 1 in 4 classes' in text and 'of which' not in text
    )
    assert 'an image of' in text and ' a 10 ' in text

  def test_an_image_is_drawn_with_characters(self, idx):
    drawn = np.zeros((40, 20, 20), np.uint8)
    drawn[:, :10, 10:] = 255
    write_idx(idx / 'train-images-idx3-ubyte.gz', drawn)
    write_idx(idx / 'train-labels-idx1-ubyte.gz', LABELS)
    corpus = IdxImages(str(idx), validation=None)
    assert printed(shown(corpus.open('train'))).count(20 * '@') == 10

  def test_many_classes_are_summed_up(self, idx):
    labels = (np.arange(40) % 30).astype(np.uint8)
    write_idx(idx / 'train-labels-idx1-ubyte.gz', labels)
    text = printed(shown(IdxImages(str(idx)).open('train')))
    assert 'and 10 more' in text and '1 to 1 each' in text


class TestPng:
  def test_a_grid_holds_the_images_in_order(self):
    images = RNG.integers(256, size=(5, 6, 4, 3), dtype=np.uint8)
    found = pixels.grid(images, 3, margin=1)
    assert found.shape == (13, 14, 3)
    np.testing.assert_array_equal(found[:6, 5:9], images[1])
    np.testing.assert_array_equal(found[7:, :4], images[3])
    assert (found[6] == 255).all() and (found[7:, 10:] == 255).all()

  @pytest.mark.parametrize('channels', [1, 3, 4])
  def test_pixels_of_a_png_are_those_written(self, tmp_path, channels):
    image = RNG.integers(256, size=(6, 4, channels), dtype=np.uint8)
    path = str(tmp_path / 'a.png')
    pixels.write_png(path, image)
    with Image.open(path) as found:
      np.testing.assert_array_equal(pixels.to_array(found), image)

  @pytest.mark.parametrize(
    'images, columns, message',
    [
      (np.zeros((2, 3, 3, 1)), 2, r'must be uint8 .*float64 \[2, 3, 3, 1\]'),
      (np.zeros((2, 3, 3), np.uint8), 2, r'with 4 dimensions'),
      (np.zeros((0, 3, 3, 1), np.uint8), 2, 'one image, got'),
      (np.zeros((2, 3, 3, 1), np.uint8), 0, 'got columns=0'),
    ],
  )
  def test_wrong_images(self, images, columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
      pixels.grid(images, columns)

  def test_a_png_has_1_3_or_4_channels(self, tmp_path):
    with pytest.raises(ValueError, match='channels must be 1'):
      pixels.write_png(str(tmp_path / 'a.png'), np.zeros((3, 3, 2), np.uint8))
    with pytest.raises(ValueError, match='must be uint8 with 3 dimensions'):
      pixels.write_png(str(tmp_path / 'a.png'), np.zeros((3, 3), np.uint8))
