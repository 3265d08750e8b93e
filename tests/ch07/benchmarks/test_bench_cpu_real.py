"""What is measured on a CPU with real shapes: rows that are kept, and the table made of them."""

import pytest

from ch07_sglang_radix.benchmarks import bench_cpu_real
from ch07_sglang_radix.benchmarks.bench_cpu_real import read_rows, readme_table, requests_of, write_readme, write_rows


def row(batch, contender, tokens, faster=1.0, dtype="float32", allows=""):
    return {
        "model": "M", "dtype": dtype, "cores": "1 thread", "batch": batch, "contender": contender,
        "tokens_per_second": tokens, "engine_is_faster_by": faster, "memory_allows": allows,
    }  # fmt: skip


def pair(batch, tokens, faster, **more):
    return [
        row(batch, "this engine", tokens, **more),
        row(batch, "transformers generate", tokens / faster, faster, **more),
    ]


def test_rows_that_are_measured_again_are_replaced_and_all_others_stay(tmp_path):
    path = tmp_path / "new" / "x.csv"
    write_rows(path, [*pair("1", 10, 2), *pair("8", 20, 2)])
    write_rows(path, [*pair("8", 30, 3), *pair("8", 40, 4, dtype="bfloat16")])
    found = [(r["dtype"], r["batch"], r["contender"], float(r["tokens_per_second"])) for r in read_rows(path)]
    assert found == [
        ("float32", "1", "this engine", 10), ("float32", "1", "transformers generate", 5),
        ("float32", "8", "this engine", 30), ("float32", "8", "transformers generate", 10),
        ("bfloat16", "8", "this engine", 40), ("bfloat16", "8", "transformers generate", 10),
    ]  # fmt: skip


def test_the_table_has_a_line_for_each_dtype_and_an_empty_cell_for_what_was_not_measured(tmp_path):
    path = tmp_path / "x.csv"
    write_rows(
        path, [*pair("1", 41.7, 1.49, allows=80.2), *pair("mixed", 1234.5, 4.26), *pair("8", 99, 2, dtype="bfloat16")]
    )
    assert readme_table(read_rows(path)).splitlines()[2:] == [
        "| M | float32 | 1 thread | 42 (80), 1.5x |  |  | 1,234, 4.3x |",
        "| M | bfloat16 | 1 thread |  | 99, 2.0x |  |  |",
    ]


def test_the_table_takes_the_place_of_the_one_before(tmp_path, monkeypatch):
    csv, readme = tmp_path / "x.csv", tmp_path / "README.md"
    write_rows(csv, pair("8", 20, 2))
    monkeypatch.setattr(bench_cpu_real, "README", readme)
    readme.write_text("above\n<!-- bench_cpu_real -->\nold\n<!-- /bench_cpu_real -->\nbelow\n")
    write_readme(csv)
    once = readme.read_text()
    assert once.startswith("above\n<!-- bench_cpu_real -->\n\n| model |")
    assert once.endswith("|\n\n<!-- /bench_cpu_real -->\nbelow\n")
    assert "old" not in once
    write_readme(csv)
    assert readme.read_text() == once
    readme.write_text("no block")
    with pytest.raises(ValueError, match="has no <!-- bench_cpu_real --> block"):
        write_readme(csv)


@pytest.mark.parametrize(("batch", "count"), [("1", 1), ("8", 8), ("32", 32), ("mixed", 32)])
def test_everybody_gets_the_same_requests_every_time(batch, count):
    requests = requests_of(batch)
    assert len(requests) == count
    assert requests == requests_of(batch)
    lengths = {(len(r.ids), r.new_tokens) for r in requests}
    if batch == "mixed":
        assert all(16 <= n <= 256 for pair_ in lengths for n in pair_)
        assert len(lengths) > 20
    else:
        assert lengths == {(32, 64)}
