"""Files of pages: whole or not there."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from common.storage import page_store
from common.storage.page_store import ABANDONED_S, HEAD, MAGIC, VERSION, PageStore

FORM = "float32 [(4, 2, 16, 1, 32)]"
PARTS = [bytes(range(200)), b"scales"]


def a_store(folder, seed=b"weights", form=FORM, quota=1 << 30) -> PageStore:
    return PageStore(folder, seed, form, quota)


def views(parts=PARTS) -> list[memoryview]:
    return [memoryview(bytearray(part)) for part in parts]


def read(store, key, parts=PARTS) -> list[bytes] | None:
    into = views([bytes(len(part)) for part in parts])
    return [bytes(one) for one in into] if store.read(key, into) else None


def test_what_was_written_is_read_by_another_engine(tmp_path):
    assert a_store(tmp_path).write(b"k", views())
    other = a_store(tmp_path)
    assert other.leading([b"k", b"missing"]) == 1
    assert read(other, b"k") == PARTS
    assert read(other, b"missing") is None
    assert (other.read_pages, other.damaged) == (1, 0)


@pytest.mark.parametrize("change", [{"seed": b"other weights"}, {"form": "bfloat16 [(4, 2, 16, 1, 32)]"}])
def test_another_engine_s_page_is_not_this_one_s(tmp_path, change):
    a_store(tmp_path).write(b"k", views())
    other = a_store(tmp_path, **change)
    assert read(other, b"k") is None


def test_a_file_under_another_s_name_is_found_out(tmp_path):
    store = a_store(tmp_path)
    store.write(b"k", views())
    os.replace(store.path(b"k"), store.path(b"l"))
    assert read(store, b"l") is None
    assert store.damaged == 1
    assert not store.path(b"l").exists()


@given(data=st.data())
def test_no_damage_is_served(tmp_path_factory, data):
    """A bit turned, an end cut off, something appended: removed, counted, and written again."""
    store = a_store(tmp_path_factory.mktemp("pages"))
    store.write(b"k", views())
    path = store.path(b"k")
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    how = data.draw(st.sampled_from(["turn", "cut", "append"]))
    turned = bytearray(whole)
    turned[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes({"turn": bytes(turned), "cut": whole[:at], "append": whole + b"x"}[how])
    assert read(store, b"k") is None
    assert (store.damaged, path.exists()) == (1, False)
    store.write(b"k", views())
    assert read(store, b"k") == PARTS


LARGE = [bytes(range(256)) * 300, b"scales" * 20, bytes(40_000)]


@given(data=st.data())
def test_no_damage_of_a_large_page_is_served(tmp_path_factory, data):
    store = a_store(tmp_path_factory.mktemp("pages"))
    store.write(b"k", views(LARGE))
    assert read(store, b"k", LARGE) == LARGE
    path = store.path(b"k")
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    zeros = data.draw(st.booleans())
    if zeros:  # from here on, as after a crash of the machine
        whole[at:] = bytes(len(whole) - at)
    else:
        whole[at] ^= 1 << data.draw(st.integers(0, 7))
    assume(whole != path.read_bytes())
    path.write_bytes(whole)
    assert read(store, b"k", LARGE) is None
    assert (store.damaged, path.exists()) == (1, False)


@pytest.mark.parametrize("most", [1, 7, 100, 1 << 20])
def test_a_system_that_gives_less_than_it_has_is_asked_again(tmp_path, monkeypatch, most):
    store = a_store(tmp_path)
    store.write(b"k", views())

    def a_little(descriptor, buffers):
        return page_store._one_after_another(descriptor, [buffers[0][:most]])

    monkeypatch.setattr(page_store, "_scatter", a_little)
    assert read(store, b"k") == PARTS
    os.truncate(store.path(b"k"), 250)
    assert read(store, b"k") is None
    assert store.damaged == 1


def test_where_nothing_scatters_buffers_are_filled_one_after_another(tmp_path, monkeypatch):
    monkeypatch.setattr(page_store, "_scatter", page_store._one_after_another)
    store = a_store(tmp_path)
    store.write(b"k", views(LARGE))
    assert read(store, b"k", LARGE) == LARGE
    with store.path(b"k").open("ab") as file:
        file.write(b"x")
    assert read(store, b"k", LARGE) is None


def test_a_file_of_another_version_is_not_read(tmp_path):
    store = a_store(tmp_path)
    head = HEAD.pack(MAGIC, VERSION + 1, store.key(b"k"), len(FORM), sum(map(len, PARTS))) + FORM.encode()
    everything = head + b"".join(PARTS)
    store.path(b"k").write_bytes(everything + sha256(everything).digest())
    assert read(store, b"k") is None
    assert (store.damaged, store.path(b"k").exists()) == (1, False)
    store.write(b"k", views())
    assert read(store, b"k") == PARTS


def test_a_page_of_another_size_is_not_read_into_this_one(tmp_path):
    store = a_store(tmp_path)
    store.write(b"k", views())
    assert read(store, b"k", [bytes(200)]) is None


KILLED = """
    import sys
    from common.storage.page_store import PageStore
    store = PageStore(sys.argv[1], b"weights", sys.argv[2], 1 << 40)
    page = [memoryview(bytearray(b"%06d" % 0 * 100_000))]
    print("begins", flush=True)
    for i in range(1_000_000):
        page[0][:6] = b"%06d" % i
        store.write(b"%06d" % i, page)
