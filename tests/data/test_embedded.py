"""The embedded corpus: read without importing, divided by file, the same bytes every time."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from lib.core.data_settings import EmbeddedSource
from lib.core.errors import EnvError
from lib.core.process import worker_pool
from lib.data.raw import embedded
from tests.conftest import HANG_S, ROOT

LONG = "This sentence stands here so that the docstring is long enough to be taken. " * 2

MODULE = f'''"""{LONG}"""
raise SystemExit("imported")

class Outer:
    """Outer. {LONG}"""

    if True:
        async def inner(self):
            """Inner. {LONG}"""

    def short(self):
        """Too short."""

try:
    pass
except ValueError:
    def hidden():
        "Plain. {LONG}"
'''

OUTSIDE = f'''
add_docstr(thing.method, r"""Method. {LONG}""".format(**common))
module.add_newdoc("place", "name", ("attribute", """
    Attribute. {LONG}
    """))
other("{LONG}")
x = "{LONG}"
'''

TOPICS = f"topics = {{'while': '''While. {LONG}''', 'del': '''too short'''}}\n"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages; the first raises when it is imported."""
    first, second = tmp_path / "first", tmp_path / "python"
    for path, text in {
        first / "a.py": MODULE,
        first / "sub" / "b.py": OUTSIDE,
        first / "sub" / "test_b.py": MODULE,
        first / "tests" / "c.py": MODULE,
        first / "broken.py": "def (:\n",
        first / "latin.py": b'"""caf\xe9"""'.decode("latin-1").encode("latin-1"),
        first / "surrogate.py": f'"""\\ud800 {LONG}"""',
        second / "pydoc_data" / "topics.py": TOPICS,
        second / "z.py": MODULE,
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    roots = {"first": first, "python": second}
    monkeypatch.setattr(embedded, "_root", lambda package: roots[package])
    monkeypatch.syspath_prepend(str(tmp_path))
    return EmbeddedSource(kind="embedded", packages=("first", "python"), val_fraction=0.2)


def read(source: EmbeddedSource, seed: int = 1, workers: int = 1) -> embedded.Corpus:
    with worker_pool(workers) as pool:
        return embedded.read(source, seed, pool)


def test_every_docstring_is_found_with_its_name_and_line(packages):
    corpus = read(packages)
    found = {d.id: d.text for d in corpus.train + corpus.val}
    assert sorted(found) == [
        "first/a.py#:1",
        "first/a.py#Outer.inner:9",
        "first/a.py#Outer:5",
        "first/a.py#hidden:18",
        "first/sub/b.py#place.name:3",
        "first/sub/b.py#thing.method:2",
        "python/pydoc_data/topics.py#while:1",
        "python/z.py#:1",
        "python/z.py#Outer.inner:9",
        "python/z.py#Outer:5",
        "python/z.py#hidden:18",
    ]
    assert found["first/sub/b.py#place.name:3"].startswith("Attribute. This")  # as cleandoc


def test_what_cannot_be_read_is_counted_and_the_rest_is_read(packages):
    corpus = read(packages)
    assert corpus.unparsable == ("first/broken.py", "first/latin.py")
    assert corpus.unencodable == 1
    assert corpus.files == 7  # tests/ and test_b.py are not looked at


def test_no_file_is_in_both_splits_and_the_topics_train(packages):
    corpus = read(packages)
    train, val = {d.file for d in corpus.train}, {d.file for d in corpus.val}
    assert train and val and not train & val
    assert embedded.TOPICS in train


def test_order_follows_the_seed_and_not_the_workers(packages):
    one, two = read(packages, 1, workers=1), read(packages, 1, workers=2)
    assert one == two
    other = read(packages, 2)
    assert [d.id for d in other.train] != [d.id for d in one.train]
    assert {d.id for d in other.val} == {d.id for d in one.val}  # the split does not move


def test_val_takes_whole_files_until_it_holds_the_fraction():
    documents = [
        embedded.Document(id=f"f{i}#:{j}", file=f"f{i}", text="x" * 100)
        for i in range(40)
        for j in range(5)
    ]
    documents.append(embedded.Document(id="big#:1", file="big", text="x" * 100_001))
    chosen = embedded.choose_val_files(documents, 0.05)
    total = sum(len(d.text) for d in documents)
    held = sum(len(d.text) for d in documents if d.file in chosen)
    assert 0.05 * total <= held < 0.05 * total + 500
    assert "big" not in chosen


def test_a_package_without_sources_is_named(tmp_path, monkeypatch):
    with pytest.raises(EnvError, match=r"not installed: no_such_package; pip install"):
        embedded.versions(EmbeddedSource(kind="embedded", packages=("no_such_package",)))

    class Zipped(importlib.metadata.PathDistribution):
        def locate_file(self, path):
            return tmp_path / "only.zip" / str(path)

    monkeypatch.setattr(embedded, "_distribution", lambda p: Zipped(tmp_path))
    with pytest.raises(EnvError, match=r"without its \.py files.*: numpy; reinstall"):
        embedded._root("numpy")


def test_a_standard_package_is_read_without_importing_it():
    """`numpy` is read from its files; neither it nor anything large is loaded for that."""
    code = (
        "import sys\n"
        "from lib.core.data_settings import EmbeddedSource\n"
        "from lib.core.process import worker_pool\n"
        "from lib.data.raw import embedded\n"
        "source = EmbeddedSource(kind='embedded', packages=('pyarrow', 'datasets'))\n"
        "with worker_pool(1) as pool:\n"
        "    corpus = embedded.read(source, 1, pool)\n"
        "about = embedded.versions(source)\n"
        "loaded = {'torch', 'numpy', 'pandas', 'pyarrow', 'datasets'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "print(len(corpus.train), len(corpus.val), about['datasets']['version'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr
    train, val, version = done.stdout.split()
    assert int(train) > 500 and int(val) > 10
    assert version == importlib.metadata.version("datasets")


@pytest.mark.slow
def test_the_whole_corpus_has_the_published_size():
    """Within 10 % of the figures of the pinned environment (data.md 4.1.6)."""
    source = EmbeddedSource(kind="embedded")
    with worker_pool(2) as pool:
        corpus = embedded.read(source, 1234, pool)
    documents = corpus.train + corpus.val
    sizes = sorted(len(d.text) for d in documents)
    seen = {
        "documents": (len(documents), 17_961),  # seen 17,979
        "bytes": (sum(len(d.text.encode()) for d in documents), 12_400_000),  # seen 12.67 MB
        "files": (len({d.file for d in documents}), 2_281),  # seen 2,335
        "val documents": (len(corpus.val), 1_088),  # seen 1,103
        "val bytes": (sum(len(d.text.encode()) for d in corpus.val), 620_000),  # seen 0.64 MB
        "median": (sizes[len(sizes) // 2], 348),  # seen 344
    }
    for name, (found, published) in seen.items():
        assert abs(found - published) <= 0.1 * published, name
    assert len({d.id for d in documents}) == len(documents)
    assert not Path(documents[0].id).is_absolute()
