"""Rank 0's book of adapters: names, identities, and who is forgotten first."""

import os

import pytest

from ch07_sglang_radix.adapters.registry import LoRARegistry, Shelf
from ch07_sglang_radix.lora import LoRARef, lora_names, lora_refs
from common.models.adapter_files import FILES, checksum
from common.tiny_qwen import ADAPTERS_PATH

PIRATE, TERSE = (str(ADAPTERS_PATH / name) for name in ("pirate", "terse"))


def fill(shelf, *identities):
    for identity in identities:
        shelf.use(identity)
    return shelf


def test_the_least_recently_used_goes_first_and_with_fifo_the_oldest():
    assert fill(Shelf(2, "lru"), "a", "b", "a").in_the_way(()) == "b"
    assert fill(Shelf(2, "fifo"), "a", "b", "a").in_the_way(()) == "a"


def test_nobody_is_in_the_way_while_there_is_room_and_who_is_kept_never_is():
    assert fill(Shelf(2), "a").in_the_way(()) is None
    assert fill(Shelf(None), *"abcdefgh").in_the_way(()) is None
    assert fill(Shelf(2), "a", "b").in_the_way({"a"}) == "b"
    with pytest.raises(ValueError, match="all 2 places are taken by adapters that are in use or pinned"):
        fill(Shelf(2), "a", "b").in_the_way({"a", "b"})


def test_an_identity_is_that_of_name_and_folder_at_the_start_and_a_fresh_one_at_each_load():
    def first(*refs, at_start=True):
        registry = LoRARegistry(8)
        return [registry.add(LoRARef(*ref), at_start).identity for ref in refs]

    start = first(("a", PIRATE), ("b", TERSE))
    assert first(("b", TERSE), ("a", PIRATE)) == start[::-1]
    assert len({*start, *first(("a", TERSE), ("b", PIRATE))}) == 4
    registry, seen = LoRARegistry(8), set(start)
    for _ in range(5):
        adapter = registry.add(LoRARef("a", PIRATE))
        assert adapter.identity not in seen
        seen.add(adapter.identity)
        registry.take_name("a")


def test_a_name_that_is_given_up_can_be_taken_again_while_its_users_go_on():
    registry = LoRARegistry(8)
    old = registry.add(LoRARef("a", PIRATE))
    with pytest.raises(ValueError, match="lora_name='a' is loaded already; unload it first, or use another name"):
        registry.add(LoRARef("a", TERSE))
    assert registry.take_name("a") is old
    with pytest.raises(ValueError, match="lora_path='a' is not loaded; loaded: none"):
        registry.acquire("a")
    new = registry.add(LoRARef("a", TERSE))
    assert registry.acquire("a") == new.identity
    assert {old.identity, new.identity} == set(registry.by_identity)
    registry.forget(old)
    assert set(registry.by_identity) == {new.identity}


def test_slots_are_given_out_from_1_and_again_when_they_are_left():
    registry = LoRARegistry(3)
    assert [registry.take_slot(one) for one in "abc"] == [1, 2, 3]
    registry.leave_slot("b")
    assert registry.take_slot("d") == 2
    registry.drop("a")
    assert registry.slots == {"c": 3, "d": 2}


def test_one_place_stays_for_adapters_that_are_not_pinned():
    registry = LoRARegistry(2)
    registry.add(LoRARef("a", PIRATE, pinned=True))
    with pytest.raises(
        ValueError, match=r"lora_name='b' would be pinned as the 2\. of max_loras_per_batch=2; .* leave pinned out"
    ):
        registry.add(LoRARef("b", TERSE, pinned=True))
    assert registry.acquire("a") in registry.pinned
    assert set(registry.names) == {"a"}


def test_the_checksum_is_of_both_files(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((ADAPTERS_PATH / "pirate" / name).read_bytes())
    assert checksum(tmp_path) == checksum(PIRATE) != checksum(TERSE)
    with open(tmp_path / "adapter_config.json", "a") as file:
        file.write("\n")
    assert checksum(tmp_path) != checksum(PIRATE)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"adapter_model.safetensors cannot be read: No such file .*; give a folder with"
    ):
        checksum(tmp_path)


# --- what is asked for


@pytest.mark.parametrize(
    "given",
    [
        {"a": "x", "b": "y/z"},
        ["a=x", "b=y/z"],
        [{"lora_name": "a", "lora_path": "x"}, {"lora_name": "b", "lora_path": "y/z", "pinned": False}],
        ['{"lora_name": "a", "lora_path": "x"}', "b=y/z"],
    ],
    ids=["names", "pairs", "objects", "as on a command line"],
)
def test_lora_paths_in_all_of_sglang_s_forms(given):
    assert lora_refs(given) == [LoRARef("a", "x"), LoRARef("b", "y/z")]


def test_a_folder_alone_is_its_own_name():
    assert lora_refs(["a/b"]) == [LoRARef("a/b", "a/b")]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("a=x", "must be {name: folder}, or a list of NAME=FOLDER"),
        (["a=x", "a=y"], "has 2 adapters of the name 'a'; give each a name of its own"),
        ([{"lora_name": "a"}], "lora_paths holds {'lora_name': 'a'}; give NAME=FOLDER"),
        (["{a"], "which is no JSON"),
        ([7], "lora_paths holds 7; give"),
        ({"": "x"}, "lora_name: an empty text is none"),
        ({"a": ""}, "lora_path: an empty text is none"),
        ({" a": "x"}, "must be printable and not begin or end with a space"),
        ([{"lora_name": "a", "lora_path": "x", "pinned": "yes"}], "pinned='yes' must be True or False"),
    ],
)
def test_what_is_none_of_them_is_refused_in_a_line(given, says):
    with pytest.raises(ValueError, match=r".") as error:
        lora_refs(given)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_one_name_is_for_all_prompts_and_a_list_for_each():
    assert lora_names("a", 3, True) == ["a"] * 3
    assert lora_names(["a", None, "b"], 3, True) == ["a", None, "b"]
    assert lora_names(None, 2, False) == lora_names([None, None], 2, False) == [None, None]


@pytest.mark.parametrize(
    ("given", "enabled", "says"),
    [
        (["a"], True, "lora_path has 1 names for 2 prompts; give one for each, None for the base"),
        ("a", False, "asks for an adapter, and there are none here; start with enable_lora"),
        ([None, "a"], False, "asks for an adapter, and there are none here"),
        ([1, None], True, "lora_path=1 must be a text"),
        ("", True, "lora_path: an empty text is none"),
        (5, True, "lora_path=5 must be a name, or one for each prompt"),
    ],
)
def test_names_that_cannot_be_are_refused_in_a_line(given, enabled, says):
    with pytest.raises(ValueError, match=r".") as error:
        lora_names(given, 2, enabled)
    assert says in str(error.value)


@pytest.mark.skipif(os.name == "nt", reason="no such devices")
def test_a_device_in_place_of_a_file_is_not_read(tmp_path):
    for name in FILES:
        (tmp_path / name).symlink_to(os.devnull)
    with pytest.raises(
        FileNotFoundError, match=r"adapter_config\.json cannot be read: it is no file; give a folder with"
    ):
        checksum(tmp_path)