"""


def test_whoever_is_killed_in_the_middle_leaves_nothing_that_is_read_as_good(tmp_path):
    whole, torn = 0, 0
    for i in range(6):
        folder = tmp_path / str(i)
        code = [sys.executable, "-c", textwrap.dedent(KILLED), str(folder), FORM]
        with subprocess.Popen(code, stdout=subprocess.PIPE) as writer:
            writer.stdout.readline()
            time.sleep(0.05 + 0.02 * i)
            writer.kill()
        store = a_store(folder)
        torn += len(list(folder.glob("*.part")))
        for path in folder.glob("*.kv"):
            into = [memoryview(bytearray(600_000))]
            number = next(n for n in range(1_000_000) if store.path(b"%06d" % n) == path)
            assert store.read(b"%06d" % number, into)
            assert bytes(into[0][:6]) == b"%06d" % number
            whole += 1
        assert store.damaged == 0, "a file has its name when it is whole, or never"
    assert whole
    assert torn, "nobody was killed in the middle of a write; this test has seen nothing"


def test_what_was_left_in_the_middle_is_removed_later(tmp_path):
    part = tmp_path / "ab.1.0.part"
    part.write_bytes(b"half of it")
    a_store(tmp_path)
    assert part.exists(), "perhaps somebody else is writing it"
    os.utime(part, (0, time.time() - 2 * ABANDONED_S))
    a_store(tmp_path)
    assert not part.exists()


def test_the_quota_holds_and_who_was_read_last_stays(tmp_path):
    size = 1000
    store = a_store(tmp_path, quota=20 * size)
    for i in range(100):
        store.write(b"%d" % i, views([bytes(size)]))
        os.utime(store.path(b"%d" % i), (i, i))
        if i >= 5:
            assert read(store, b"5", [bytes(size)]) is not None, i
            os.utime(store.path(b"5"), (i + 1, i + 1))
    kept = [path.stat().st_size for path in tmp_path.glob("*.kv")]
    assert sum(kept) <= 20 * size * (1 + 1 / 16) + size
    assert len(kept) >= 10
    assert store.removed >= 75


def test_the_quota_counts_what_others_write(tmp_path):
    stores = [a_store(tmp_path, seed=b"%d" % i, quota=20_000) for i in range(2)]
    for i in range(40):
        for store in stores:
            store.write(b"%d" % i, views([bytes(1000)]))
    total = sum(path.stat().st_size for path in tmp_path.glob("*.kv"))
    assert total <= 20_000 * (1 + 2 / 16) + 2 * 1200


def test_threads_of_two_engines_write_and_read_the_same_pages(tmp_path):
    stores = [a_store(tmp_path) for _ in range(2)]
    keys = [b"%d" % (i % 7) for i in range(200)]
    with ThreadPoolExecutor(8) as threads:
        for store in stores:
            list(threads.map(lambda key, store=store: store.write(key, views([key * 500])), keys))
        good = list(threads.map(lambda key: read(stores[0], key, [key * 500]) == [key * 500], keys))
    assert all(good)
    assert sum(store.damaged for store in stores) == 0


def test_a_full_disk_is_counted_and_nothing_else(tmp_path, monkeypatch):
    store = a_store(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert not store.write(b"k", views())
    assert store.failed == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_may_only_be_read_is_refused_in_one_line(tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system", "the probe")

    monkeypatch.setattr(Path, "write_bytes", read_only)
    with pytest.raises(ValueError, match="cannot be used") as error:
        PageStore(tmp_path, b"seed", "form", 1000)
    why = "Read-only file system; name another folder, or allow this user to write there"
    assert str(error.value) == f"hicache_storage_dir={tmp_path} cannot be used: {why}"


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("no folder", encoding="utf-8")
    with pytest.raises(ValueError, match=r"hicache_storage_dir=.*file cannot be used: .*; name another folder"):
        a_store(Path(file))


def test_a_folder_that_goes_while_it_is_used_costs_its_pages_alone(tmp_path, monkeypatch):
    folder = tmp_path / "pages"
    store = a_store(folder, quota=1)

    def gone(_):
        monkeypatch.undo()
        shutil.rmtree(folder)
        return os.scandir(folder)

    monkeypatch.setattr(os, "scandir", gone)
    assert store.write(b"k", views()), "it was written, and went afterwards"
    assert not store.write(b"l", views())
    assert store.leading([b"k"]) == 0
    assert read(store, b"k") is None
    assert (store.failed, store.damaged) == (1, 0)


def test_what_was_ordered_with_one_seed_is_written_with_it(tmp_path):
    """Weights change while a thread waits for its turn."""
    store = a_store(tmp_path)
    store.seed, old = b"new weights", store.seed
    store.write(b"k", views(), old)
    assert read(store, b"k") is None
    assert store.read(b"k", views(), old)
    assert read(a_store(tmp_path), b"k") == PARTS


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes among its files")
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    store = a_store(tmp_path)
    os.mkfifo(store.path(b"k"))
    assert read(store, b"k") is None
    assert store.damaged == 1
    assert not store.path(b"k").exists()


def test_a_good_page_survives_a_process_that_may_open_no_more_files(tmp_path, monkeypatch):
    store = a_store(tmp_path)
    store.write(b"k", views())
    opened = os.open

    def none_left(path, *more):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", none_left)
    assert read(store, b"k") is None
    monkeypatch.setattr(os, "open", opened)
    assert read(store, b"k") == PARTS
    assert store.damaged == 0
